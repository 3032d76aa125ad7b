"""The rules of the house, read from the sources: who may import whom, sizes, docstrings, what is shipped."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

COMMON = {"sdxl_cli", "sdxl_cli.errors", "sdxl_cli.presets", "sdxl_cli.console"}
LOWER = {"sdxl_cli.diffusion", "sdxl_cli.checkpoint", "sdxl_cli.metrics", "sdxl_cli.model", "sdxl_kernels"}
ROOMS = {
    "sdxl_cli.generation", "sdxl_cli.training", "sdxl_cli.data", "sdxl_cli.evaluation", "sdxl_cli.inspection",
    "sdxl_cli.bench",
}  # fmt: skip

MAY_IMPORT: dict[str, set[str]] = {
    "sdxl_kernels": set(),
    "sdxl_cli": set(),
    "sdxl_cli.errors": set(),
    "sdxl_cli.console": {"sdxl_cli.errors"},
    "sdxl_cli.presets": {"sdxl_cli.errors"},
    "sdxl_cli.bundled": set(),
    "sdxl_cli.model": COMMON | {"sdxl_kernels"},
    "sdxl_cli.diffusion": COMMON | {"sdxl_cli.model"},
    "sdxl_cli.checkpoint": COMMON | {"sdxl_cli.model"},
    "sdxl_cli.metrics": COMMON | {"sdxl_cli.checkpoint"},
    "sdxl_cli.generation": COMMON | LOWER,
    "sdxl_cli.data": COMMON | LOWER,
    "sdxl_cli.evaluation": COMMON | LOWER | {"sdxl_cli.generation", "sdxl_cli.data"},
    "sdxl_cli.inspection": COMMON | LOWER | {"sdxl_cli.data", "sdxl_cli.generation"},
    "sdxl_cli.training": COMMON | LOWER | {"sdxl_cli.generation", "sdxl_cli.data"},
    "sdxl_cli.bench": COMMON | LOWER | {"sdxl_cli.generation", "sdxl_cli.training", "sdxl_cli.data"},
    "sdxl_cli.commands": COMMON | LOWER | ROOMS,
    "sdxl_cli.cli": COMMON | {"sdxl_cli.commands"},
    "sdxl_cli.__main__": {"sdxl_cli.cli"},
}
"""Layer -> project layers that its modules may import, at the top or inside functions."""

NETWORKS = {"sdxl_cli.model.unet", "sdxl_cli.model.vae", "sdxl_cli.model.text", "sdxl_cli.model.sdxl"}
LIGHT_LAYERS = {
    "sdxl_cli.cli",
    "sdxl_cli.commands",
    "sdxl_cli.console",
    "sdxl_cli.errors",
    "sdxl_cli.presets",
}
HEAVY = {
    "accelerate", "diffusers", "einops", "ftfy", "numpy", "open_clip", "PIL", "pyarrow", "rich", "safetensors",
    "torch", "torchvision", "tqdm", "transformers", "sdxl_kernels",
}  # fmt: skip

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shipped() -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for base, package in ((ROOT, "sdxl_cli"), (ROOT / "kernels", "sdxl_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            found[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def sources() -> list[Path]:
    """Every Python file of the project."""
    folders = ("sdxl_cli", "kernels", "tests", "tools", "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = shipped()
each_module = pytest.mark.parametrize("name", MODULES)
each_source = pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer(module: str) -> str:
    return "sdxl_kernels" if module.split(".")[0] == "sdxl_kernels" else ".".join(module.split(".")[:2])


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules imported by these nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            assert node.module
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [full for full in inside if full in MODULES]
            yield from modules or [node.module]


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: not those in functions or under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from at_import_time(node)


def functions(tree: ast.AST) -> Iterator[Function]:
    yield from (node for node in ast.walk(tree) if isinstance(node, Function))


@each_module
def test_imports_go_one_way(name: str) -> None:
    here = layer(name)
    assert here in MAY_IMPORT, f"{here} has no row in MAY_IMPORT"
    ours = {
        m
        for m in imported(ast.walk(parsed(MODULES[name])))
        if m.split(".")[0] in ("sdxl_cli", "sdxl_kernels")
    }
    wrong = {module for module in ours if layer(module) not in MAY_IMPORT[here] | {here}}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"
    if here == "sdxl_cli.diffusion":
        assert not ours & NETWORKS, "the mathematics of noise knows no network"


@each_module
def test_light_modules_import_nothing_heavy(name: str) -> None:
    if layer(name) not in LIGHT_LAYERS | {"sdxl_cli"}:
        return
    heavy = {m for m in imported(at_import_time(parsed(MODULES[name]))) if m.split(".")[0] in HEAVY}
    assert not heavy, f"{name} must import {', '.join(sorted(heavy))} inside functions"


def test_kernels_know_torch_and_nothing_else() -> None:
    allowed = {"torch", "sdxl_kernels", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if layer(name) == "sdxl_kernels":
            assert {module.split(".")[0] for module in imported(ast.walk(parsed(path)))} <= allowed, name


def test_the_kernels_folder_is_no_package() -> None:
    """An importable ``kernels`` would hide the distribution of that name that transformers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_package_is_in_the_wheel() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(setup["packages"]) == on_disk | {"sdxl_cli._presets"}
    folders = {path.parent for path in MODULES.values()}
    assert folders == {path.parent for path in MODULES.values() if path.name == "__init__.py"}


@each_source
def test_functions_fit_on_a_screen_and_modules_in_an_evening(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    for function in functions(parsed(path)):
        # the flags of a subcommand are a table, however many there are
        first = function.body[0].lineno if "commands" in path.parts else function.lineno
        assert function.end_lineno is not None
        length = function.end_lineno - first + 1
        assert length <= 60, f"{function.name} has {length} lines"


@each_module
def test_what_is_public_says_what_it_is(name: str) -> None:
    tree = parsed(MODULES[name])
    assert ast.get_docstring(tree), f"{name} has no docstring"
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    bodies = [tree.body, *(cls.body for cls in classes)]
    public = classes + [
        node
        for body in bodies
        for node in body
        if isinstance(node, Function) and not node.name.startswith("_")
    ]
    silent = [
        node.name
        for node in public
        if not ast.get_docstring(node) and "overload" not in map(ast.unparse, node.decorator_list)
    ]
    assert not silent, f"{name}: no docstring on {', '.join(silent)}"


@each_module
def test_annotations_are_text(name: str) -> None:
    """``from __future__ import annotations`` wherever there is code, so that a type costs no import."""
    tree = parsed(MODULES[name])
    if any(isinstance(node, Function | ast.ClassDef) for node in tree.body):
        assert "__future__" in set(imported(iter(tree.body))), name


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    place = re.compile(r"(?<![\w./~-])/(work|farm|root|home/\w+|tmp/w)/")
    folders = ("sdxl_cli", "kernels", "presets", "tests", "tools", "benchmarks", "docs")
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = [p for p in (*inside, *ROOT.glob("*")) if p.suffix in (".py", ".md", ".toml", ".json")]
    found = [str(p.relative_to(ROOT)) for p in texts if place.search(p.read_text(encoding="utf-8"))]
    assert not found, f"machine paths in {', '.join(found)}"


def test_readme_and_ci_run_the_tests_in_the_same_words() -> None:
    words = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest"
    assert words in (ROOT / "README.md").read_text(encoding="utf-8")
    assert words in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_lists_the_exit_codes_of_the_program() -> None:
    from sdxl_cli.cli import EXIT_CODES

    rows = re.findall(
        r"^\| (\d+) \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(code): meaning for code, meaning in rows} == EXIT_CODES

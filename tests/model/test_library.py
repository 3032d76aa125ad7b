"""What is imported, and what is not: a fresh interpreter tells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_cli.model.library import module_alone

NEVER = [
    "diffusers",
    "open_clip",
    "torchvision",
    "timm",
    "pandas",
    "sklearn",
    "tensorflow",
    "accelerate.commands",
]


def modules_after(code: str) -> set[str]:
    """Names of what is imported when ``code`` has run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_networks_need_torch_and_little_else() -> None:
    """Decoding, encoding and everything in between: none of the text encoders' libraries, no compiler."""
    loaded = modules_after(
        "import sdxl_cli.model.sdxl, sdxl_cli.model.vae_strips, sdxl_cli.generation.pipeline"
    )
    found = loaded & {*NEVER, "transformers", "torch._dynamo", "torch._inductor", "sympy", "scipy"}
    assert not found


def test_the_text_encoders_come_without_the_rest() -> None:
    loaded = modules_after(
        "from sdxl_cli.model.config import TextTowerConfig\n"
        "from sdxl_cli.model.text import ClipLEmbedder, OpenClipEmbedder\n"
        "config = TextTowerConfig(width=16, layers=2, heads=2, embed_dim=8, activation='gelu')\n"
        "OpenClipEmbedder(config), ClipLEmbedder(config)\n"
    )
    assert not loaded & {*NEVER, "transformers", "torch._dynamo", "sympy", "open_clip.transformer"}


def test_a_picture_is_made_without_transformers_and_the_compiler(tmp_path: Path) -> None:
    """The start of a generation, from the command line to the last step."""
    path = str(tmp_path / "picture.png")
    loaded = modules_after(
        "from sdxl_cli import cli\n"
        f"assert cli.run(['generate', 'a red apple', '--steps', '1', '--quiet', '--output', {path!r}]) == 0\n"
    )
    assert not loaded & {*NEVER, "transformers", "torch._dynamo", "torch._inductor", "sympy", "scipy"}


def test_who_imports_the_package_later_gets_all_of_it() -> None:
    loaded = modules_after(
        "from sdxl_cli.model.text import open_clip_towers\n"
        "alone = open_clip_towers()\n"
        "import open_clip, torchvision\n"
        "assert open_clip.create_model and torchvision.ops.nms\n"
        "assert open_clip.transformer.TextTransformer is not alone.TextTransformer\n"
        "assert open_clip_towers() is alone\n"
    )
    assert {"open_clip", "open_clip.transformer", "torchvision.ops.misc"} <= loaded


def test_the_package_that_is_there_already_is_used() -> None:
    import email.mime

    assert module_alone("email.mime.text", ["email", "email.mime"]) is sys.modules["email.mime.text"]
    assert email.mime


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        module_alone("no_such_package.part", ["no_such_package"])
    assert "no_such_package" not in sys.modules

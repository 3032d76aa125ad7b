"""Presets: what a TOML file, --set and flags make of a dataclass, and what is said when they do not fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from sdxl_cli import presets
from sdxl_cli.errors import FileError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Micro:
    crop: tuple[int, int] = (0, 0)
    score: float | None = 6.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    name: str
    steps: int = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    steps: int = 30
    rate: float = 1e-4
    dtype: Literal["fp32", "bf16"] = "fp32"
    sizes: tuple[tuple[int, int], ...] = ()
    folder: Path | None = None
    caption: str = ""
    shuffle: bool = True
    weights: dict[str, float] = field(default_factory=dict)
    micro: Micro = field(default_factory=lambda: Micro(crop=(8, 16)))
    extra: Micro | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    low: int = 0
    high: int = 10

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


def write(folder: Path, text: str, name: str = "file.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_fills_every_kind_of_field(tmp_path: Path) -> None:
    text = """
    steps = 5
    rate = 1
    dtype = "bf16"
    sizes = [[1024, 1024], [832, 1216]]
    folder = "pictures"
    weights = {cat = 1, dog = 0.5}
    [extra]
    score = "none"
    [[stages]]
    name = "low"
    [[stages]]
    name = "high"
    steps = 7
    """
    config = presets.load(write(tmp_path, text), Config)
    assert config.sizes == ((1024, 1024), (832, 1216))
    assert config.rate == 1.0
    assert isinstance(config.rate, float)
    assert config.folder == Path("pictures")
    assert config.weights == {"cat": 1.0, "dog": 0.5}
    assert config.extra == Micro(score=None)
    assert config.stages == (Stage(name="low"), Stage(name="high", steps=7))


def test_a_table_changes_the_default_value_of_its_field_not_of_its_class(tmp_path: Path) -> None:
    assert presets.load(write(tmp_path, "[micro]\nscore = 5"), Config).micro == Micro(crop=(8, 16), score=5.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("step = 3", "file.toml: unknown key 'step'; did you mean steps"),
        ("[micro]\nscor = 3", "file.toml: micro: unknown key 'scor'; did you mean score"),
        ('steps = "many"', "file.toml: steps: expected a whole number, got 'many'"),
        ("steps = true", "file.toml: steps: expected a whole number, got True"),
        ("shuffle = 1", "file.toml: shuffle: expected true or false, got 1"),
        ('dtype = "bf6"', "file.toml: dtype: unknown value 'bf6'; did you mean bf16"),
        ("micro = 3", "file.toml: micro: expected a table, got 3"),
        ("sizes = [[1, 2], [3]]", r"sizes\[1\]: expected a list of 2 values, got \[3\]"),
        ("sizes = 3", "sizes: expected a list, got 3"),
        ("[[stages]]\nsteps = 3", r"stages\[0\]: missing key name"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        presets.load(write(tmp_path, text), Config)


def test_values_that_do_not_go_together_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"file\.toml: low is above high"):
        presets.load(write(tmp_path, "low = 11"), Range)


def test_a_missing_or_broken_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be read"):
        presets.load(tmp_path / "none.toml", Config)
    with pytest.raises(FileError, match="not valid TOML"):
        presets.load(write(tmp_path, "steps ="), Config)
    broken = tmp_path / "bytes.toml"
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="not text"):
        presets.load(broken, Config)


def test_an_unknown_preset_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "preset_dir", lambda: tmp_path)
    write(tmp_path, "steps = 4", "generate-fast.toml")
    write(tmp_path, "", "train.toml")
    assert presets.names() == ["generate-fast", "train"]
    assert presets.names("gen") == ["generate-fast"]
    assert presets.load("generate-fast", Config).steps == 4
    with pytest.raises(UsageError, match="unknown preset 'generate-fsat'; did you mean generate-fast"):
        presets.load("generate-fsat", Config)


def test_a_file_can_extend_another(tmp_path: Path) -> None:
    write(tmp_path, "steps = 4\n[micro]\nscore = 1", "base.toml")
    path = write(tmp_path, 'extends = "base.toml"\nrate = 2\n[micro]\ncrop = [1, 2]')
    config = presets.load(path, Config)
    assert (config.steps, config.rate, config.micro) == (4, 2.0, Micro(crop=(1, 2), score=1.0))
    write(tmp_path, 'extends = "file.toml"', "base.toml")
    with pytest.raises(UsageError, match="extends itself"):
        presets.load(path, Config)


def test_precedence_is_flag_set_config_preset_default(tmp_path: Path) -> None:
    preset = write(tmp_path, "steps = 1\nrate = 1\ndtype = 'bf16'\n[micro]\nscore = 1", "preset.toml")
    config = write(tmp_path, "steps = 2\nrate = 2\n[micro]\nscore = 2", "config.toml")

    def resolve(sets: list[str], flags: dict[str, object]) -> Config:
        return presets.layered(Config, preset=preset, config=config, sets=sets, flags=flags)

    resolved = resolve(["steps=3", "micro.score=3"], {"steps": 4, "rate": None})
    assert resolved == Config(steps=4, rate=2.0, dtype="bf16", micro=Micro(crop=(8, 16), score=3.0))
    with pytest.raises(UsageError, match="command line: folder: expected a path, got 3"):
        resolve([], {"folder": 3})


def test_set_takes_toml_and_bare_words() -> None:
    config = presets.apply_overrides(
        Config(),
        ["steps=5", "dtype=bf16", "caption=a red fox", "sizes=[[1, 2]]", "micro.score=none", "extra.score=2"],
    )
    assert config.dtype == "bf16"
    assert config.caption == "a red fox"
    assert config.sizes == ((1, 2),)
    assert config.micro == Micro(crop=(8, 16), score=None)
    assert config.extra == Micro(score=2.0)


@pytest.mark.parametrize("text", ["steps", "=3", "a b=3", ".steps=3", ""])
def test_set_without_key_and_value_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="expected KEY=VALUE"):
        presets.apply_overrides(Config(), [text])


def test_set_names_the_nearest_key() -> None:
    with pytest.raises(UsageError, match=r"--set micro\.crp=3: micro: unknown key 'crp'; did you mean crop"):
        presets.apply_overrides(Config(), ["micro.crp=3"])


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            caption='a "quoted" \\ line\nand \x7f é', rate=1e22, folder=Path("a b"), weights={"a b": 1e-9}
        ),
        Config(
            extra=Micro(score=None),
            micro=Micro(score=None),
            stages=(Stage(name="x"), Stage(name="y", steps=1)),
        ),
        Config(sizes=((1, 2), (3, 4)), rate=float("inf")),
    ],
)
def test_to_toml_reads_back_equal(config: Config, tmp_path: Path) -> None:
    assert presets.load(write(tmp_path, presets.to_toml(config)), Config) == config

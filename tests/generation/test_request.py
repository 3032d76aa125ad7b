"""Sizes, seeds and limits of what can be asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_cli import presets
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.request import GenerateRequest, RefineRequest, with_seed
from sdxl_cli.generation.sizes import nearest_bucket, output_size, parse_size

PAPER = [(1024, 1024), (768, 1344), (1344, 768), (832, 1216), (1216, 832), (640, 1536)]


@pytest.mark.parametrize("text", ["1216x832", "1216X832", " 1216 x 832 ", "1216×832", "1216*832"])
def test_sizes_are_typed_width_first_and_kept_height_first(text: str) -> None:
    assert parse_size(text, "--size") == (832, 1216)


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("16:9", (768, 1344)),
        ("9:16", (1344, 768)),
        ("1:1", (1024, 1024)),
        ("3/2", (832, 1216)),
        ("2.4:1", (640, 1536)),
    ],
)
def test_a_ratio_is_the_nearest_trained_size(ratio: str, size: tuple[int, int]) -> None:
    assert output_size(ratio, "--size", buckets=PAPER, multiple=32) == size


def test_ratios_are_compared_on_a_logarithmic_scale() -> None:
    """Between 1:1 and 2:1 the middle is 1.414:1, not 1.5:1."""
    assert nearest_bucket(1.45, [(1024, 1024), (512, 1024)]) == (512, 1024)
    assert nearest_bucket(1.40, [(1024, 1024), (512, 1024)]) == (1024, 1024)


@pytest.mark.parametrize("text", ["big", "1024", "1024x", "0x512", "-8x8", "99999x8", "1024x1024x3"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="such as 1216x832"):
        output_size(text, "--size", buckets=PAPER, multiple=32)


def test_a_size_the_model_cannot_make_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--size 1000x830: .* multiples of 32 .* nearest is 992x832"):
        output_size("1000x830", "--size", buckets=PAPER, multiple=32)


def frame(**asked: object) -> object:
    return GenerateRequest(prompt="", **asked).framing((1024, 1024), buckets=PAPER, multiple=32)  # type: ignore[arg-type]


def test_the_model_is_told_the_output_size_unless_asked() -> None:
    framing = frame(size="1216x832")
    assert framing.size == framing.original_size == framing.target_size == (832, 1216)  # type: ignore[attr-defined]
    assert framing.crop_top_left == framing.negative_crop_top_left == (0, 0)  # type: ignore[attr-defined]


def test_negative_sizes_follow_the_positive_ones_unless_asked() -> None:
    framing = frame(original_size="512x256", crop_top_left="3,5", negative_target_size="64x32")
    assert framing.negative_original_size == framing.original_size == (256, 512)  # type: ignore[attr-defined]
    assert framing.negative_crop_top_left == (3, 5)  # type: ignore[attr-defined]
    assert framing.target_size == (1024, 1024)  # type: ignore[attr-defined]
    assert framing.negative_target_size == (32, 64)  # type: ignore[attr-defined]


def test_width_and_height_win_over_size() -> None:
    assert frame(size="1216x832", width=512).size == (832, 512)  # type: ignore[attr-defined]
    assert frame(height=512).size == (512, 1024)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="nearest is 512x832"):
        frame(size="1216x832", width=500)


def test_a_random_seed_is_drawn_once_and_written_down() -> None:
    seeds = {with_seed(GenerateRequest(prompt="", seed=-1)).seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert with_seed(RefineRequest(prompt="", seed=7)).seed == 7


@pytest.mark.parametrize(
    "asked",
    [
        {"steps": 0},
        {"cfg_scale": -1.0},
        {"seed": -2},
        {"num_images": 0},
        {"batch_size": 0},
        {"width": 0},
        {"height": -8},
        {"width": 16385},
        {"seed": 2**63},
        {"refiner_switch_at": 0.0},
    ],
)
def test_values_out_of_range_are_refused_by_name(asked: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(asked))):
        presets.layered(GenerateRequest, preset="generate", flags={"prompt": "", **asked})


def test_the_shipped_presets_say_what_the_classes_default_to() -> None:
    for name, cls in (("generate", GenerateRequest), ("refine", RefineRequest)):
        by_preset = presets.layered(cls, preset=name, flags={"prompt": ""})
        assert by_preset == cls(prompt="")


def test_flags_win_over_set_over_config_over_preset(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('steps = 11\ncfg_scale = 2.0\nsampler = "euler"\n')
    request = presets.layered(
        GenerateRequest,
        preset="generate",
        config=config,
        sets=["steps=12", "cfg_scale=3.0"],
        flags={"prompt": "", "steps": 13, "size": None},
    )
    assert (request.steps, request.cfg_scale, request.sampler, request.scheduler) == (
        13,
        3.0,
        "euler",
        "auto",
    )

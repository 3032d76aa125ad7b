"""The paper's stages as presets: its numbers are in them, and their small versions are versions of them."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.model.config import CONFIGS
from sdxl_cli.presets import layered, load, preset_dir
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.unet_request import require_same_prediction

STAGES = ("pretrain-256", "pretrain-512", "multiaspect", "refiner", "finetune", "lora")


def stage(name: str) -> UNetTrainConfig:
    return load(name, UNetTrainConfig)


def test_stages_have_the_papers_numbers() -> None:
    """arXiv 2307.01952, section 2.5."""
    first, second, third, refiner = (stage(name) for name in STAGES[:4])
    assert (first.loop.max_steps, second.loop.max_steps) == (600_000, 200_000)
    assert {config.loop.total_batch_size for config in (first, second, third)} == {2048}
    assert [config.noise_offset for config in (first, second, third)] == [0.0, 0.0, 0.05]
    assert (refiner.timestep_min, refiner.timestep_max) == (0, 199)
    assert CONFIGS[refiner.model].clip_l is None
    assert CONFIGS[refiner.model].scalars[-1] == "aesthetic_score"


@pytest.mark.parametrize("name", STAGES)
def test_stages_are_of_the_released_size_and_say_where_each_number_is_from(name: str) -> None:
    config = stage(name)
    assert config.model in ("base", "refiner")
    assert config.native_size == 0, "written, it would make a model of the released size look like another"
    assert config.loop.batches_per_step() * config.loop.batch_size == config.loop.total_batch_size
    text = (preset_dir() / f"{name}.toml").read_text()
    assert re.search(r"arXiv 2307\.01952.*section", text, re.DOTALL)


@pytest.mark.parametrize("name", STAGES)
def test_small_versions_differ_in_size_and_length_only(name: str) -> None:
    large, small = asdict(stage(name)), asdict(stage(f"{name}-tiny"))
    assert CONFIGS[small["model"]].unet.model_channels < 100
    assert small["loop"]["batch_size"] * (small["loop"]["accumulate"]) <= 16
    if name == "refiner":  # the bundled refiner's own preset
        assert (small["timestep_min"], small["timestep_max"]) == (0, 199)
        return
    sizes = {"model", "native_size", "train_text_encoders", "loop"}
    if name == "finetune":  # the bundled model's own
        sizes.add("prediction")
    assert {k: v for k, v in large.items() if k not in sizes} == {
        k: v for k, v in small.items() if k not in sizes
    }


def test_the_bundled_model_can_be_fine_tuned_as_its_preset_says() -> None:
    require_same_prediction(locate("bundled", "model"), stage("finetune-tiny"))


def test_flags_beat_sets_beat_the_preset() -> None:
    config = layered(
        UNetTrainConfig,
        preset="multiaspect",
        sets=["noise_offset=0.1", "loop.max_steps=7"],
        flags={"loop.max_steps": 3, "loop.seed": None},
    )
    assert (config.noise_offset, config.loop.max_steps, config.loop.seed) == (0.1, 3, 0)


def test_a_flag_changes_one_rate_of_a_preset_and_leaves_the_others() -> None:
    config = layered(
        UNetTrainConfig,
        preset="lora",
        sets=["loop.optimizer.rates.unet=2e-4"],
        flags={"loop.optimizer.rates.clip_l": 3e-5},
    )
    assert config.loop.optimizer.rates == {"unet": 2e-4, "clip_l": 3e-5, "big_g": 1e-5}

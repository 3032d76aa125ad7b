"""Features of captions that were encoded once train as captions that are encoded as they come."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdxl_cli import cli
from sdxl_cli.errors import UsageError
from sdxl_cli.model.text import OpenClipEmbedder
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from tests.training.small import unet_config


@pytest.fixture
def asked(manifest: Path, base_file: Path, tmp_path: Path) -> UNetRequest:
    return UNetRequest(
        data=manifest,
        output=tmp_path / "live",
        config=frozen(),
        init=str(base_file),
        cache=tmp_path / "latents",
    )


def frozen(**changes: Any) -> Any:
    values = {"train_text_encoders": False, "text_dropout": 0.4, "log_every": 1, "max_steps": 4}
    return unet_config(**values | changes)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("validation_loss")) for line in lines]


def cached(asked: UNetRequest, dtype: str) -> None:
    command = ["cache-dataset", str(asked.data), "-o", str(asked.cache), "--model", str(asked.init)]
    assert cli.run([*command, "--dtype", dtype, "--no-latents", "-q"]) == 0


@pytest.mark.parametrize("mode", ["independent", "joint", "empty"])
def test_a_cached_run_has_the_losses_of_a_run_that_encodes(
    mode: str, asked: UNetRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A validation loss among them. The encoders are not run at all, so that nothing else can have made these."""
    config = frozen(text_dropout_mode=mode, caption_tokens=9)
    asked = replace(asked, config=config, validation=asked.data)
    train_unet(asked)
    cached(asked, "fp32")

    def broken(*args: Any) -> Any:
        raise AssertionError("the text encoder was run")

    monkeypatch.setattr(OpenClipEmbedder, "forward", broken)
    train_unet(replace(asked, output=tmp_path / "cached"))
    assert len(losses(asked.output)) == 5
    # features of a caption alone and in a batch differ by rounding
    assert losses(tmp_path / "cached") == pytest.approx(
        losses(asked.output), rel=3e-6
    )  # lines have six digits


def test_features_are_stored_in_half_and_filled_on_demand(
    asked: UNetRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train_unet(asked)
    filling = frozen(cache_text="fill")
    train_unet(replace(asked, config=filling, output=tmp_path / "filled"))
    assert losses(tmp_path / "filled") == pytest.approx(losses(asked.output), rel=1e-3)
    assert losses(tmp_path / "filled") != losses(asked.output)
    monkeypatch.setattr(OpenClipEmbedder, "forward", None)
    train_unet(replace(asked, output=tmp_path / "found"))
    assert losses(tmp_path / "found") == losses(tmp_path / "filled")


def test_features_of_other_encoders_are_not_used(
    asked: UNetRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sdxl_cli.checkpoint.write import save_model
    from sdxl_cli.model.sdxl import SDXL
    from tests.training.small import SMALL

    save_model(tmp_path / "other.safetensors", SDXL(SMALL), SMALL)
    cached(replace(asked, init=str(tmp_path / "other.safetensors")), "fp16")
    train_unet(asked)
    assert "has no features of 9 of 9 captions by these text encoders" in " ".join(
        capsys.readouterr().err.split()
    )
    train_unet(replace(asked, config=frozen(cache_text="off"), output=tmp_path / "off"))
    assert losses(tmp_path / "off") == losses(asked.output)


def test_a_caption_that_is_too_long_is_told_of_with_a_cache_too(asked: UNetRequest) -> None:
    cached(asked, "fp16")
    with pytest.raises(UsageError, match="caption_tokens = 4 would cut"):
        train_unet(replace(asked, config=frozen(caption_tokens=4)))


def test_latents_that_are_cached_in_another_precision_are_used(
    asked: UNetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "cache-dataset",
        str(asked.data),
        "-o",
        str(asked.cache),
        "--model",
        str(asked.init),
        "--dtype",
        "fp32",
    ]
    assert cli.run([*command, "-q"]) == 0
    monkeypatch.setattr(Autoencoder, "encode", None)
    train_unet(asked)
    assert len(losses(asked.output)) == 4

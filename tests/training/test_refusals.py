"""Runs that must not begin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli import cli
from sdxl_cli.checkpoint.write import save_model, save_vae
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.errors import FileError, SdxlError, UsageError
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.measuring import LargestBatch
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.vae_run import VAERequest, train_vae
from tests.training.files import Train
from tests.training.small import SMALL, unet_config, vae_config


def test_a_used_folder_is_not_trained_into_again(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", 1, False)
    with pytest.raises(UsageError, match="has a run in it; add --resume"):
        train(tmp_path / "run", 2, False)


def test_nothing_can_be_resumed_where_nothing_was_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no run to resume"):
        train(tmp_path / "run", 2, True)


def test_a_state_of_other_sizes_is_refused(request_: UNetRequest, vae_request: VAERequest) -> None:
    train_unet(request_)
    with pytest.raises(FileError, match=r"another run.*task changed"):
        train_vae(replace(vae_request, output=request_.output, resume=True))


def test_a_run_does_not_go_on_with_another_autoencoder(request_: UNetRequest, tmp_path: Path) -> None:
    """Its latents would be another language, of the same shapes."""
    train_unet(replace(request_, config=unet_config(max_steps=1)))
    torch.manual_seed(99)
    save_vae(tmp_path / "other.safetensors", Autoencoder(SMALL.vae), SMALL.vae)
    with pytest.raises(FileError, match=r"another run .vae_weights changed"):
        train_unet(replace(request_, vae=str(tmp_path / "other.safetensors"), cache=None, resume=True))


@pytest.mark.parametrize("flag", ["init", "text_from"])
def test_a_run_does_not_go_on_with_other_frozen_text_encoders(
    flag: str, request_: UNetRequest, base_file: Path, tmp_path: Path
) -> None:
    """They are not in the state, which would be trained on with words in another meaning."""
    make = {"train_text_encoders": False, "ema_decay": 0.0}
    begun = replace(request_, config=unet_config(**make, max_steps=1))
    train_unet(replace(begun, **{flag: str(base_file)}))
    torch.manual_seed(98)
    save_model(tmp_path / "other.safetensors", SDXL(SMALL), SMALL)
    longer = replace(begun, config=unet_config(**make, max_steps=2), resume=True)
    with pytest.raises(FileError, match=r"another run .frozen_weights changed"):
        train_unet(replace(longer, **{flag: str(tmp_path / "other.safetensors")}))
    assert train_unet(replace(longer, **{flag: str(base_file)})).steps == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [({"prediction": "v"}, "prediction"), ({"train_text_encoders": False}, "token_ids")],
)
def test_a_state_of_another_kind_of_run_is_refused(
    change: dict[str, Any], named: str, request_: UNetRequest, base_file: Path
) -> None:
    request_ = replace(request_, init=None if named == "prediction" else str(base_file))
    if named == "token_ids":
        knows = request_.output.parent / "knows.safetensors"
        words = sorted({*Tokenizer.default().encode("a red disc"), 0, 49406, 49407})
        save_model(knows, SDXL(SMALL), SMALL, keep_token_ids=words)
        request_ = replace(request_, init=str(knows))
    train_unet(replace(request_, config=unet_config(max_steps=1)))
    with pytest.raises(FileError, match=f"another run .*{named}"):
        train_unet(replace(request_, config=unet_config(**change), resume=True))


def test_other_captions_are_another_vocabulary(request_: UNetRequest, pictures: Path, tmp_path: Path) -> None:
    """The same number of words in another meaning must not be taken for the same table."""
    train_unet(replace(request_, config=unet_config(max_steps=1)))
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    table = root / "metadata.jsonl"
    table.write_text(table.read_text().replace("disc", "ring"))
    (tmp_path / "b.toml").write_text("[buckets]\nsizes = [[64, 64], [40, 80]]\n")
    other = tmp_path / "other.parquet"
    assert cli.run(["bucket-dataset", str(root), "--preset", str(tmp_path / "b.toml"), "-o", str(other)]) == 0
    with pytest.raises(FileError, match="token_ids changed"):
        train_unet(replace(request_, data=other, resume=True))


def test_a_damaged_state_is_named(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "run", 1, False)
    (path,) = (tmp_path / "run" / "state").rglob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        FileError, match=r"part-00000\.safetensors has \d+ bytes, \d+ were written; no state before"
    ):
        train(tmp_path / "run", 2, True)


def refusal(request: UNetRequest, error: type[SdxlError], text: str) -> None:
    with pytest.raises(error, match=text):
        train_unet(request)
    assert not (request.output / "state").exists()
    assert not (request.output / "latents").exists(), "refused before pictures were encoded"


def test_pictures_without_captions_are_refused(request_: UNetRequest, pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "bare"
    root.mkdir()
    for path in pictures.glob("*.png"):
        (root / path.name).write_bytes(path.read_bytes())
    (tmp_path / "b.toml").write_text("[buckets]\nsizes = [[64, 64], [40, 80]]\n")
    bare = tmp_path / "bare.parquet"
    assert cli.run(["bucket-dataset", str(root), "--preset", str(tmp_path / "b.toml"), "-o", str(bare)]) == 0
    refusal(replace(request_, data=bare, cache=None), UsageError, r"7 of 7 pictures have no caption, 0\.png")


def test_frozen_random_text_encoders_are_refused(request_: UNetRequest) -> None:
    config = unet_config(train_text_encoders=False)
    refusal(
        replace(request_, config=config, cache=None),
        UsageError,
        "needs --text-from FILE, a model with trained text encoders",
    )


def test_going_on_from_a_model_that_says_something_else_is_refused(
    request_: UNetRequest, base_file: Path, tmp_path: Path
) -> None:
    v = tmp_path / "v.safetensors"
    save_model(v, SDXL(SMALL), SMALL, prediction="v", zero_terminal_snr=True)
    request_ = replace(request_, cache=None)
    text = (
        r"v.safetensors|v predicts v, zero terminal SNR, the configuration says eps; give --set prediction=v"
    )
    refusal(replace(request_, init=str(v)), UsageError, text)
    mismatch = unet_config(prediction="v")
    refusal(replace(request_, init=str(v), config=mismatch), UsageError, "--set zero_terminal_snr=true")
    refusal(replace(request_, init=str(base_file), config=mismatch), UsageError, "predicts eps, the config")
    allowed = unet_config(prediction="v", allow_other_prediction=True, max_steps=1)
    assert train_unet(replace(request_, init=str(base_file), config=allowed)).steps == 1


@pytest.mark.parametrize(
    ("preset", "asked"),
    [
        ("pretrain-256", ["--data FILE", "--vae FILE", "--text-from FILE"]),
        ("pretrain-512", ["--data FILE", "--init FILE"]),
        ("multiaspect", ["--data FILE", "--init FILE"]),
        ("refiner", ["--data FILE", "--vae FILE", "--text-from FILE"]),
        ("finetune", ["--data FILE", "--init FILE"]),
    ],
)
def test_a_stage_without_weights_says_in_one_line_what_it_needs(
    preset: str, asked: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["train-unet", "--preset", preset]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert [
        word for word in ("--data FILE", "--init FILE", "--vae FILE", "--text-from FILE") if word in said
    ] == asked
    assert not (tmp_path / "runs").exists()


def test_unknown_models_are_refused_with_the_nearest_name(
    request_: UNetRequest, vae_request: VAERequest
) -> None:
    refusal(
        replace(request_, config=unet_config(model="smal"), cache=None),
        UsageError,
        "'smal'; did you mean small",
    )
    with pytest.raises(UsageError, match="did you mean small"):
        train_vae(replace(vae_request, config=vae_config(model="smal")))


def test_a_missing_autoencoder_is_asked_for(request_: UNetRequest) -> None:
    refusal(replace(request_, vae=None, cache=None), UsageError, "needs --vae FILE")


def test_an_autoencoder_with_other_latents_is_refused(request_: UNetRequest, tmp_path: Path) -> None:
    config = replace(SMALL.vae, z_channels=8)
    save_vae(tmp_path / "wide.safetensors", Autoencoder(config), config)
    refusal(
        replace(request_, vae=str(tmp_path / "wide.safetensors"), cache=None), UsageError, "8 latent channels"
    )


def test_text_encoders_of_another_size_are_refused(request_: UNetRequest, tmp_path: Path) -> None:
    wide = replace(SMALL.big_g, embed_dim=48)
    unet = replace(SMALL.unet, adm_in_channels=SMALL.unet.adm_in_channels + 24)
    config = replace(SMALL, big_g=wide, unet=unet)
    save_model(tmp_path / "other.safetensors", SDXL(config), config)
    refusal(
        replace(request_, text_from=str(tmp_path / "other.safetensors"), cache=None),
        UsageError,
        "has not the text encoders",
    )


def test_crops_larger_than_every_picture_are_refused(vae_request: VAERequest) -> None:
    config = vae_config(crop_sizes=(128,), crop_weights=(1.0,))
    with pytest.raises(UsageError, match="no kept picture is 128 pixels"):
        train_vae(replace(vae_request, config=config))


def test_a_manifest_that_keeps_nothing_has_no_largest_size(manifest: Path) -> None:
    """Of which a plan and a dry run make their batch."""
    read = read_manifest(manifest)
    empty = replace(read, rows=tuple(replace(row, fate="too_small") for row in read.rows))
    with pytest.raises(UsageError, match="the manifest keeps no pictures; look at the fates it gives"):
        LargestBatch.of(empty, 1, SMALL.vae)


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (unet_config, {"text_dropout": 1.5}),
        (unet_config, {"min_snr_gamma": -1.0}),
        (unet_config, {"timestep_max": 1000}),
        (unet_config, {"ema_decay": 1.0}),
        (unet_config, {"batch_size": 0}),
        (unet_config, {"seed": -1}),
        (unet_config, {"seed": 2**32}),
        (vae_config, {"crop_sizes": (30, 40)}),
        (vae_config, {"crop_weights": (1.0,)}),
    ],
)
def test_values_without_meaning_are_refused(make: Callable[..., Any], change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make(**change)

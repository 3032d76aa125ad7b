"""What runs leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.weights import LoadedWeights
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.presets import load
from sdxl_cli.training.config import OptimizerConfig, UNetTrainConfig
from sdxl_cli.training.images import ManifestImages
from sdxl_cli.training.latents import latent_statistics
from sdxl_cli.training.state import load_state
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from sdxl_cli.training.vae_run import VAERequest, train_vae
from tests.training.files import assert_same_bits, tensors
from tests.training.small import SMALL, SMALL_REFINER, unet_config, vae_config


def test_metrics_are_a_line_of_numbers_every_few_steps(request_: UNetRequest) -> None:
    train_unet(request_)
    lines = [json.loads(line) for line in (request_.output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    names = {"step", "images_per_second", "loss", "grad_norm", "learning_rate", "images", "mse"}
    bins = {f"mse_{low:03d}_{low + 99:03d}" for low in range(0, 1000, 100)}
    assert all(names < line.keys() <= names | bins for line in lines)
    # means of two steps: warm-up over 2, decay over the last 2 of 6
    assert [line["learning_rate"] for line in lines] == pytest.approx([7.5e-4, 1e-3, 7.5e-4])


def test_the_resolved_configuration_is_written_beside_the_result(request_: UNetRequest) -> None:
    train_unet(request_)
    assert load(str(request_.output / "config.resolved.toml"), UNetTrainConfig) == request_.config


def picture(model: SDXL, prompt: str) -> Any:
    request = GenerateRequest(prompt=prompt, seed=0, steps=2, size="64x64", sampler="euler", scheduler="sgm")
    models = Models(base=LoadedWeights(model.eval(), "trained"))
    (made,) = generate(plan_generation(request, model.config), models, console())
    return made.pixels


def load_all(path: Path) -> SDXL:
    return load_model(locate(str(path), "model"), dtype=torch.float32, vae_dtype=torch.float32)


def test_the_written_model_is_loaded_like_any_other_and_makes_a_picture(
    request_: UNetRequest, vae_file: Path
) -> None:
    result = train_unet(request_)
    assert (result.path.name, result.steps) == ("model.safetensors", 6)
    files = locate(str(result.path), "base")
    assert files.config == SMALL
    model = load_all(result.path)
    pixels = picture(model, "a red disc")
    assert pixels.shape == (64, 64, 3)
    assert pixels.std() > 0
    vae = load_vae(locate(str(vae_file), "vae"), dtype=torch.float32)
    assert_same_bits(dict(vae.state_dict()), dict(model.vae.state_dict()))
    known = {*Tokenizer.default().encode("a red green blue yellow disc"), 0, 49406, 49407}
    assert model.known_token_ids == known


def test_the_written_model_is_the_average(request_: UNetRequest) -> None:
    result = train_unet(request_)
    state, _ = load_state(request_.output)
    written = tensors(result.path)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(written[name], state[f"ema.{name}"])
    assert not torch.equal(written[name], state[f"weights.{name}"])


@pytest.mark.parametrize(
    ("prediction", "zero", "keys"),
    [("v", False, {"v_pred"}), ("v", True, {"v_pred", "ztsnr"}), ("x0", False, set())],
)
def test_the_prediction_is_written_down(
    request_: UNetRequest, prediction: Any, zero: bool, keys: set[str]
) -> None:
    """By metadata, and by the tensors other programs look for."""
    config = unet_config(prediction=prediction, zero_terminal_snr=zero, max_steps=1)
    result = train_unet(replace(request_, config=config))
    files = locate(str(result.path), "base")
    assert (files.prediction, files.identity.zero_terminal_snr) == (prediction, zero)
    assert tensors(result.path).keys() & {"v_pred", "ztsnr"} == keys
    assert files.identity.ignored == ()


def test_the_written_model_has_the_scale_of_the_autoencoder_it_was_trained_with(
    request_: UNetRequest, tmp_path: Path
) -> None:
    config = replace(SMALL.vae, scale_factor=0.5, channels=16)
    save_vae(tmp_path / "other.safetensors", Autoencoder(config), config)
    result = train_unet(
        replace(request_, vae=str(tmp_path / "other.safetensors"), config=unet_config(max_steps=1))
    )
    assert locate(str(result.path), "base").config.vae == config
    picture(load_all(result.path), "red")


def test_a_second_stage_starts_from_the_first_and_keeps_its_words(
    request_: UNetRequest, tmp_path: Path
) -> None:
    first = train_unet(replace(request_, config=unet_config(max_steps=2)))
    second = train_unet(
        replace(
            request_, output=tmp_path / "two", init=str(first.path), vae=None, config=unet_config(max_steps=1)
        )
    )
    one, two = load_all(first.path), load_all(second.path)
    assert one.known_token_ids == two.known_token_ids
    distance = max(
        float((a - b).abs().max()) for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )
    assert 0 < distance < 0.01


def test_a_model_that_knows_all_words_keeps_knowing_them(request_: UNetRequest, base_file: Path) -> None:
    """Fine-tuning text encoders on a few captions must not cut the vocabulary of a trained model down."""
    result = train_unet(replace(request_, init=str(base_file), config=unet_config(max_steps=1)))
    model = load_all(result.path)
    assert model.known_token_ids is None
    name = "conditioner.embedders.1.model.token_embedding.weight"
    before = TensorFile(base_file).read(name)
    assert (model.state_dict()[name][20000] - before[20000]).abs().max() < 1e-3


def test_frozen_text_encoders_stay_as_they_are(request_: UNetRequest, base_file: Path) -> None:
    config = unet_config(train_text_encoders=False, max_steps=2)
    result = train_unet(replace(request_, init=str(base_file), config=config))
    before, after = tensors(base_file), tensors(result.path)
    text = [name for name in before if name.startswith("conditioner.")]
    assert all(torch.equal(before[name], after[name]) for name in text)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert not torch.equal(before[name], after[name])


def test_a_refiner_takes_bigg_from_its_base(request_: UNetRequest, tmp_path: Path) -> None:
    base = train_unet(replace(request_, config=unet_config(max_steps=1)))
    config = unet_config(
        model="small-refiner",
        train_text_encoders=False,
        timestep_max=199,
        text_dropout_mode="empty",
        max_steps=2,
    )
    refiner = train_unet(
        replace(request_, output=tmp_path / "refiner", config=config, text_from=str(base.path))
    )
    files = locate(str(refiner.path), "refiner")
    assert files.config == SMALL_REFINER
    mine, theirs = tensors(refiner.path), tensors(base.path)
    for name, value in mine.items():
        if name.startswith("conditioner.embedders.0."):
            assert torch.equal(value, theirs[name.replace("embedders.0", "embedders.1")]), name
    assert torch.equal(mine["sdxl.token_ids"], theirs["sdxl.token_ids"])
    picture(load_all(refiner.path), "a red disc")


def test_pictures_are_encoded_once(request_: UNetRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    train_unet(replace(request_, config=unet_config(max_steps=1)))

    def encode(self: Autoencoder, image: Tensor) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(Autoencoder, "encode", encode)
    train_unet(replace(request_, config=unet_config(max_steps=2), resume=True))


def test_an_autoencoder_is_written_with_normalised_latents(vae_request: VAERequest) -> None:
    result = train_vae(vae_request)
    assert result.path.name == "vae.safetensors"
    vae = load_vae(locate(str(result.path), "vae"), dtype=torch.float32)
    manifest = read_manifest(vae_request.data[0])
    pictures = list(ManifestImages([(manifest, row) for row in manifest.kept]))
    found = latent_statistics(vae, pictures)
    scale = SMALL.vae.scale_factor
    assert [mean * scale for mean in found.channel_mean] == pytest.approx([0] * 4, abs=1e-3)
    assert [std * scale for std in found.channel_std] == pytest.approx([1] * 4, abs=1e-3)
    assert result.scale_factor == scale == pytest.approx(result.measured_scale_factor, rel=1e-3)


def test_an_autoencoder_grows_from_a_file(vae_request: VAERequest, tmp_path: Path) -> None:
    small = train_vae(
        replace(vae_request, output=tmp_path / "f4", config=vae_config(levels=3, normalize_latents=False))
    )
    assert locate(str(small.path), "vae").config.vae.channel_mult == (1, 1, 2)
    grown = train_vae(replace(vae_request, init=str(small.path)))
    assert locate(str(grown.path), "vae").config.vae == SMALL.vae


def test_an_autoencoder_that_is_trained_on_keeps_its_latents(vae_request: VAERequest, vae_file: Path) -> None:
    """Normalising them would make every U-Net that knows them useless."""
    config = vae_config(max_steps=1, optimizer=OptimizerConfig(learning_rate=1e-9))
    result = train_vae(replace(vae_request, init=str(vae_file), config=config))
    before, after = tensors(vae_file), tensors(result.path)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)


def test_pictures_kept_in_memory_are_those_of_the_files(manifest: Path) -> None:
    """Otherwise a run gone on with would see others than one that was never stopped."""
    data = read_manifest(manifest)
    rows = [(data, row) for row in data.kept]
    kept, read = ManifestImages(rows), ManifestImages(rows, keep_bytes=0)
    for index in range(len(rows)):
        first, second = kept[index], kept[index]
        assert torch.equal(first, second)
        assert torch.equal(first, read[index])
    assert len(kept[1:3]) == 2


def test_the_commands_take_these_flags_and_print_the_path(
    manifest: Path, vae_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["loop.max_steps=1", "loop.batch_size=2", "loop.ema_decay=0.5", "model=small"]
    flags = [word for value in sets for word in ("--set", value)]
    vae = ["train-vae", "-d", str(manifest), "-o", "v", *flags, "--learning-rate", "1e-4", "--seed", "5"]
    assert cli.run([*vae, "--set", "crop_sizes=[32]", "--set", "crop_weights=[1.0]", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == "v/vae.safetensors"
    assert len(said["latent_std"]) == 4
    unet = ["train-unet", "-d", str(manifest), "-o", "u", *flags, "--vae", str(vae_file), "--quiet"]
    unet += ["--set", "train_text_encoders=true"]
    assert cli.run(unet) == 0
    assert capsys.readouterr().out.strip() == "u/model.safetensors"
    assert cli.run(unet) == 2
    assert "add --resume" in capsys.readouterr().err
    assert cli.run([*unet, "--resume", "--max-steps", "2"]) == 0
    assert load_state(tmp_path / "u")[1]["step"] == 2

"""``sdxl train-vae`` with everything on: LPIPS, a learned scale, a discriminator; from files to files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.errors import NetworkError, UsageError
from sdxl_cli.metrics.lpips import LPIPS
from sdxl_cli.model.config import CONFIGS
from sdxl_cli.presets import load
from sdxl_cli.training.config import OptimizerConfig
from sdxl_cli.training.images import ManifestImages
from sdxl_cli.training.state import load_state
from sdxl_cli.training.vae_config import AdversarialConfig, VAELossConfig, VAETrainConfig
from sdxl_cli.training.vae_run import VAERequest, train_vae
from sdxl_cli.training.vae_watching import GAP, common_side, middle
from tests.training.files import assert_same_bits, tensors
from tests.training.small import SMALL, vae_config
from tests.training.test_vae import images

FULL = VAELossConfig(
    l2=0.0, perceptual="vgg", perceptual_weight=0.25, learn_logvar=True, reduction="sum", kl=1e-6
)
ADVERSARY = AdversarialConfig(
    weight=0.5, start=1, channels=8, optimizer=OptimizerConfig(learning_rate=1e-3, betas=(0.5, 0.9))
)


@pytest.fixture(scope="session")
def lpips_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random VGG16 and random heads, under the names that the lpips package saves."""
    torch.manual_seed(0)
    model = LPIPS("vgg")
    state = {}
    for name, value in model.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "trunk":
            state[f"net.slice1.{rest}"] = value
        else:
            state[f"lin{rest}.model.1.weight"] = value.reshape(1, -1, 1, 1)
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@pytest.fixture
def request_(vae_request: VAERequest, lpips_weights: Path) -> VAERequest:
    """Three steps of two batches, the discriminator in the last two."""
    return replace(vae_request, config=full(), perceptual_weights=(lpips_weights,))


def full(steps: int = 3, **changes: object) -> VAETrainConfig:
    return vae_config(
        max_steps=steps,
        crop_sizes=(24,),
        crop_weights=(1.0,),
        pixels_per_step=0,
        accumulate=2,
        log_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        loss=FULL,
        adversarial=ADVERSARY,
        **changes,
    )


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_gone_on_with_amid_its_discriminator_is_one_never_stopped(
    request_: VAERequest, tmp_path: Path
) -> None:
    whole = train_vae(replace(request_, output=tmp_path / "one"))
    half = replace(request_, output=tmp_path / "two", config=full(2))
    train_vae(half)
    parts = train_vae(replace(half, config=full(), resume=True))
    assert_same_bits(tensors(whole.path), tensors(parts.path))
    one, two = (load_state(tmp_path / name)[0] for name in ("one", "two"))
    assert_same_bits(one, two)
    assert {"weights.logvar", "weights.disc.main.0.weight", "buffers.disc.main.3.running_mean"} <= one.keys()
    assert "optimizer.exp_avg.disc.main.0.weight" in one
    assert "ema.disc.main.0.weight" not in one
    rates = {"images_per_second"}
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert {k: v for k, v in a.items() if k not in rates} == {
            k: v for k, v in b.items() if k not in rates
        }


def test_metrics_name_every_term_from_the_step_on_that_has_it(request_: VAERequest, vae_file: Path) -> None:
    result = train_vae(request_)
    assert tensors(result.path).keys() == tensors(vae_file).keys(), (
        "what serves the training is not in the file"
    )
    rows = lines(request_.output)
    always = {"loss", "rec", "nll", "l1", "perceptual", "kl", "logvar", "grad_norm", "learning_rate"}
    late = {"g", "adaptive_weight", "disc_loss", "disc_logits_real", "disc_logits_fake", "disc_grad_norm"}
    assert all(always <= row.keys() for row in rows)
    assert [late <= row.keys() for row in rows] == [False, True, True]
    assert rows[0]["logvar"] == 0.0 != rows[2]["logvar"]
    assert rows[1]["rec"] == pytest.approx(rows[1]["l1"] + 0.25 * rows[1]["perceptual"], rel=1e-4)


@pytest.mark.parametrize("adversarial", [AdversarialConfig(), ADVERSARY])
def test_decoder_only_leaves_every_byte_of_the_encoder(
    request_: VAERequest, vae_file: Path, adversarial: AdversarialConfig
) -> None:
    config = full(2, decoder_only=True)
    config = replace(config, adversarial=replace(adversarial, start=0))
    result = train_vae(replace(request_, init=str(vae_file), config=config))
    before, after = tensors(vae_file), tensors(result.path)
    kept = {name for name in before if name.startswith(("encoder.", "quant_conv."))}
    assert_same_bits({name: before[name] for name in kept}, {name: after[name] for name in kept})
    moved = [name for name in before.keys() - kept if not torch.equal(before[name], after[name])]
    assert len(moved) == len(before) - len(kept)
    assert result.scale_factor == SMALL.vae.scale_factor


def test_the_scale_factor_is_measured_stored_and_read_again(vae_request: VAERequest) -> None:
    result = train_vae(replace(vae_request, config=vae_config(max_steps=2, normalize_latents=False)))
    files = locate(str(result.path), "vae")
    vae = load_vae(files, dtype=torch.float32)
    assert vae.config.scale_factor == result.scale_factor == result.measured_scale_factor
    said = json.loads(TensorFile(result.path).metadata["sdxl.latents"])
    assert said["scale_factor"] == pytest.approx(result.scale_factor)
    assert said["channel_std"] == pytest.approx(result.latent_std)
    assert said["pictures"] == 7
    assert result.released_scale_factor == 0.13025


def test_without_weights_the_run_stops_and_says_what_to_do(
    request_: VAERequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    with pytest.raises(NetworkError, match=r"VGG16.*vgg16-397923af\.pth.*--perceptual none") as error:
        train_vae(replace(request_, perceptual_weights=()))
    assert "\n" not in str(error.value)
    assert not request_.output.exists()
    with pytest.raises(UsageError, match="--perceptual is none"):
        train_vae(replace(request_, config=vae_config()))


def test_what_cannot_be_is_refused(vae_request: VAERequest, vae_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"decoder_only keeps a trained encoder; give .* --init"):
        train_vae(replace(vae_request, config=vae_config(decoder_only=True)))
    with pytest.raises(UsageError, match=r"goes on from weights; give .* --init"):
        train_vae(replace(vae_request, config=vae_config(starts_from="weights")))
    with pytest.raises(UsageError, match="the discriminator needs 24 pixels"):
        vae_config(crop_sizes=(16, 32), adversarial=AdversarialConfig(weight=0.5))
    with pytest.raises(UsageError, match="the perceptual loss needs 16 pixels"):
        vae_config(crop_sizes=(8, 32), loss=FULL)
    f4 = train_vae(replace(vae_request, output=tmp_path / "f4", config=vae_config(levels=3, max_steps=1)))
    with pytest.raises(UsageError, match="growing changes the encoder"):
        train_vae(replace(vae_request, init=str(f4.path), config=vae_config(decoder_only=True)))


def test_a_run_goes_on_only_from_what_it_began_with(
    vae_request: VAERequest, vae_file: Path, tmp_path: Path
) -> None:
    """Frozen weights and the scale of latents come from --init, which a state does not hold."""
    vae = load_vae(locate(str(vae_file), "vae"), dtype=torch.float32)
    other, copy = tmp_path / "other.safetensors", tmp_path / "copy.safetensors"
    save_vae(other, {name: value * 0.5 for name, value in vae.state_dict().items()}, vae.config)
    copy.write_bytes(vae_file.read_bytes())
    begun = replace(vae_request, init=str(vae_file), config=vae_config(max_steps=1, decoder_only=True))
    train_vae(begun)
    again = replace(begun, config=vae_config(max_steps=2, decoder_only=True), resume=True)
    with pytest.raises(
        UsageError, match=r"is another autoencoder than the .*vae\.safetensors that the run in"
    ):
        train_vae(replace(again, init=str(other)))
    with pytest.raises(UsageError, match=r"--resume without --init: the .*vae\.safetensors that the run in"):
        train_vae(replace(again, init=None))
    assert train_vae(replace(again, init=str(copy))).scale_factor == SMALL.vae.scale_factor
    assert train_vae(again).steps == 2
    fresh = replace(vae_request, output=tmp_path / "fresh", config=vae_config(max_steps=1))
    train_vae(fresh)
    with pytest.raises(UsageError, match="began from nothing; leave --init out"):
        train_vae(replace(fresh, init=str(vae_file), resume=True))


def test_validation_pictures_may_be_smaller_than_the_largest_crop(vae_request: VAERequest) -> None:
    """Pictures are 64x64 and 40x80: what is drawn is the 40 that all have."""
    config = vae_config(
        max_steps=1, crop_sizes=(64,), crop_weights=(1.0,), pixels_per_step=0, batch_size=1, sample_images=7
    )
    train_vae(replace(vae_request, config=config, validation=vae_request.data[0]))
    drawn = Image.open(vae_request.output / "samples" / "000001.png")
    assert drawn.size == (7 * 40 + 6 * GAP, 3 * 40 + 2 * GAP)


def test_the_side_that_is_drawn_fits_all_pictures_and_the_autoencoder() -> None:
    small, large = torch.zeros(3, 44, 60), torch.zeros(3, 96, 80)
    assert common_side([small, large], 64, 8) == 40
    assert common_side([large], 64, 8) == 64
    assert middle(small, 64).shape == small.shape
    with pytest.raises(UsageError, match="has a side of 4 pixels, the autoencoder needs 8"):
        common_side([large, torch.zeros(3, 4, 16)], 64, 8)


@pytest.mark.parametrize(("there", "picked"), [(7, 7), (399, 200), (1000, 200)])
def test_statistics_are_of_two_hundred_pictures_at_most_one_at_a_time(there: int, picked: int) -> None:
    rows: list[Any] = list(range(there))
    some = ManifestImages(rows).spread(200)
    assert len(some) == picked
    assert some.rows[0] == 0
    assert some.rows[-1] == (picked - 1) * there // picked


def test_presets_have_the_originals_numbers() -> None:
    paper, finetune = (load(name, VAETrainConfig) for name in ("vae-paper", "vae-finetune"))
    assert CONFIGS[paper.model].vae.channels == 128
    assert paper.loop.batches_per_step(processes=8) * paper.loop.batch_size * 8 == 256
    assert paper.loop.ema_decay > 0
    assert (paper.loss.l1, paper.loss.l2, paper.loss.perceptual_weight) == (1.0, 0.0, 0.25)
    assert (paper.adversarial.start, paper.adversarial.weight, paper.adversarial.factor) == (20001, 0.5, 1.0)
    assert paper.loss.learn_logvar
    assert paper.loss.reduction == "sum"
    assert paper.adversarial.loss == "hinge"
    for optimizer in (paper.loop.optimizer, paper.adversarial.optimizer):
        assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (4.5e-6, (0.5, 0.9), 0)
    assert finetune.decoder_only
    assert (finetune.loss.l1, finetune.loss.l2, finetune.loss.perceptual_weight) == (0.0, 1.0, 0.1)
    assert finetune.loop.total_batch_size == 192


@pytest.mark.slow
def test_a_small_autoencoder_learns_four_pictures_by_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command, against a discriminator in the last third; held-out here are the same pictures."""
    config = replace(SMALL, vae=replace(SMALL.vae, channels=16, channel_mult=(1, 2, 2)))
    monkeypatch.setitem(CONFIGS, "memory", config)
    for index, image in enumerate(images(4, 16)):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{index}.png")
    (tmp_path / "buckets.toml").write_text("[buckets]\nsizes = [[16, 16]]\n")
    prepare = ["bucket-dataset", str(tmp_path), "--preset", str(tmp_path / "buckets.toml")]
    assert cli.run([*prepare, "-o", "m.parquet", "-q"]) == 0
    sets = {
        "model": "memory",
        "normalize_latents": "false",
        "crop_sizes": "[16]",
        "crop_weights": "[1.0]",
        "pixels_per_step": "0",
        "adversarial.layers": "2",
        "adversarial.channels": "8",
        "loop.optimizer.decay_steps": "85",
        "loop.optimizer.betas": "[0.9, 0.99]",
        "loss.lowpass": "0",
    }
    flags = ["--batch-size", "4", "--max-steps", "170", "--learning-rate", "6e-3", "--warmup-steps", "10"]
    flags += ["--ema-decay", "0", "--perceptual", "none"]
    flags += ["--disc-scale", "0.1", "--disc-start", "115", "--disc-loss", "vanilla"]
    flags += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = ["train-vae", "-d", "m.parquet", "--validation", "m.parquet", "-o", "run", "-q", *flags]
    assert cli.run(command) == 0
    last = lines(Path("run"))[-1]
    assert last["validation_psnr"] > 30
    assert any("disc_loss" in line for line in lines(Path("run")))
    drawn = np.asarray(Image.open("run/samples/000170.png"))
    assert drawn.shape == (3 * 16 + 8, 4 * 16 + 12, 3)
    top = drawn[:16, :16].astype(float)
    below = drawn[20:36, :16].astype(float)
    assert 10 * np.log10(255**2 / np.mean((top - below) ** 2)) > 28

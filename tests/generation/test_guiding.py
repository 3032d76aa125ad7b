"""What people type about guidance and about what a model predicts, down to the network's batches and the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdxl_cli import cli
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.diffusion.formulation import TERMINAL_SHARE, Formulation, Prediction
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation import guiding
from sdxl_cli.generation.encode import Prompts, encode_prompts, encode_text, guided
from sdxl_cli.generation.guidance_texts import parse_emphasis, parse_interval, scales
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.picture import read_pixels
from sdxl_cli.generation.pipeline import Models, generate
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.generation.conftest import BASE, random_model
from tests.model.peers import BASE as PEER
from tests.model.peers import diffusers_unet, diffusers_vae, randomize, relative

REQUEST = GenerateRequest(prompt="a red guitar", seed=5, steps=10, sampler="euler", scheduler="sgm")
SCHEDULE = NoiseSchedule()
SIGMAS = GRIDS["sgm"](SCHEDULE, 10)
"""At t = 999, 899 … 99."""


class Silent:
    def note(self, text: str) -> None: ...

    warn = note

    def progress(self, items: Any, description: str, *, total: int | None = None) -> Any:
        yield from items


def weights(path: Path) -> FileWeights:
    return FileWeights(
        locate(str(path), "model"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        vae_dtype=torch.float32,
        stays=True,
    )


def guided_timesteps(**asked: Any) -> list[int]:
    guidance = guiding.settle(replace(REQUEST, **asked), SCHEDULE, SIGMAS)
    return [SCHEDULE.index_of(s) for s in SIGMAS[:-1].tolist() if guidance.scale_at(s) != 1]


def test_an_interval_of_shares_is_cut_by_timestep_as_the_refiners_is() -> None:
    assert guided_timesteps(cfg_interval="0.2:0.8") == [799, 699, 599, 499, 399, 299]
    assert guided_timesteps(cfg_interval="0:1") == [999 - 100 * i for i in range(10)]
    low, high = parse_interval("0.2:0.8").sigmas(SCHEDULE)
    for sigma in torch.linspace(0.03, 14, 500).tolist():
        assert (low < sigma <= high) == (200 <= SCHEDULE.index_of(sigma) < 800)


def test_an_interval_of_sigmas_is_open_below_and_closed_above() -> None:
    assert parse_interval("sigma=0.28:5.42").sigmas(SCHEDULE) == (0.28, 5.42)
    expected = [t for t in range(999, 0, -100) if 0.28 < SCHEDULE.sigmas[t] <= 5.42]
    assert guided_timesteps(cfg_interval="sigma=0.28:5.42") == expected
    assert 0 < len(expected) < 10


def test_schedules_by_their_formulas() -> None:
    shares = [i / 9 for i in range(10)]
    for name, expected in {
        "constant": [7.0] * 10,
        "linear": [1 + 6 * (1 - p) for p in shares],
        "linear-up": [1 + 6 * p for p in shares],
        "cosine": [1 + 6 * math.cos(math.pi * p / 2) ** 2 for p in shares],
        "cosine-up": [1 + 6 * math.sin(math.pi * p / 2) ** 2 for p in shares],
        "7,3,5": np.interp(shares, [0, 0.5, 1], [7, 3, 5]).tolist(),
        "1,2,3,4,5,6,7,8,9,10": [float(i) for i in range(1, 11)],
        "4": [4.0] * 10,
    }.items():
        assert scales(name, 7.0, 10) == pytest.approx(expected), name
        guidance = guiding.settle(replace(REQUEST, cfg_scale=7.0, cfg_schedule=name), SCHEDULE, SIGMAS)
        assert [guidance.scale_at(s) for s in SIGMAS[:-1].tolist()] == pytest.approx(expected), name
    assert scales("linear", 7.0, 1) == [7.0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "cfg 5"),
        ({"cfg_scale": 1.0}, "cfg off"),
        ({"cfg_scale": 0.0}, "cfg off"),
        ({"cfg_interval": "0.2:0.8", "cfg_rescale": 0.7}, "cfg 5 in 6 of 10 steps, t=799→299, rescale 0.7"),
        ({"cfg_schedule": "linear"}, "cfg 5→1.44 in 9 of 10 steps, t=999→199"),
        ({"cfg_schedule": "7,3"}, "cfg 7→3"),
    ],
)
def test_guidance_in_words(asked: dict[str, Any], words: str) -> None:
    assert plan_generation(replace(REQUEST, **asked), BASE).guidance == words


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cfg_interval", "0.8:0.2"),
        ("cfg_interval", "0.28:5.42"),
        ("cfg_interval", "0.2"),
        ("cfg_interval", "sigma=a:b"),
        ("cfg_interval", "0:nan"),
        ("cfg_schedule", "linaer"),
        ("cfg_schedule", "7,-1"),
        ("cfg_rescale", 1.5),
        ("cfg_rescale", -0.1),
        ("adm_scale", "1.5:0.8"),
        ("adm_scale", "1.5:0.8:2"),
    ],
)
def test_texts_that_mean_nothing_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} {value}"):
        replace(REQUEST, **{name: value})


def test_outside_the_interval_a_step_costs_one_evaluation(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 steps, guided in 6: 16 instead of 20 pictures go through the U-Net."""
    base, step = weights(models["base"]), UNet.step
    rows: list[int] = []

    def counted(self: UNet, *args: Any) -> Tensor:
        output = step(self, *args)
        rows.append(len(output))
        return output

    monkeypatch.setattr(UNet, "step", counted)
    costs = {}
    for interval in (None, "0.2:0.8"):
        request = replace(REQUEST, cfg_interval=interval)
        plan = plan_generation(request, base.config)
        rows.clear()
        list(generate(plan, Models(base=base), Silent()))
        costs[interval] = list(rows)
    assert costs[None] == [2] * 10
    assert costs["0.2:0.8"] == [1, 1, 2, 2, 2, 2, 2, 2, 1, 1]


def test_the_empty_negative_is_zeros_or_encoded(models: dict[str, Path]) -> None:
    base = weights(models["base"])
    for negative in (None, ""):
        asked = replace(REQUEST, negative_prompt=negative, empty_negative="encode")
        empty = encode_text(base.text(), "", None, base.device)
        found = encode_prompts(asked, base).negative
        assert torch.equal(found.crossattn, empty.crossattn)
        assert torch.equal(found.pooled, empty.pooled)
        assert (
            encode_prompts(replace(asked, empty_negative="zeros"), base).negative.crossattn.abs().max() == 0
        )


def test_the_second_negative_prompt_is_what_big_g_reads(models: dict[str, Path]) -> None:
    base = weights(models["base"])
    width = base.config.clip_l.width if base.config.clip_l else 0
    alone = encode_prompts(replace(REQUEST, negative_prompt_2="blue"), base).negative
    both = encode_text(base.text(), "", "blue", base.device)
    assert torch.equal(alone.crossattn, both.crossattn)
    assert torch.equal(alone.pooled, both.pooled)
    blue = encode_text(base.text(), "blue", None, base.device)
    assert torch.equal(alone.crossattn[..., width:], blue.crossattn[..., width:])
    assert not torch.equal(alone.crossattn[..., :width], blue.crossattn[..., :width])


def test_the_sizes_told_at_first_are_scaled_as_in_fooocus(models: dict[str, Path]) -> None:
    """Original sizes only, in whole pixels, while t > 999 · (1 - share); the rest of the vector stays."""
    base = weights(models["base"])
    request = replace(REQUEST, adm_scale="1.5:0.8:0.3", original_size="67x64")
    plan = plan_generation(request, base.config)
    prompts = encode_prompts(request, base)
    guide = guided(base, prompts, plan.framing, request, plan.sigmas, 1)
    assert guide.emphasis is not None
    for t in (698, 699, 700, 999):
        assert (float(SCHEDULE.sigmas[t]) > guide.emphasis.above) == (t > 999 * 0.7)
    told = replace(request, adm_scale=None, original_size="100x96", negative_original_size="53x51")
    framing = plan_generation(told, base.config).framing
    expected = guided(base, prompts, framing, told, plan.sigmas, 1).vector
    for ours, theirs in zip(guide.emphasis.vector, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert parse_emphasis("1:1:1").above(SCHEDULE) < SCHEDULE.sigmas[1]


class Alone:
    """A U-Net as weights."""

    recorded = None

    def __init__(self, network: nn.Module, formulation: Formulation) -> None:
        self.network, self.formulation, self.config = network, formulation, PEER

    def unet(self) -> nn.Module:
        return self.network


def their_pipeline(network: nn.Module, prediction: Prediction, zero: bool) -> Any:
    scheduler: Any = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        rescale_betas_zero_snr=zero,
    )
    if zero:
        scheduler.alphas_cumprod[-1] = TERMINAL_SHARE
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers_vae(randomize(Autoencoder(PEER.vae)), PEER.vae),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=diffusers_unet(network, PEER),
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(5)
    return pipeline


ASKED = GenerateRequest(
    prompt="",
    cfg_scale=6.0,
    cfg_rescale=0.7,
    original_size="64x96",
    crop_top_left="0,8",
    target_size="40x64",
    negative_original_size="16x32",
    negative_crop_top_left="4,2",
    negative_target_size="80x48",
)
ASKED_OF_THEM = {
    "guidance_scale": 6.0,
    "guidance_rescale": 0.7,
    "original_size": (96, 64),
    "crops_coords_top_left": (0, 8),
    "target_size": (64, 40),
    "negative_original_size": (32, 16),
    "negative_crops_coords_top_left": (4, 2),
    "negative_target_size": (48, 80),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
@pytest.mark.parametrize(("prediction", "zero"), [("eps", False), ("v", True)])
def test_a_guided_run_is_that_of_diffusers_pipeline(prediction: Prediction, zero: bool) -> None:
    """Guidance rescaled, other sizes for the negative side, and the prediction type: every part in one run."""
    network = UNet(PEER.unet)
    randomize(network)
    pipeline = their_pipeline(network, prediction, zero)
    torch.manual_seed(1)
    positive, negative = (
        TextFeatures(torch.randn(1, 9, PEER.unet.context_dim), torch.randn(1, PEER.big_g.embed_dim))
        for _ in range(2)
    )
    sigmas = GRIDS["trailing"](Formulation(prediction, zero).schedule(), 5)
    start = torch.randn(1, 4, 8, 8) * (1 + sigmas[0] ** 2).sqrt()
    theirs: Tensor = pipeline(
        prompt_embeds=positive.crossattn,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.crossattn,
        negative_pooled_prompt_embeds=negative.pooled,
        # theirs starts at sigma · noise on this grid, ours and the original's at sqrt(1 + sigma²) · noise
        latents=start / float(pipeline.scheduler.init_noise_sigma),
        height=64,
        width=64,
        num_inference_steps=5,
        output_type="latent",
        **ASKED_OF_THEM,
    ).images
    model: Any = Alone(network, Formulation(prediction, zero))
    guide = guided(model, Prompts(positive, negative), ASKED.frame((64, 64)), ASKED, sigmas, 1)
    *_, ours = SAMPLERS["euler"].steps(guide, start, sigmas, NoiseStreams([0]))
    error = relative(ours, theirs)
    print(f"{prediction}: {error:.1e}")
    assert error < (3e-4 if zero else 3e-5)


# As a command ---------------------------------------------------------------------------------------


@pytest.fixture
def sdxl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*args: object) -> Any:
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        paths = [Path(line) for line in captured.out.splitlines()]
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, paths=paths)

    return run


@pytest.fixture(scope="session")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v") / "noob.safetensors"
    save_model(path, random_model(BASE, 0), BASE, prediction="v", zero_terminal_snr=True)
    return path


FLAGS = {
    "cfg_rescale": 0.7,
    "cfg_interval": "0.2:0.8",
    "cfg_schedule": "cosine",
    "adm_scale": "1.5:0.8:0.3",
    "empty_negative": "encode",
    "negative_prompt_2": "blue",
    "prediction": "v",
}


def test_every_flag_changes_the_picture_and_is_written_down(sdxl: Any, models: dict[str, Path]) -> None:
    common = ("generate", "a red guitar", "-m", models["base"], "--steps", 3, "--seed", 5)
    plain = sdxl(*common).paths[0]
    given: list[object] = []
    for name, value in FLAGS.items():
        flag = (f"--{name.replace('_', '-')}", value)
        result = sdxl(*common, *flag)
        assert result.code == 0, result.err
        assert not np.array_equal(read_pixels(result.paths[0]), read_pixels(plain)), name
        given += flag
    together = sdxl(*common, *given).paths[0]
    stored = read_record(together)
    assert stored is not None
    assert {name: getattr(stored.request, name) for name in FLAGS} == FLAGS
    assert sdxl("generate", "--from", together).paths[0].read_bytes() == together.read_bytes()


def test_a_v_model_is_known_by_its_keys_and_sampled_from_pure_noise(sdxl: Any, v_model: Path) -> None:
    common = ("generate", "a red guitar", "-m", v_model, "--steps", 4, "--seed", 5, "--scheduler", "sgm")
    result = sdxl(*common)
    assert "noob predicts v, down to pure noise (zero terminal SNR)\n" in result.err
    stored = read_record(result.paths[0])
    assert stored is not None
    assert stored.raw["run"]["prediction"] == "v, zero terminal SNR"
    without = sdxl(*common, "--no-zero-terminal-snr")
    assert "noob predicts v\n" in without.err
    other = sdxl(*common, "--prediction", "eps")
    assert "noob is marked as trained down to pure noise, but predicts the noise" in other.err
    pictures = [read_pixels(found.paths[0]) for found in (result, without, other)]
    assert not any(np.array_equal(pictures[i], pictures[i - 1]) for i in range(3))
    assert sdxl("generate", "--from", result.paths[0]).paths[0].read_bytes() == result.paths[0].read_bytes()


def test_the_flags_do_what_the_keys_do(sdxl: Any, models: dict[str, Path], v_model: Path) -> None:
    common = ("generate", "a red guitar", "--steps", 4, "--seed", 5)
    known = sdxl(*common, "-m", v_model).paths[0]
    told = sdxl(*common, "-m", models["base"], "--prediction", "v", "--zero-terminal-snr").paths[0]
    assert np.array_equal(read_pixels(known), read_pixels(told))


def test_zero_terminal_snr_of_a_noise_predictor_is_refused(sdxl: Any, models: dict[str, Path]) -> None:
    result = sdxl("generate", "x", "-m", models["base"], "--zero-terminal-snr", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("sdxl: --zero-terminal-snr: base predicts the noise")


def test_a_refiner_keeps_its_own_prediction(sdxl: Any, models: dict[str, Path], v_model: Path) -> None:
    """The base's walk goes down to pure noise; the refiner, as released, is asked for the noise at its own levels."""
    result = sdxl(
        "generate", "a red guitar", "-m", v_model, "--refiner", models["refiner"], "--steps", 10, "--seed", 5
    )
    assert result.code == 0
    assert "refiner predicts" not in result.err


def test_refine_follows_the_flags(sdxl: Any, models: dict[str, Path]) -> None:
    picture = sdxl("generate", "a red guitar", "-m", models["base"], "--steps", 2, "--seed", 5).paths[0]
    common = ("refine", picture, "-m", models["refiner"], "--seed", 3, "--steps", 10)
    plain = read_pixels(sdxl(*common).paths[0])
    for flag in (("--cfg-rescale", 0.7), ("--prediction", "v"), ("--negative-prompt-2", "blue")):
        assert not np.array_equal(read_pixels(sdxl(*common, *flag).paths[0]), plain), flag

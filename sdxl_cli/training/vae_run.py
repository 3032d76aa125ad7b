"""``sdxl train-vae``, from files to a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import Manifest, Row, read_manifest
from sdxl_cli.errors import NetworkError, UsageError, unknown
from sdxl_cli.metrics.lpips import LPIPS, load_lpips
from sdxl_cli.model.config import CONFIGS, VAEConfig
from sdxl_cli.model.discriminator import PatchDiscriminator
from sdxl_cli.model.discriminator import initialize as initialize_discriminator
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.growing import grow, initialize
from sdxl_cli.training.images import ManifestImages
from sdxl_cli.training.latents import KEY, LatentStatistics, latent_statistics, normalize_latents
from sdxl_cli.training.loop import Run, Watcher
from sdxl_cli.training.measuring import Measured, measure
from sdxl_cli.training.place import training_device
from sdxl_cli.training.session import session
from sdxl_cli.training.vae_config import VAETrainConfig
from sdxl_cli.training.vae_task import LearnedScale, VAETask, fresh
from sdxl_cli.training.vae_watching import Reconstructions, SaveAutoencoders, VAEValidation, common_side

RESULT = "vae.safetensors"
STATISTICS_IMAGES = 200
RELEASED_SCALE_FACTOR = VAEConfig().scale_factor
"""What every released SDXL model multiplies latents with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAERequest:
    """What ``sdxl train-vae`` was asked for."""

    data: tuple[Path, ...]
    """Manifests of ``sdxl bucket-dataset``."""
    output: Path
    config: VAETrainConfig
    init: str | None = None
    """A VAE to start from; with fewer levels than the model, it is grown."""
    resume: bool = False
    validation: Path | None = None
    """A manifest of held-out pictures, whose reconstructions are measured now and then."""
    perceptual_weights: tuple[Path, ...] = ()
    """Files of LPIPS and its VGG16; what they lack is looked for in the local caches."""


@dataclass(frozen=True, slots=True)
class VAEResult:
    """What came out."""

    path: Path
    steps: int
    loss: float
    latent_mean: list[float]
    """Per channel, of unscaled latents, before normalisation."""
    latent_std: list[float]
    scale_factor: float
    """In the file: latents are multiplied with it."""
    measured_scale_factor: float
    """1 / std of the file's latents."""
    released_scale_factor: float = RELEASED_SCALE_FACTOR


def train_vae(request: VAERequest) -> VAEResult:
    """Train, average, normalise or measure the latents of a new autoencoder, and write the result.

    Raises:
        UsageError, FileError: the request does not fit together.
        NetworkError: the perceptual loss has no weights on this machine.
        NumericError, Interrupted: see :class:`~sdxl_cli.training.loop.Run`.
    """
    config = request.config
    images = _images(request.data, max(config.crop_sizes))
    held_out = _images((request.validation,), 1) if request.validation else None
    perceptual = _perceptual(request, torch.device("cpu"))
    with session(request.output, config, resume=request.resume, shards=False) as here:
        perceptual = perceptual and perceptual.to(here.device)
        torch.manual_seed(config.loop.seed)
        began = origin(request, here.state.values["record"] if here.state else None)
        vae, is_new = build(config, request.init)
        task = _task(vae.to(here.device), images, config, perceptual)
        task.share = here.share
        watchers = _watchers(request, vae, images, held_out, perceptual)
        record = {"task": "vae", **asdict(vae.config), "init": began, "new": is_new}
        run = Run(task, config.loop, request.output, record, watchers, here)
        if here.state:
            run.resume()
        run.train()
        vae.load_state_dict(_own(run.averaged(), vae), strict=False)
        vae.eval().requires_grad_(False)
        return here.world.by_lead(lambda: _finish(request, run, vae, images, is_new))


def try_vae(request: VAERequest) -> Measured:
    """What ``--dry-run`` measures: two steps on the largest crops; nothing is written.

    Raises:
        UsageError, FileError, NetworkError, NumericError: as :func:`train_vae`.
    """
    largest = max(request.config.crop_sizes)
    adversarial = replace(request.config.adversarial, start=0)  # its memory is needed sooner or later
    config = replace(request.config, crop_sizes=(largest,), crop_weights=(1.0,), adversarial=adversarial)
    images = _images(request.data, largest)
    device = training_device(config.loop)
    torch.manual_seed(config.loop.seed)
    vae, _ = build(config, request.init)
    task = _task(vae.to(device), images, config, _perceptual(request, device))
    return measure(task, config.loop, f"{largest}x{largest}")


def _finish(
    request: VAERequest, run: Run, vae: Autoencoder, images: ManifestImages, is_new: bool
) -> VAEResult:
    """Measure the latents, bring those of a new autoencoder to deviation 1, and write the file."""
    sample = images.spread(STATISTICS_IMAGES)
    before = after = latent_statistics(vae, sample)
    if is_new and request.config.normalize_latents:
        normalize_latents(vae, before)
        after = latent_statistics(vae, sample)
    elif is_new:
        vae.config = replace(vae.config, scale_factor=before.scale_factor)
    path = request.output / RESULT
    save_vae(path, vae, vae.config, metadata={KEY: after.to_json()})
    _say(vae.config, after, is_new)
    return VAEResult(
        path,
        run.progress.step,
        run.progress.loss,
        before.channel_mean,
        before.channel_std,
        vae.config.scale_factor,
        after.scale_factor,
    )


def _say(config: VAEConfig, found: LatentStatistics, is_new: bool) -> None:
    kept = "" if is_new else ", kept from --init"
    console().note(
        f"scale factor {config.scale_factor:.5f}{kept}; 1/std of {found.pictures} pictures' latents "
        f"{found.scale_factor:.5f}; SDXL's {RELEASED_SCALE_FACTOR}"
    )


def _task(
    vae: Autoencoder, images: ManifestImages, config: VAETrainConfig, perceptual: LPIPS | None
) -> VAETask:
    """What is trained, on the autoencoder's device."""
    device = vae.quant_conv.weight.device
    fresh(vae)
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    module = LearnedScale(vae, config.loss.logvar) if config.loss.learn_logvar else vae
    discriminator = None
    if config.adversarial.weight:
        discriminator = PatchDiscriminator(
            channels=config.adversarial.channels, layers=config.adversarial.layers
        )
        initialize_discriminator(discriminator)
        fresh(discriminator.to(device))
    names = [row.path for _, row in images.rows]
    return VAETask(module, images, config, names, perceptual, discriminator)


def _watchers(
    request: VAERequest,
    vae: Autoencoder,
    images: ManifestImages,
    held_out: ManifestImages | None,
    perceptual: LPIPS | None,
) -> list[Watcher]:
    """Those that the configuration asks for, in the order of their work."""
    config, found = request.config, list[Watcher]()
    if config.save_model_every:

        def write(path: Path, averaged: Mapping[str, Tensor]) -> None:
            save_vae(path, vae.state_dict() | _own(averaged, vae), vae.config)

        found.append(SaveAutoencoders(write, request.output, config.save_model_every))
    if held_out is not None:
        found.append(VAEValidation(vae, held_out, perceptual, config.validate_every))
    if config.sample_images:
        shown = held_out or images
        step = max(1, len(shown) // config.sample_images)
        some = [shown[i] for i in range(0, len(shown), step)][: config.sample_images]
        side = common_side(some, max(config.crop_sizes), vae.config.downsampling)
        found.append(Reconstructions(vae, some, side, request.output, config.sample_every))
    return found


def _own(averaged: Mapping[str, Tensor], vae: Autoencoder) -> dict[str, Tensor]:
    """Without what serves the training alone."""
    own = dict(vae.named_parameters())
    return {name: value for name, value in averaged.items() if name in own}


def _perceptual(request: VAERequest, device: torch.device) -> LPIPS | None:
    """The perceptual loss that the configuration asks for, with its weights.

    Raises:
        NetworkError, FileError: they are not here, or not what they should be.
        UsageError: weights are given and not wanted.
    """
    net = request.config.loss.perceptual
    if net == "none":
        if request.perceptual_weights:
            raise UsageError(
                "--perceptual-weights are given, but --perceptual is none; give --perceptual vgg"
            )
        return None
    try:
        return load_lpips(net, request.perceptual_weights).to(device)
    except NetworkError as error:
        raise NetworkError(f"{error}; or train without it: --perceptual none") from error


def _images(manifests: Sequence[Path], side: int) -> ManifestImages:
    read = [read_manifest(path) for path in manifests]
    return ManifestImages(large_enough([(manifest, row) for manifest in read for row in manifest.kept], side))


def large_enough(rows: Sequence[tuple[Manifest, Row]], side: int) -> list[tuple[Manifest, Row]]:
    """The rows whose bucket holds a square crop of that side."""
    fitting = [(manifest, row) for manifest, row in rows if min(row.plan.target_size) >= side]
    if not fitting:
        raise UsageError(
            f"no kept picture is {side} pixels on both sides; lower crop_sizes or change buckets"
        )
    if left := len(rows) - len(fitting):
        console().note(f"{left} of {len(rows)} crops are smaller than {side} pixels on a side and left out")
    return fitting


def origin(request: VAERequest, saved: Mapping[str, Any] | None) -> dict[str, str] | None:
    """What a run began with, for its record: which file of an autoencoder; None for nothing.

    A run goes on from no other beginning: what is frozen comes from ``--init``, and whether latents are brought to
    deviation 1 depends on it. A record that does not say is taken as the same.

    Args:
        request: names the file.
        saved: the record of the state that the run goes on from.

    Raises:
        UsageError: the run began with another autoencoder, or with none.
    """
    name = request.init
    asked = {"name": name, "sha256": locate(name, "vae").sha256} if name is not None else None
    began: dict[str, str] | None = saved.get("init", asked) if saved else asked
    if (began and began["sha256"]) == (asked and asked["sha256"]):
        return began
    if began is None:
        raise UsageError(f"--init {name}: the run in {request.output} began from nothing; leave --init out")
    given = f"--init {name} is another autoencoder than" if asked else "--resume without --init:"
    raise UsageError(
        f"{given} the {began['name']} that the run in {request.output} began with; "
        f"give that (sha256 {began['sha256'][:10]}) as --init"
    )


def build(config: VAETrainConfig, init: str | None) -> tuple[Autoencoder, bool]:
    """The autoencoder to train, from nothing, from a file or grown from a smaller one; and whether it is a new one,
    whose latents no U-Net knows yet.

    Raises:
        UsageError: one is needed to start from and none is given, or it does not fit.
    """
    if init is None and (config.starts_from == "weights" or config.decoder_only):
        why = "decoder_only keeps a trained encoder" if config.decoder_only else "this goes on from weights"
        raise UsageError(f"{why}; give the autoencoder with --init FILE")
    wanted = vae_config(config.model)
    if config.levels:
        wanted = replace(wanted, channel_mult=wanted.channel_mult[: config.levels])
    if init is None:
        vae = Autoencoder(wanted)
        initialize(vae)
        return vae, True
    start = load_vae(locate(init, "vae"), dtype=torch.float32)
    if config.starts_from == "weights" or start.config.channel_mult == wanted.channel_mult:
        return start, False
    if config.decoder_only:
        raise UsageError(
            f"--init {init} has {len(start.config.channel_mult)} levels, the model {len(wanted.channel_mult)}: "
            "growing changes the encoder; leave --decoder-only out, or --set starts_from=weights"
        )
    vae = Autoencoder(wanted)
    initialize(vae)
    grow(vae, start.state_dict(), start.config)
    console().note(f"grown from {len(start.config.channel_mult)} levels to {len(wanted.channel_mult)}")
    return vae, True


def vae_config(name: str) -> VAEConfig:
    """The autoencoder of a named configuration.

    Raises:
        UsageError: no configuration has that name.
    """
    if name not in CONFIGS:
        raise unknown("model", name, CONFIGS)
    return CONFIGS[name].vae

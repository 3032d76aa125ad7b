"""``sdxl train-vae``, from files to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.checkpoint.write import save_vae
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import Manifest, Row, read_manifest
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.model.config import CONFIGS, VAEConfig
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.config import VAETrainConfig
from sdxl_cli.training.folder import prepare
from sdxl_cli.training.growing import grow, initialize
from sdxl_cli.training.images import ManifestImages
from sdxl_cli.training.loop import Run
from sdxl_cli.training.measuring import Measured, measure
from sdxl_cli.training.place import training_device
from sdxl_cli.training.vae_task import VAETask, fresh, latent_statistics, normalize_latents

RESULT = "vae.safetensors"
STATISTICS_IMAGES = 200


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


@dataclass(frozen=True, slots=True)
class VAEResult:
    """What came out."""

    path: Path
    steps: int
    loss: float
    latent_mean: list[float]
    """Per channel, of unscaled latents, before normalisation."""
    latent_std: list[float]


def train_vae(request: VAERequest) -> VAEResult:
    """Train, average, normalise the latents of a new autoencoder, and write the result.

    Raises:
        UsageError, FileError: the request does not fit together.
        NumericError, Interrupted: see :class:`~sdxl_cli.training.loop.Run`.
    """
    config = request.config
    manifests = [read_manifest(path) for path in request.data]
    rows = [(manifest, row) for manifest in manifests for row in manifest.kept]
    images = ManifestImages(large_enough(rows, max(config.crop_sizes)))
    device = training_device(config.loop)
    prepare(request.output, config, resume=request.resume)
    torch.manual_seed(config.loop.seed)
    vae, is_new = build(config, request.init)
    vae = fresh(vae.to(device))
    task = VAETask(vae, images, config, [row.path for _, row in images.rows])
    run = Run(task, config.loop, request.output, {"task": "vae", **asdict(vae.config)})
    if request.resume:
        run.resume()
    run.train()
    vae.load_state_dict(run.averaged(), strict=False)
    vae.eval().requires_grad_(False)
    sample = [images[i] for i in range(0, len(images), max(1, len(images) // STATISTICS_IMAGES))]
    mean, std = latent_statistics(vae, sample)
    if config.normalize_latents and is_new:
        normalize_latents(vae, mean.to(device), std.to(device))
    path = request.output / RESULT
    save_vae(path, vae, vae.config)
    return VAEResult(path, run.progress.step, run.progress.loss, mean.tolist(), std.tolist())


def try_vae(request: VAERequest) -> Measured:
    """What ``--dry-run`` measures: two steps on the largest crops; nothing is written.

    Raises:
        UsageError, FileError, NumericError: as :func:`train_vae`.
    """
    largest = max(request.config.crop_sizes)
    config = replace(request.config, crop_sizes=(largest,), crop_weights=(1.0,))
    manifests = [read_manifest(path) for path in request.data]
    rows = [(manifest, row) for manifest in manifests for row in manifest.kept]
    images = ManifestImages(large_enough(rows, largest))
    torch.manual_seed(config.loop.seed)
    vae = fresh(build(config, request.init)[0].to(training_device(config.loop)))
    return measure(VAETask(vae, images, config), config.loop, f"{largest}x{largest}")


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


def build(config: VAETrainConfig, init: str | None) -> tuple[Autoencoder, bool]:
    """The autoencoder to train, from nothing, from a file or grown from a smaller one; and whether it is a new one,
    whose latents no U-Net knows yet.
    """
    wanted = vae_config(config.model)
    if config.levels:
        wanted = replace(wanted, channel_mult=wanted.channel_mult[: config.levels])
    vae = Autoencoder(wanted)
    if init is None:
        initialize(vae)
        return vae, True
    files = locate(init, "vae")
    start = load_vae(files, dtype=torch.float32)
    if start.config.channel_mult == wanted.channel_mult:
        return start, False
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

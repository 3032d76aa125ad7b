"""How well autoencoders give pictures back: PSNR, SSIM, LPIPS and rFID, the paper's Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.read import load_vae
from sdxl_cli.errors import NumericError, UsageError
from sdxl_cli.evaluation.distribution import few, require_two
from sdxl_cli.evaluation.networks import Networks, scattered, to_images, to_levels
from sdxl_cli.evaluation.pictures import Pictures, Pixels
from sdxl_cli.evaluation.scores import Score, mean_score
from sdxl_cli.evaluation.table import USED, Columns, Table
from sdxl_cli.metrics.distances import frechet_distance, gaussian
from sdxl_cli.metrics.similarity import WINDOW, psnr, ssim
from sdxl_cli.model.vae import Autoencoder

METRICS = ("psnr", "ssim", "lpips", "rfid")
PAIRED = METRICS[:3]
"""Those of pairs of pictures."""
Posterior = Literal["mode", "sample"]
POSTERIORS: tuple[Posterior, ...] = get_args(Posterior)
_ORIGINAL, _AGAIN = "pool_original", "pool"


def reconstructed(
    pictures: Pictures,
    files: ModelFiles,
    networks: Networks,
    folder: Path,
    *,
    metrics: Sequence[str],
    batch: int,
    posterior: Posterior = "mode",
    dtype: torch.dtype = torch.float32,
) -> Table:
    """Encode, decode and measure every picture; goes on where it stopped.

    What is measured are 8-bit pictures, as a file would hold them: so the same numbers come out of saved pictures.

    Args:
        pictures: framed to one size.
        files: of the autoencoder.
        networks: have what the metrics need; the autoencoder runs on their device.
        folder: of the table.
        metrics: some of ``METRICS``.
        batch: pictures at once.
        posterior: its mean, or a draw whose noise depends on the picture's number alone.
        dtype: of the autoencoder.

    Raises:
        FileError: the folder was begun with other settings, or no picture can be used.
        UsageError: pictures of this size do not go through the autoencoder or a metric, or are too few for one.
        NumericError: the autoencoder gives NaN or infinity.
    """
    factor = files.config.vae.downsampling
    if pictures.framing.size % factor:
        raise UsageError(f"--size {pictures.framing.size}: has to be a multiple of {factor} for {files.name}")
    if short := too_small(pictures.framing.size, metrics, networks):
        raise UsageError(f"--size {pictures.framing.size}: {short}; give a larger one, or other --metrics")
    if "rfid" in metrics:
        require_two("rFID", len(pictures))
    settings: dict[str, Any] = {
        **pictures.settings(),
        **networks.settings(),
        "batch": batch,
        "metrics": sorted(metrics),
        "vae": {"name": files.name, "sha256": files.sha256},
        "posterior": posterior,
        "dtype": str(dtype).removeprefix("torch."),
    }
    table = Table(folder, len(pictures), settings)
    work = _Work(pictures, files, networks, metrics, posterior, dtype)
    table.fill(work.columns, batch=batch, description=f"reconstruction by {files.name}")
    pictures.require_some(table.unusable())
    return table


class _Work:
    """Measures a batch."""

    def __init__(
        self,
        pictures: Pictures,
        files: ModelFiles,
        networks: Networks,
        metrics: Sequence[str],
        posterior: Posterior,
        dtype: torch.dtype,
    ) -> None:
        self.pictures, self.files, self.networks, self.metrics = pictures, files, networks, metrics
        self.posterior, self.dtype = posterior, dtype
        self._vae: Autoencoder | None = None

    @torch.inference_mode()
    def columns(self, rows: range) -> Columns:
        """The numbers of these pictures."""
        loaded = self.pictures.load(rows)
        used = torch.tensor([pixels is not None for pixels in loaded])
        originals = [pixels for pixels in loaded if pixels is not None]
        numbers = [row for row, pixels in zip(rows, loaded, strict=True) if pixels is not None]
        again = self._again(originals, numbers) if originals else []
        columns = pair_columns(originals, again, self.networks, self.metrics)
        if "rfid" in self.metrics:
            columns[_ORIGINAL] = self.networks.features(originals)[0]
            columns[_AGAIN] = self.networks.features(again)[0]
        return {USED: used.to(torch.uint8)} | {name: scattered(part, used) for name, part in columns.items()}

    def _again(self, originals: list[Pixels], numbers: list[int]) -> list[Pixels]:
        """What the autoencoder makes of them."""
        device = self.networks.flags.device
        if self._vae is None:
            self._vae = load_vae(self.files, dtype=self.dtype, device=device)
        moments = self._vae.encode(to_images(originals).to(device, self.dtype))
        latents = moments.mode()
        if self.posterior == "sample":
            noise = [
                torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(row))
                for row in numbers
            ]
            latents = moments.sample(torch.stack(noise).to(device, self.dtype))
        decoded = self._vae.decode(latents)
        self._require_finite(decoded, numbers)
        return to_levels(decoded)

    def _require_finite(self, decoded: Tensor, numbers: Sequence[int]) -> None:
        """Refuse what 8 bits would show as black or white."""
        finite = decoded.isfinite().flatten(1).all(dim=1).tolist()
        broken = [
            self.pictures.items[row].path for row, whole in zip(numbers, finite, strict=True) if not whole
        ]
        if broken:
            raise NumericError(
                f"--vae {self.files.name} makes NaN or infinity of {broken[0]} in "
                f"{str(self.dtype).removeprefix('torch.')}; use --vae-dtype fp32, or another autoencoder"
            )


def too_small(side: int, metrics: Sequence[str], networks: Networks) -> str | None:
    """Which metric has no number for pictures with so short a side, in words; None when all have."""
    least = {"ssim": WINDOW, "lpips": networks.lpips.least_side if networks.lpips is not None else 0}
    return next(
        (f"{name} needs sides of {least[name]} pixels" for name in metrics if side < least.get(name, 0)), None
    )


def pair_columns(
    originals: Sequence[Pixels], others: Sequence[Pixels], networks: Networks, metrics: Sequence[str]
) -> Columns:
    """PSNR, SSIM and LPIPS of pairs of pictures, as far as they are asked for: [B] each."""
    columns: Columns = {}
    wanted = [name for name in PAIRED if name in metrics]
    if not originals:
        return {name: torch.zeros(0, dtype=torch.float64) for name in wanted}
    one, other = to_images(originals), to_images(others)
    for name in wanted:
        if name == "lpips":
            assert networks.lpips is not None
            device = networks.flags.device
            columns[name] = networks.lpips(one.to(device), other.to(device)).double().cpu()
        else:
            columns[name] = (psnr if name == "psnr" else ssim)(one, other)
    return columns


def pair_scores(table: Table, metrics: Sequence[str]) -> tuple[list[Score], list[str]]:
    """Means over the pictures, and warnings."""
    scores: list[Score] = []
    warnings: list[str] = []
    for name in (name for name in PAIRED if name in metrics):
        values: Tensor = table.column(name)
        if name == "psnr" and not bool(values.isfinite().all()):
            same = int(values.isinf().sum())
            warnings.append(
                f"PSNR: {same} pictures are the same as their originals and are left out of the mean"
            )
            values = values[values.isfinite()]
        if len(values):
            scores.append(mean_score(name.upper(), values, "lower" if name == "lpips" else "higher"))
    return scores, warnings


def reconstruction_scores(table: Table, metrics: Sequence[str]) -> tuple[list[Score], list[str]]:
    """The numbers of one autoencoder, and warnings about them."""
    scores, warnings = pair_scores(table, metrics)
    if "rfid" in metrics:
        require_two("rFID", len(table.rows(_AGAIN)))
        original, again = (gaussian(table.parts(name)) for name in (_ORIGINAL, _AGAIN))
        scores.append(
            Score(
                metric="rFID",
                value=frechet_distance(again, original),
                better="lower",
                pictures=again.count or 0,
                reference=original.count,
            )
        )
        warnings += few("rFID", again.count, original.count)
    return scores, warnings

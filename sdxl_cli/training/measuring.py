"""What a run will need, measured by a step of it."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from sdxl_cli.data.loader import Batch, Latents, kept_rows
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.training.config import LoopConfig
from sdxl_cli.training.loop import Run
from sdxl_cli.training.turns import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a dry run says."""

    size: str
    """WxH in pixels."""
    batch_size: int
    device: str
    memory: int
    """Bytes, the most that was in use at once: of the GPU, else of the process."""
    seconds_per_batch: float
    images_per_second: float
    steps: int
    batches_per_step: int
    seconds: float
    """Of the whole run, if all of it was of this size."""

    def __str__(self) -> str:
        """Two lines for people."""
        minutes, hours, days = (self.seconds / unit for unit in (60, 3600, 86400))
        left = (
            f"{days:.1f} days" if days >= 2 else f"{hours:.1f} hours" if hours >= 2 else f"{minutes:.0f} min"
        )
        each = f" of {self.batches_per_step} batches" if self.batches_per_step > 1 else ""
        return (
            f"{self.size}, batch {self.batch_size} on {self.device}: {self.memory / 2**30:.2f} GiB, "
            f"{self.seconds_per_batch:.3g} s per batch, {self.images_per_second:.3g} images/s\n"
            f"{self.steps} steps{each}: {left} at most, as this is the largest size"
        )


class NoBatches:
    """In the place of batches that are still to come."""

    def batch(self, step: int) -> Batch:
        """Nothing is trained before there are batches."""
        raise AssertionError("the task has no batches yet")


class LargestBatch:
    """The same full batch of one size at every step, with noise for pictures."""

    def __init__(self, size: tuple[int, int], batch_size: int, vae: VAEConfig, caption: str = "") -> None:
        """``size`` is (height, width) in pixels; ``vae`` says how large latents are."""
        self.size = size
        height, width = (side // vae.downsampling for side in self.size)
        generator = torch.Generator().manual_seed(0)  # not the run's randomness
        mean = torch.randn(batch_size, vae.z_channels, height, width, generator=generator) / vae.scale_factor
        self._batch = Batch(
            images=None,
            latents=Latents(mean, torch.full_like(mean, -20.0)),
            captions=[caption] * batch_size,
            original_size=[self.size] * batch_size,
            crop_top_left=[(0, 0)] * batch_size,
            target_size=[self.size] * batch_size,
            aesthetic_score=[6.0] * batch_size,
            ids=["noise"] * batch_size,
            weight=torch.ones(batch_size),
        )

    @classmethod
    def of(cls, manifest: Manifest, batch_size: int, vae: VAEConfig) -> LargestBatch:
        """The largest size of a manifest.

        Raises:
            UsageError: it keeps no pictures.
        """
        row = max(kept_rows(manifest), key=lambda row: row.plan.target_size[0] * row.plan.target_size[1])
        return cls(row.plan.target_size, batch_size, vae, next(iter(row.captions), ""))

    def batch(self, step: int) -> Batch:
        """See :class:`~sdxl_cli.training.unet_task.Batches`."""
        return self._batch


def measure(task: Task, config: LoopConfig, size: str) -> Measured:
    """Train two steps of one batch each, the second against the clock; the task's weights change.

    Args:
        task: whose batches are as large as any of the run.
        config: of the run.
        size: of the pictures, for people.
    """
    device = next(task.module.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with TemporaryDirectory() as folder:
        run = Run(task, replace(config, accumulate=1, total_batch_size=0), Path(folder), {})
        run.advance(0)
        started = time.perf_counter()
        metrics = run.advance(1)
        _wait(device)
        seconds = time.perf_counter() - started
    batches = config.batches_per_step()
    return Measured(
        size=size,
        batch_size=int(metrics["images"]),
        device=str(device),
        memory=_peak(device),
        seconds_per_batch=seconds,
        images_per_second=metrics["images"] / seconds,
        steps=config.max_steps,
        batches_per_step=batches,
        seconds=seconds * batches * config.max_steps,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    """The most bytes in use at once: of tensors on the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

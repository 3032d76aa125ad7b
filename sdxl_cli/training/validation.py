"""The loss on held-out pictures, at noise that is the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from sdxl_cli.console import get as console
from sdxl_cli.data.loader import BatchLoader
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.levels import Levels
from sdxl_cli.training.loop import Run
from sdxl_cli.training.losses import by_level
from sdxl_cli.training.metrics import Mean, merged
from sdxl_cli.training.unet_task import UNetTask

GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, fill 0 … 1 evenly however many there are."""


class Validation:
    """Measures the averaged weights every so many steps: a line of ``validation_…`` in metrics.jsonl.

    Every picture is seen with its whole text at some noise levels spread over those that are trained. Pictures,
    levels and noise are functions of the manifest alone, so that the numbers of two steps, or of two runs on the same
    data at the same batch size over all processes, differ by the weights only.
    """

    def __init__(self, task: UNetTask, batches: BatchLoader, config: UNetTrainConfig) -> None:
        """``batches`` are of the held-out pictures, short ones left short."""
        self.task, self.batches, self.config = task, batches, config

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.config.validate_every and done != run.config.max_steps:
            return
        with run.shown() as module:
            if module is None:
                return
            module.eval()  # without the dropout of a LoRA
            try:
                means = self.measure(module)
            finally:
                module.train()
        run.log.write({"step": done, **{f"validation_{key}": value for key, value in means.items()}})
        console().note(f"step {done}: validation loss {means['loss']:.4f}")

    def measure(self, module: nn.Module) -> dict[str, float]:
        """The mean error, ``loss``, and that of each tenth of the levels, ``mse_000_099`` …"""
        assert isinstance(module, SDXL)
        task = self.task if module is self.task.module else replace(self.task, module=module)
        rows: list[dict[str, float]] = []
        sampler, seen = self.batches.sampler, 0
        for step in range(sampler.batches_per_epoch):
            batch = self.batches.batch(step)
            places = [place for place, weight in zip(batch.places, batch.weight, strict=True) if weight]
            for part in range(self.config.validate_levels if places else 0):
                seed = step // sampler.parts * self.config.validate_levels + part
                levels = self._levels([seen + place for place in places], part)
                errors = task.evaluate(batch, levels, torch.Generator("cpu").manual_seed(seed))
                rows.append(
                    {"loss": Mean(float(errors.mean()), len(errors)), **by_level(errors, levels.index)}
                )
            if step % sampler.parts == sampler.parts - 1:
                seen += sampler.together
        return dict(sorted(merged(rows).items()))

    def _levels(self, numbers: Sequence[int], part: int) -> Levels:
        """Part ``part`` of the levels of pictures by number: each picture at another place of the part."""
        places = (torch.tensor(numbers, dtype=torch.float64) * GOLDEN) % 1.0
        return self.task.drawing.spread(((part + places) / self.config.validate_levels).float())

"""Who looks on while pictures are made: times the stages, shows previews, and tells the console the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from sdxl_cli.generation.observe import Step
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.pipeline import Models, Reporter
from sdxl_cli.generation.preview import LatentColours, Preview, Show, fit_colours
from sdxl_cli.generation.timings import Timings

T = TypeVar("T")


class Onlooker:
    """A reporter that is an observer too."""

    def __init__(
        self,
        report: Reporter,
        *,
        timed: bool = False,
        shows: Iterable[Show] = (),
        interval: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """``shows``: where previews go; without any, none are made. ``timed``: wait for the device at each stage.
        ``check`` is called at each step, and stops the run by raising something.
        """
        self._report, self._timed, self._shows, self._interval = report, timed, tuple(shows), interval
        self._check = check
        self._colours: dict[int, tuple[Models, LatentColours]] = {}
        self._preview: Preview | None = None
        self._device = torch.device("cpu")
        self.timings = Timings(settle=self._settle)

    def note(self, text: str) -> None:
        """See :class:`Reporter`."""
        self._report.note(text)

    def warn(self, text: str) -> None:
        """See :class:`Reporter`."""
        self._report.warn(text)

    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """See :class:`Reporter`."""
        for item in self._report.progress(items, description, total=total):
            self._check()
            yield item

    def begin(self, models: Models) -> None:
        """Pictures of these models are next; their colours are looked up when previews are wanted."""
        self._device = models.base.device
        if not self._shows:
            return
        if id(models) not in self._colours:
            with self.stage("vae"):
                self._colours[id(models)] = (models, fit_colours(models.base.vae()))
            models.base.release()
        self._preview = Preview(self._colours[id(models)][1], self._show, self._interval)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """See :class:`Observer`."""
        with self.timings.stage(name):
            yield

    def step(self, step: Step) -> None:
        """See :class:`Observer`."""
        self.timings.step()
        if self._preview is not None:
            self._preview.step(step)

    def _show(self, pixels: Pixels) -> None:
        for show in self._shows:
            show(pixels)

    def _settle(self) -> None:
        if self._timed and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

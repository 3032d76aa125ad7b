"""Where the lines of metrics.jsonl also go: TensorBoard and Weights & Biases, where they are installed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.training.metrics import Sink

WANDB_FILE = "wandb.json"
"""In a run's folder: what W&B knows the run by."""


class TensorBoard:
    """Scalars in ``tensorboard/``, a curve for every number."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """``step``: that the run goes on from; curves are cut off there."""
        writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, float]) -> None:
        """See :class:`~sdxl_cli.training.metrics.Sink`."""
        for key, value in line.items():
            if key != "step":
                self._writer.add_scalar(key, value, int(line["step"]))
        self._writer.flush()

    def close(self) -> None:
        """See :class:`~sdxl_cli.training.metrics.Sink`."""
        self._writer.close()


class WandB:
    """A run at Weights & Biases; a resumed one goes on with it. ``WANDB_MODE=offline`` keeps it on the disk."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]) -> None:
        """``settings`` are what W&B shows as the configuration."""
        package = _package("wandb", "wandb")
        self._run = package.init(
            project="sdxl",
            name=folder.resolve().name,
            dir=str(folder),
            id=_known_as(folder / WANDB_FILE),
            resume="allow",
            config=dict(settings),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, line: Mapping[str, float]) -> None:
        """See :class:`~sdxl_cli.training.metrics.Sink`."""
        self._run.log(dict(line))

    def close(self) -> None:
        """See :class:`~sdxl_cli.training.metrics.Sink`."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def require_trackers(names: tuple[str, ...]) -> None:
    """See that those asked for are there, before anything else takes time.

    Raises:
        UsageError: there is none of a name, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise unknown("tracker in log_to", name, TRACKERS)
        _package(PACKAGES[name], name)


def trackers(names: tuple[str, ...], folder: Path, step: int, settings: Mapping[str, Any]) -> list[Sink]:
    """Begin them; in the process that writes."""
    return [TRACKERS[name](folder, step, settings) for name in names]


def _package(module: str, extra: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(
            f"--log-to {extra} needs {extra}, which is not installed: pip install 'sdxl-cli[{extra}]'"
        ) from error


def _known_as(path: Path) -> str:
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])

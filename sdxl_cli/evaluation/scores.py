"""What a measurement says: numbers with their spread, and what is to be said about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_cli import __version__
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.console import to_jsonable
from sdxl_cli.errors import UsageError, unknown

RESULTS = "results.json"
FEW = 10_000
"""Pictures below which FID is known to be far too high (Heusel et al. 2017 ask for so many at least)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number."""

    metric: str
    value: float
    better: str
    """``higher`` or ``lower``."""
    spread: float | None = None
    spread_is: str = ""
    """What ``spread`` is; ``value`` plus and minus it is no confidence interval of FID, which has none here."""
    pictures: int = 0
    reference: int | None = None
    """Pictures it is compared with; None where there are none, or where nobody knows."""

    def __str__(self) -> str:
        """``24.71 ± 0.05``."""
        return f"{self.value:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that was measured: an autoencoder, a guidance scale, a folder."""

    name: str
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """Numbers somebody published, to be shown beside."""

    source: str
    rows: Mapping[str, Mapping[str, float]]


TABLE_2 = Paper(
    source="SDXL paper (arXiv 2307.01952), Table 2: class-conditional ImageNet 512x512",
    rows={
        "only pictures of 512 pixels and more": {"FID": 43.84, "IS": 110.64},
        "all pictures, not told their size": {"FID": 39.76, "IS": 211.50},
        "all pictures, told their size": {"FID": 36.53, "IS": 215.34},
    },
)
TABLE_3 = Paper(
    source="SDXL paper (arXiv 2307.01952), Table 3: COCO2017 val, 256x256",
    rows={
        "SDXL-VAE": {"PSNR": 24.7, "SSIM": 0.73, "LPIPS": 0.88, "rFID": 4.4},
        "SD-VAE 1.x": {"PSNR": 23.4, "SSIM": 0.69, "LPIPS": 0.96, "rFID": 5.0},
        "SD-VAE 2.x": {"PSNR": 24.5, "SSIM": 0.71, "LPIPS": 0.92, "rFID": 4.7},
    },
)


def mean_score(metric: str, values: Tensor, better: str, *, at_least: float = -math.inf) -> Score:
    """The mean over pictures and its standard error, which is what a bootstrap of the mean converges to.

    Args:
        metric: its name.
        values: [N], one a picture.
        better: ``higher`` or ``lower``.
        at_least: a mean below it is given as it.
    """
    values = values.double()
    error = float(values.std(correction=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Score(
        metric=metric,
        value=max(float(values.mean()), at_least),
        better=better,
        spread=error if error is not None and math.isfinite(error) else None,
        spread_is="standard error of the mean over pictures",
        pictures=len(values),
    )


def parse_metrics(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """``fid,kid`` to names.

    Raises:
        UsageError: an unknown one, or none.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise unknown("metric", name, known)
    if not names:
        raise UsageError(f"--metrics: give some of {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def write_results(
    folder: Path,
    command: str,
    rows: Sequence[Row],
    *,
    settings: Mapping[str, Any],
    warnings: Sequence[str],
    paper: Paper | None,
    unusable: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """Write ``results.json``, or ``results-2.json`` and so on where other results have that name.

    Returns:
        What is in it, and where it is.
    """
    content: dict[str, Any] = to_jsonable(
        {
            "command": command,
            "sdxl": __version__,
            "torch": str(torch.__version__),
            "results": rows,
            "warnings": list(warnings),
            "unusable": list(unusable),
            "settings": settings,
            "paper": paper,
        }
    )
    path = next(path for path in _names(folder) if not path.exists() or _asks(path) == _asked(content))
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return content, path


def _names(folder: Path) -> Iterator[Path]:
    yield folder / RESULTS
    yield from (folder / f"results-{number}.json" for number in count(2))


def _asks(path: Path) -> object:
    """What the results of a file are of; None where it cannot be read."""
    try:
        return _asked(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _asked(content: Mapping[str, Any]) -> object:
    measured = [(row["name"], [score["metric"] for score in row["scores"]]) for row in content["results"]]
    return (content["command"], content["settings"], measured)

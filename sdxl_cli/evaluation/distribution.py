"""A set of pictures against a reference set: FID, KID, Inception score, CLIP score, and what to think of them."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_tensors
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.evaluation.networks import Networks, scattered
from sdxl_cli.evaluation.pictures import Pictures, Pixels
from sdxl_cli.evaluation.scores import FEW, Score, mean_score
from sdxl_cli.evaluation.table import USED, Columns, Table
from sdxl_cli.metrics.distances import (
    IS_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    SEED,
    Gaussian,
    Rows,
    frechet_distance,
    gaussian,
    inception_score,
    kernel_distance,
)
from sdxl_cli.metrics.inception import FEATURES

POOL, LOGITS, CLIP, CUT = "pool", "logits", "clip", "clip_cut"
"""Columns: Inception's features and logits, CLIP's cosine times 100, and whether it read only the text's beginning."""
STATISTICS = (".npz", ".safetensors")
_NOTE = "sdxl.statistics"
"""Key of the settings in a file of statistics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Choices of the metrics that draw at random."""

    kid_subsets: int = KID_SUBSETS
    kid_subset_size: int | None = None
    """None: 1000, or as many as there are."""
    is_splits: int = IS_SPLITS
    seed: int = SEED


@dataclass(frozen=True, slots=True)
class Reference:
    """What pictures are compared with."""

    gaussian: Gaussian
    rows: Rows | None
    """The features; None where a file has only their mean and covariance."""
    settings: Mapping[str, Any]


def measured(
    pictures: Pictures,
    networks: Networks,
    folder: Path,
    *,
    batch: int,
    description: str,
    texts: Sequence[str] | None = None,
) -> Table:
    """Inception's features, and with ``texts`` CLIP's scores, of every picture; goes on where it stopped.

    Args:
        pictures: what to look at.
        networks: have what is asked for.
        folder: of the table.
        batch: pictures at once.
        description: for the progress bar.
        texts: one a picture.

    Raises:
        FileError: the folder was begun with other settings, or no picture can be used.
    """
    settings = {**pictures.settings(), **networks.settings(), **text_settings(texts), "batch": batch}
    table = Table(folder, len(pictures), settings)

    def compute(rows: range) -> Columns:
        loaded = pictures.load(rows)
        used = torch.tensor([pixels is not None for pixels in loaded])
        usable = [pixels for pixels in loaded if pixels is not None]
        columns: Columns = {USED: used.to(torch.uint8)}
        if networks.inception_file is not None:
            features, logits = networks.features(usable)
            columns |= {POOL: scattered(features, used), LOGITS: scattered(logits, used)}
        if texts is not None:
            mine = [texts[row] for row, pixels in zip(rows, loaded, strict=True) if pixels is not None]
            columns |= {
                name: scattered(part, used) for name, part in clip_columns(networks, usable, mine).items()
            }
        return columns

    table.fill(compute, batch=batch, description=description)
    pictures.require_some(table.unusable())
    return table


def text_settings(texts: Sequence[str] | None) -> dict[str, Any]:
    """For the record: which texts pictures were held against, where they were."""
    if texts is None:
        return {}
    return {"texts_sha256": hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()}


def clip_columns(networks: Networks, pictures: Sequence[Pixels], texts: Sequence[str]) -> Columns:
    """What CLIP says of pictures and their texts; without pictures, nothing."""
    if not pictures:
        return {CLIP: torch.zeros(0, dtype=torch.float64), CUT: torch.zeros(0)}
    scores, cut = networks.clip.scores(pictures, texts)
    return {CLIP: scores, CUT: cut.float()}


def reference_of(table: Table, settings: Mapping[str, Any]) -> Reference:
    """A measured set as a reference."""
    return Reference(_gaussian(table), table.rows(POOL), settings)


def scores_of(
    table: Table, metrics: Sequence[str], reference: Reference | None, drawing: Drawing
) -> tuple[list[Score], list[str]]:
    """The numbers, and warnings about them.

    Raises:
        UsageError: a metric cannot be had from so few pictures, or from such a reference.
    """
    scores: list[Score] = []
    warnings: list[str] = []
    if "fid" in metrics:
        assert reference is not None
        found = _gaussian(table)
        counts = (found.count, reference.gaussian.count)
        scores.append(
            Score(
                metric="FID",
                value=frechet_distance(found, reference.gaussian),
                better="lower",
                pictures=found.count or 0,
                reference=reference.gaussian.count,
            )
        )
        warnings += few("FID", *counts)
    if "kid" in metrics:
        assert reference is not None
        score, said = _kid(table, reference, drawing)
        scores.append(score)
        warnings += said
    if "is" in metrics:
        logits = table.rows(LOGITS)
        require_enough(["is"], len(logits), drawing)
        spread = inception_score(logits, splits=drawing.is_splits, seed=drawing.seed)
        scores.append(
            Score(
                metric="IS",
                value=spread.mean,
                better="higher",
                spread=spread.std,
                spread_is=f"deviation over {spread.parts} splits",
                pictures=len(logits),
            )
        )
        if len(logits) < 5000 * drawing.is_splits:
            warnings.append(
                f"IS of {len(logits)} pictures in {spread.parts} splits is biased downwards; the usual number is 50000"
            )
    if "clip" in metrics:
        scores.append(mean_score("CLIP score", table.column(CLIP), "higher", at_least=0.0))
        if cut := int(table.column(CUT).sum()):
            warnings.append(f"CLIP read only the beginning of {cut} texts, which are longer than it can read")
    return scores, warnings


def require_two(metric: str, count: int) -> None:
    """Refuse a Fréchet distance of less: one picture has no covariance."""
    if count < 2:
        raise UsageError(f"{metric} needs at least two pictures; give more, or leave out {metric.lower()}")


def require_enough(metrics: Sequence[str], count: int, drawing: Drawing) -> None:
    """Refuse what would come to nothing with so many pictures, before any is made or measured.

    Raises:
        UsageError: naming the flag that asks for more.
    """
    if "fid" in metrics:
        require_two("FID", count)
    if "kid" in metrics:
        _kid_size(count, None, drawing)
    if "is" in metrics and count < drawing.is_splits:
        raise UsageError(f"--is-splits {drawing.is_splits}: there are only {count} pictures")


def require_comparable(metrics: Sequence[str], count: int, reference: Reference, drawing: Drawing) -> None:
    """The same of what pictures are compared with.

    Raises:
        UsageError: it has no features, or too few.
    """
    if "kid" in metrics:
        _kid_size(count, _features(reference), drawing)


def few(metric: str, count: int | None, reference: int | None) -> list[str]:
    """Warnings about a Fréchet distance of so many pictures, where there are any."""
    numbers = [number for number in (count, reference) if number is not None]
    warnings = []
    if reference is None:
        warnings.append(
            f"the reference does not say how many pictures it is of; {metric} may be biased by it"
        )
    if numbers and min(numbers) <= FEATURES:
        warnings.append(
            f"{metric}: {min(numbers)} pictures are too few for a covariance of {FEATURES} features; the number is "
            "far too high and compares only with others of exactly as many pictures"
        )
    elif numbers and min(numbers) < FEW:
        warnings.append(
            f"{metric} of {min(numbers)} pictures is biased upwards; compare it only with others of as many "
            f"(published ones are of {FEW} and more); KID has no such bias"
        )
    return warnings


def _kid(table: Table, reference: Reference, drawing: Drawing) -> tuple[Score, list[str]]:
    others, rows = _features(reference), table.rows(POOL)
    size = _kid_size(len(rows), others, drawing)
    warnings = []
    if drawing.kid_subset_size is None and size < KID_SUBSET_SIZE:
        warnings.append(
            f"KID: subsets are of {size} pictures, as there are no more; {KID_SUBSET_SIZE} is usual"
        )
    spread = kernel_distance(rows, others, subsets=drawing.kid_subsets, size=size, seed=drawing.seed)
    score = Score(
        metric="KID",
        value=spread.mean,
        better="lower",
        spread=spread.std,
        spread_is=f"deviation over {spread.parts} subsets of {size}",
        pictures=len(rows),
        reference=len(others),
    )
    return score, warnings


def _features(reference: Reference) -> Rows:
    if reference.rows is None:
        raise UsageError(
            "--metrics kid: the statistics have no features; make them with --features, or leave out kid"
        )
    return reference.rows


def _kid_size(count: int, others: Rows | None, drawing: Drawing) -> int:
    """Pictures of a subset; ``others`` is None while they are not known."""
    least = count if others is None else min(count, len(others))
    size = drawing.kid_subset_size or min(KID_SUBSET_SIZE, least)
    if not 2 <= size <= least:
        compared = "" if others is None else f" and {len(others)} to compare"
        raise UsageError(
            f"--kid-subset-size {size}: there are {count} pictures{compared}, and it takes 2 at least; "
            "give more, or leave out kid"
        )
    return size


def _gaussian(table: Table) -> Gaussian:
    require_two("FID", len(table.rows(POOL)))
    return gaussian(table.parts(POOL))


# Files of statistics ------------------------------------------------------------------------------


def write_statistics(path: Path, table: Table, settings: Mapping[str, Any], *, features: bool) -> None:
    """Mean, covariance and count, for later; see :func:`read_statistics`.

    Args:
        path: ``.npz``, which other programs read too, or ``.safetensors``.
        table: measured pictures.
        settings: of how they were measured.
        features: keep those too, 8 KB a picture: KID needs them.

    Raises:
        FileError: it is there already.
        UsageError: another suffix.
    """
    require_free(path)
    found = _gaussian(table)
    note = json.dumps({**settings, "count": found.count}, ensure_ascii=False)
    tensors = {"mu": found.mean, "sigma": found.covariance}
    if features:
        tensors["features"] = table.column(POOL)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors, {_NOTE: note})
        return
    with atomic_write(path, overwrite=False) as temporary:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(temporary, count=np.array(found.count), settings=np.array(note), **arrays)  # type: ignore[arg-type]


def require_free(path: Path) -> None:
    """Refuse a name for statistics that is taken or says another format, before any work is done."""
    if path.suffix not in STATISTICS:
        raise UsageError(f"{path}: statistics are .npz or .safetensors")
    if path.exists():
        raise FileError(f"{path} exists already; choose another name or remove it")


def read_statistics(path: Path, settings: Mapping[str, Any]) -> tuple[Reference, list[str]]:
    """Statistics of a file: ours, or ``mu`` and ``sigma`` in a .npz as pytorch-fid and others write them.

    Args:
        path: the file.
        settings: how the pictures to compare are measured; a file that says it was measured otherwise is refused.

    Returns:
        The reference, and warnings.

    Raises:
        FileError: missing, damaged, or of something else.
        UsageError: measured otherwise.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file of statistics")
    arrays, note = _from_safetensors(path) if path.suffix == ".safetensors" else _from_npz(path)
    mean, covariance = arrays.get("mu"), arrays.get("sigma")
    shapes = [None if part is None else tuple(part.shape) for part in (mean, covariance)]
    if mean is None or covariance is None or shapes != [(FEATURES,), (FEATURES, FEATURES)]:
        raise FileError(
            f"{path}: has no mu [{FEATURES}] and sigma [{FEATURES}, {FEATURES}] of Inception's features"
        )
    warnings = []
    if not note:
        warnings.append(f"{path} does not say how its pictures were measured; it is taken to be as these")
    for name in ("inception", "size", "filter"):
        if note and note.get(name) != settings.get(name):
            raise UsageError(
                f"{path} was measured otherwise ({name}: {note.get(name)}, here {settings.get(name)})"
            )
    count, features = _count(path, note, arrays), arrays.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != FEATURES):
        raise FileError(f"{path}: its features are {list(features.shape)} and not [n, {FEATURES}]")
    rows = _Memory(features) if features is not None else None
    return Reference(
        Gaussian(mean.double(), covariance.double(), count), rows, note or {"statistics": str(path)}
    ), warnings


def _count(path: Path, note: Mapping[str, Any], arrays: Mapping[str, torch.Tensor]) -> int | None:
    """How many pictures the statistics are of, where the file says so."""
    count = note.get("count")
    if count is None and "count" in arrays:
        if arrays["count"].numel() != 1:
            raise FileError(f"{path}: its count is {list(arrays['count'].shape)} and not one number")
        count = int(arrays["count"])
    return count


def _settings(path: Path, text: str) -> dict[str, Any]:
    """What a file says of how its pictures were measured."""
    try:
        note = json.loads(text)
    except ValueError as error:
        raise FileError(
            f"{path}: its settings are not those of sdxl eval statistics; leave the array settings out ({error})"
        ) from error
    if not isinstance(note, dict):
        raise FileError(f"{path}: its settings are not those of sdxl eval statistics; leave them out")
    return note


class _Memory:
    """Features that are in memory."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def take(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> torch.Tensor:
        """See :class:`sdxl_cli.metrics.distances.Rows`."""
        return self._values[torch.from_numpy(indices)]


def _from_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.shapes}, _settings(path, file.metadata.get(_NOTE, "{}"))


def _from_npz(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise FileError(f"{path}: is no whole .npz of plain arrays ({error})") from error
    note = str(arrays.pop("settings", "{}"))
    numbers = {
        name: torch.from_numpy(np.asarray(array))
        for name, array in arrays.items()
        if array.dtype.kind in "fiu"
    }
    return numbers, _settings(path, note)

"""What a checkpoint is, whether all of it is there, and whether it is sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from sdxl_cli import console as consoles
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.identify import CLIP_L, TOKEN_IDS, UNET, VAE, big_g_prefix, compare, is_optional
from sdxl_cli.checkpoint.layouts import Source, prefixed, unet_to_original
from sdxl_cli.checkpoint.read import open_tensors
from sdxl_cli.checkpoint.released import name_of
from sdxl_cli.checkpoint.tensor_file import Renamed, Tensors
from sdxl_cli.checkpoint.vocabulary import Expanded
from sdxl_cli.inspection.scan import NotFinite, Scan, scan_file
from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import ALL_PARTS, BASE, PREFIXES, REFINER, ModelConfig, Part
from sdxl_cli.model.sdxl import SDXL


@dataclass(frozen=True, slots=True)
class PartReport:
    """One network."""

    name: str
    tensors: int
    parameters: int
    """Those that the network uses; a pruned vocabulary counts in full."""
    expected: int | None
    """Of the network this is meant to be; None when that is not known."""
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file and its hashes."""

    path: Path
    size: int
    """Bytes."""
    sha256: str
    autov1: str
    autov2: str
    autov3: str | None
    released: str | None
    """The released file that has this hash."""
    stated_hash_fits: bool | None
    """Whether the bytes are those of ``modelspec.hash_sha256``; None when nothing is stated."""


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """Everything that can be told of a checkpoint without running it."""

    path: Path
    kind: str
    label: str
    layout: str
    size: int
    """Bytes of all files of tensors."""
    prediction: str
    zero_terminal_snr: bool
    tensors: int
    parameters: int
    """Elements of all tensors."""
    dtypes: Mapping[str, int]
    """Elements stored as each dtype."""
    parts: tuple[PartReport, ...]
    kept_tokens: int | None
    """Rows of a pruned vocabulary."""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mis_shaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """Name, shape in the file, shape expected."""
    ignored: tuple[str, ...] = ()
    """Tensors that belong to no part, and stop nobody."""
    not_finite: tuple[NotFinite, ...] = ()
    all_zero: tuple[str, ...] = ()
    files: tuple[FileReport, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def differences(self) -> str:
        """One line on what keeps it from being loaded; empty when nothing does."""
        counts = (
            (self.missing, "missing"),
            ([name for name, *_ in self.mis_shaped], "mis-shaped"),
            (self.unexpected, "unexpected"),
        )
        return "; ".join(
            f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            for names, what in counts
            if names
        )


def inspect_checkpoint(files: ModelFiles) -> CheckpointReport:
    """Look at a checkpoint: its tables of contents at once, then every byte, with a bar.

    Raises:
        FileError: a file is damaged so that it cannot be read.
    """
    stored = open_tensors(files)
    config, tensors = _meant(files, stored)
    expected = _expected(files, config) if config else {}
    complete = Expanded(tensors, config) if config else tensors
    known = tuple(PREFIXES.values())
    ours = {name: shape for name, shape in complete.shapes.items() if name.startswith(known)}
    found = compare(ours, expected) if expected else compare({}, {})
    scans = _scans(files)
    identity = files.identity
    return CheckpointReport(
        path=files.path,
        kind=identity.kind,
        label=identity.label,
        layout="single file" if files.path.is_file() else "diffusers folder",
        size=files.size,
        prediction=identity.prediction,
        zero_terminal_snr=identity.zero_terminal_snr,
        tensors=identity.tensors or len(stored.shapes),
        parameters=sum(prod(shape) for shape in stored.shapes.values()),
        dtypes=_dtypes(stored),
        parts=_parts(config, complete, tensors, expected) if config else (),
        kept_tokens=tensors.shapes[TOKEN_IDS][0] if TOKEN_IDS in tensors.shapes else None,
        missing=found.missing,
        unexpected=found.unexpected,
        mis_shaped=found.mis_shaped,
        ignored=identity.ignored,
        not_finite=tuple(item for scan in scans.values() for item in scan.not_finite),
        all_zero=tuple(name for scan in scans.values() for name in scan.all_zero),
        files=tuple(_file(path, scan, stored.metadata) for path, scan in scans.items()),
        metadata=stored.metadata,
    )


def _scans(files: ModelFiles) -> dict[Path, Scan]:
    with consoles.get().bar(f"reading {files.name}", files.size) as bar:
        return {path: scan_file(path, bar.advance) for path in files.paths}


def _file(path: Path, scan: Scan, metadata: Mapping[str, str]) -> FileReport:
    hashes = scan.hashes
    stated = metadata.get("modelspec.hash_sha256", "").lower().removeprefix("0x")
    return FileReport(
        path=path,
        size=path.stat().st_size,
        sha256=hashes.sha256,
        autov1=hashes.autov1,
        autov2=hashes.autov2,
        autov3=hashes.autov3,
        released=name_of(hashes.sha256),
        stated_hash_fits=stated == hashes.content if stated and hashes.content else None,
    )


def _meant(files: ModelFiles, stored: Tensors) -> tuple[ModelConfig | None, Tensors]:
    """The sizes it is meant to have, None for other architectures; and its tensors under the single file's names."""
    kind = files.identity.kind
    if kind in ("base", "refiner", "inpaint", "vae"):
        return files.config, stored
    if kind == "unet":
        return _meant_unet(files, stored)
    return None, stored


def _meant_unet(files: ModelFiles, stored: Tensors) -> tuple[ModelConfig | None, Tensors]:
    """A U-Net alone, in any of its three forms; known by the width of its conditioning vector."""
    marks = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
    widths = {shape[1] for name, shape in stored.shapes.items() if name.endswith(marks)}
    config = next((config for config in (BASE, REFINER) if {config.unet.adm_in_channels} == widths), None)
    if config is None or any(name.startswith(UNET) for name in stored.shapes):
        return config, stored
    if files.layout == "diffusers":
        return config, Renamed(stored, prefixed(unet_to_original(stored.shapes, config.unet), UNET))
    return config, Renamed(stored, {f"{UNET}{name}": Source((name,)) for name in stored.shapes})


def _expected(files: ModelFiles, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[Part, ...]] = {"vae": ("vae",), "unet": ("unet",)}
    with blank():
        model = SDXL(config, parts.get(files.identity.kind, ALL_PARTS))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _parts(
    config: ModelConfig, complete: Tensors, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]
) -> tuple[PartReport, ...]:
    """Each network that is there or should be."""
    prefixes = {"U-Net": UNET, "VAE": VAE, "bigG": big_g_prefix(config)}
    if config.clip_l:
        prefixes["CLIP-L"] = CLIP_L
    found = []
    for name, prefix in prefixes.items():
        here = [key for key in complete.shapes if key.startswith(prefix)]
        wanted = [key for key in expected if key.startswith(prefix)]
        if here or wanted:
            found.append(
                PartReport(
                    name=name,
                    tensors=len(here),
                    parameters=_count(complete.shapes, here),
                    expected=_count(expected, wanted) if expected else None,
                    dtypes=tuple(sorted({tensors.dtypes[key] for key in here})),
                )
            )
    return tuple(found)


def _count(shapes: Mapping[str, tuple[int, ...]], names: list[str]) -> int:
    return sum(prod(shapes[name]) for name in names if not is_optional(name))


def _dtypes(tensors: Tensors) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, shape in tensors.shapes.items():
        counts[tensors.dtypes[name]] += prod(shape)
    return {dtype: count for dtype, count in counts.most_common() if count}

"""What the subcommands of ``sdxl eval`` share: their flags, where they write, and how they show numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli.console import Cell, Console, to_jsonable
from sdxl_cli.errors import UsageError, unknown

if TYPE_CHECKING:
    from sdxl_cli.evaluation.distribution import Drawing, Reference
    from sdxl_cli.evaluation.networks import NetworkFlags
    from sdxl_cli.evaluation.pictures import Framing
    from sdxl_cli.evaluation.scores import Paper, Row

NETWORKS, DRAWING = "Networks that measure", "What is drawn at random"
_NO_MATTER = (
    *("output", "device", "quiet", "as_json"),
    *("metrics", "reference", "kid_subsets", "kid_subset_size", "is_splits", "metric_seed"),
)
"""Flags that change nothing about pictures and features: those that are there serve whatever is asked of them."""
WARNED = 5
"""Pictures that are named one by one when they cannot be used."""

InceptionWeights = Annotated[
    Path | None,
    typer.Option(
        "--inception-weights",
        help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid or torch-fidelity.",
        metavar="FILE",
        show_default="torch's cache",
        rich_help_panel=NETWORKS,
    ),
]
Resize = Annotated[
    str,
    typer.Option(
        "--resize",
        help="To 299 pixels for Inception: tf1, as the original FID and torch-fidelity; or clean, as clean-fid.",
        metavar="NAME",
        rich_help_panel=NETWORKS,
    ),
]
LpipsWeights = Annotated[
    list[Path] | None,
    typer.Option(
        "--lpips-weights",
        help="LPIPS, or torchvision's VGG16 and LPIPS' own weights; may be repeated.",
        metavar="FILE",
        show_default="torch's cache and the lpips package",
        rich_help_panel=NETWORKS,
    ),
]
LpipsNet = Annotated[
    str, typer.Option("--lpips-net", help="vgg or alex.", metavar="NAME", rich_help_panel=NETWORKS)
]
ClipModel = Annotated[
    str | None,
    typer.Option(
        "--clip-model",
        help="Folder, hub id in the local cache, or with --clip-weights an OpenCLIP architecture such as ViT-g-14.",
        metavar="NAME",
        show_default="openai/clip-vit-large-patch14",
        rich_help_panel=NETWORKS,
    ),
]
ClipWeights = Annotated[
    Path | None,
    typer.Option("--clip-weights", help="File of OpenCLIP.", metavar="FILE", rich_help_panel=NETWORKS),
]
Reference_ = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        "-r",
        help="Pictures to compare with, or their statistics (.npz, .safetensors).",
        metavar="PATH",
    ),
]
Size = Annotated[
    int,
    typer.Option(
        "--size",
        help="Resize the short side to this and cut the middle out; 0: not.",
        metavar="PIXELS",
        min=0,
    ),
]
Filter = Annotated[
    str,
    typer.Option("--filter", help="Pillow's, for --size: bicubic, lanczos, bilinear or box.", metavar="NAME"),
]
Limit = Annotated[
    int, typer.Option("--limit", help="At most so many pictures, evenly spread; 0: all.", metavar="N", min=0)
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", help="Pictures measured at once.", metavar="N", min=1)
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder for results.json and what is measured; a run that stopped goes on from it.",
        metavar="DIR",
        show_default="below evaluations/, the same for the same command",
    ),
]
KidSubsets = Annotated[
    int,
    typer.Option(
        "--kid-subsets",
        help="Pairs of subsets KID is the mean of.",
        metavar="N",
        min=1,
        rich_help_panel=DRAWING,
    ),
]
KidSubsetSize = Annotated[
    int | None,
    typer.Option(
        "--kid-subset-size",
        help="Pictures of a subset.",
        metavar="N",
        show_default="1000, or all there are",
        rich_help_panel=DRAWING,
    ),
]
IsSplits = Annotated[
    int,
    typer.Option("--is-splits", help="Parts IS is the mean of.", metavar="N", min=1, rich_help_panel=DRAWING),
]
MetricSeed = Annotated[
    int,
    typer.Option(
        "--metric-seed",
        help="Of KID's subsets and of the order for IS; torch-fidelity's.",
        metavar="N",
        min=0,
        rich_help_panel=DRAWING,
    ),
]


def choice(value: str, flag: str, known: Sequence[str]) -> Any:
    """A value of few that are allowed."""
    if value not in known:
        raise unknown(flag, value, known)
    return value


def framing(size: int, filter_name: str) -> Framing:
    """From the flags."""
    from sdxl_cli.evaluation.pictures import FILTERS, Framing

    return Framing(size=size, filter=choice(filter_name, "--filter", FILTERS))


def network_flags(given: Mapping[str, Any]) -> NetworkFlags:
    """From the flags that a subcommand has."""
    from sdxl_cli.evaluation.networks import NetworkFlags
    from sdxl_cli.generation.device import pick_device
    from sdxl_cli.metrics.inception import RESIZES
    from sdxl_cli.metrics.lpips import NETS

    return NetworkFlags(
        inception_weights=given.get("inception_weights"),
        resize=choice(given.get("resize", "tf1"), "--resize", RESIZES),
        lpips_weights=tuple(given.get("lpips_weights") or ()),
        lpips_net=choice(given.get("lpips_net", "vgg"), "--lpips-net", NETS),
        clip_model=given.get("clip_model"),
        clip_weights=given.get("clip_weights"),
        device=str(pick_device(given.get("device") or "auto")),
    )


def drawing(given: Mapping[str, Any]) -> Drawing:
    """From the flags."""
    from sdxl_cli.evaluation.distribution import Drawing

    return Drawing(
        kid_subsets=given["kid_subsets"],
        kid_subset_size=given["kid_subset_size"],
        is_splits=given["is_splits"],
        seed=given["metric_seed"],
    )


def place(output: Path | None, kind: str, decides: Mapping[str, Any]) -> Path:
    """``--output``, or a folder that the same command finds again."""
    if output is not None:
        return output
    same = {name: value for name, value in decides.items() if name not in _NO_MATTER}
    return Path("evaluations") / f"{kind}-{_short_hash(same)}"


def _short_hash(settings: Mapping[str, Any]) -> str:
    text = json.dumps(to_jsonable(settings), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def reference(
    given: Mapping[str, Any],
    wanted: Sequence[str],
    frame: Framing,
    folder: Path,
    console: Console,
    *,
    count: int,
) -> tuple[Reference | None, list[str]]:
    """What is compared with, where something is: statistics as they are, pictures after measuring them.

    Returns:
        None where no metric compares; and warnings.

    Raises:
        UsageError: there is nothing to compare with, it was measured otherwise, or a metric cannot be had from
            ``count`` pictures and it.
    """
    from sdxl_cli.evaluation.distribution import require_comparable, require_enough

    require_enough(wanted, count, drawing(given))
    if not {"fid", "kid"} & set(wanted):
        return None, []
    path: Path | None = given["reference"]
    if path is None:
        raise UsageError("FID and KID compare with other pictures: give --reference PATH, or other --metrics")
    found, warnings = _measured_reference(path, given, frame, folder, console)
    require_comparable(wanted, count, found, drawing(given))
    return found, warnings


def _measured_reference(
    path: Path, given: Mapping[str, Any], frame: Framing, folder: Path, console: Console
) -> tuple[Reference, list[str]]:
    from sdxl_cli.evaluation.distribution import STATISTICS, measured, read_statistics, reference_of
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import open_pictures

    networks = Networks(network_flags(given), inception=True)
    if path.suffix in STATISTICS:
        return read_statistics(path, {**frame.settings(), **networks.settings()})
    pictures = open_pictures(path, frame)
    settings = {**pictures.settings(), **networks.settings()}
    # the same pictures may be held against one reference after the other
    own = folder / f"reference-{_short_hash(settings)}"
    table = measured(pictures, networks, own, batch=given["batch_size"], description="reference")
    tell_unusable(pictures.unusable(), console)
    return reference_of(table, settings), []


def tell_unusable(found: Sequence[str], console: Console) -> None:
    """Name the pictures that were left out."""
    for problem in found[:WARNED]:
        console.warn(f"left out: {problem}")
    if len(found) > WARNED:
        console.warn(f"and {len(found) - WARNED} pictures more; results.json has them all")


def show(
    console: Console,
    rows: Sequence[Row],
    *,
    warnings: Sequence[str],
    paper: Paper | None,
    path: Path,
    content: Mapping[str, Any],
) -> None:
    """The table, what was published beside it, warnings, and where the results are."""
    names = list(dict.fromkeys(score.metric for row in rows for score in row.scores))
    marks = {score.metric: "↓" if score.better == "lower" else "↑" for row in rows for score in row.scores}
    body: list[list[Cell]] = []
    for row in rows:
        found = {score.metric: score for score in row.scores}
        count = max((score.pictures for score in row.scores), default=0)
        body.append([row.name, *(str(found[name]) if name in found else None for name in names), count])
    console.table(["", *(f"{name} {marks[name]}" for name in names), "pictures"], body)
    published = (
        []
        if paper is None
        else [[name, *(row.get(key) for key in names)] for name, row in paper.rows.items()]
    )
    if paper is not None and any(any(cell is not None for cell in line[1:]) for line in published):
        console.table(["", *names], published, title=paper.source)
    spreads = {
        score.metric: score.spread_is for row in rows for score in row.scores if score.spread is not None
    }
    for text in dict.fromkeys(spreads.values()):
        console.note(f"±, {', '.join(name for name, says in spreads.items() if says == text)}: {text}")
    for warning in dict.fromkeys(warnings):
        console.warn(warning)
    console.print_result(str(path))
    console.json(content)

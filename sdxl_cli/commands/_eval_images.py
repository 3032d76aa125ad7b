"""``sdxl eval images``: one set of pictures against another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import _measuring as shared
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import Pictures
    from sdxl_cli.evaluation.scores import Score
    from sdxl_cli.evaluation.table import Table

METRICS = ("fid", "kid", "is", "clip", "psnr", "ssim", "lpips")


def command(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="Folder, table, tar or parquet of pictures.", metavar="PICTURES", show_default=False
        ),
    ],
    reference: shared.Reference_ = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics",
            help="Some of fid, kid, is, clip; and of pairs with the same name: psnr, ssim, lpips.",
            metavar="NAMES",
        ),
    ] = "fid,kid,is",
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Texts for CLIP score, one a picture in the order of their names.",
            metavar="FILE",
            show_default="captions beside the pictures, or in them",
        ),
    ] = None,
    size: shared.Size = 0,
    filter_name: shared.Filter = "bicubic",
    limit: shared.Limit = 0,
    batch_size: shared.BatchSize = 16,
    device: shared.Device = "auto",
    output: shared.Output = None,
    inception_weights: shared.InceptionWeights = None,
    resize: shared.Resize = "tf1",
    lpips_weights: shared.LpipsWeights = None,
    lpips_net: shared.LpipsNet = "vgg",
    clip_model: shared.ClipModel = None,
    clip_weights: shared.ClipWeights = None,
    kid_subsets: shared.KidSubsets = 100,
    kid_subset_size: shared.KidSubsetSize = None,
    is_splits: shared.IsSplits = 10,
    metric_seed: shared.MetricSeed = 2020,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure pictures against a reference: FID, KID, IS, CLIP score; or pair by pair: PSNR, SSIM, LPIPS."""
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.evaluation.distribution import measured, scores_of, text_settings
    from sdxl_cli.evaluation.networks import Networks
    from sdxl_cli.evaluation.pictures import open_pictures
    from sdxl_cli.evaluation.reconstruction import PAIRED, pair_scores
    from sdxl_cli.evaluation.scores import Row, parse_metrics, write_results

    wanted = parse_metrics(metrics, METRICS)
    apart = [name for name in wanted if name not in PAIRED]
    pairs = [name for name in wanted if name in PAIRED]
    if pairs and reference is None:
        raise UsageError(f"{', '.join(pairs)} compare pairs of pictures: give --reference FOLDER")
    frame = shared.framing(size, filter_name)
    seen = bool({"fid", "kid", "is"} & set(wanted))
    networks = Networks(
        shared.network_flags(given), inception=seen, lpips="lpips" in wanted, clip="clip" in wanted
    )
    found = open_pictures(pictures, frame, limit)
    texts = _texts(found, prompts) if "clip" in wanted else None
    asked = {**found.settings(), **networks.settings(), **text_settings(texts)}
    # pairs are in a table of their own, whose settings these are
    compared = {"pairs": sorted(pairs), "others": reference} if pairs else {}
    folder = shared.place(output, "images", {**asked, **compared, **given})
    console.note(f"{len(found)} of {found.found} pictures; into {folder}")
    scores: list[Score] = []
    other, warnings = shared.reference(given, wanted, frame, folder, console, count=len(found))
    if apart:
        table = measured(
            found, networks, folder / "pictures", batch=batch_size, description="pictures", texts=texts
        )
        scores, said = scores_of(table, apart, other, shared.drawing(given))
        warnings += said
    if pairs:
        table = _pairs(given, found, networks, folder, pairs)
        paired, said = pair_scores(table, pairs)
        scores += paired
        warnings += said
    shared.tell_unusable(found.unusable(), console)
    rows = [Row(name=str(pictures), scores=tuple(scores))]
    settings = {
        **asked,
        "reference": other.settings if other else reference,
        "drawing": shared.drawing(given),
        "found": found.found,
    }
    content, path = write_results(
        folder,
        "eval images",
        rows,
        settings=settings,
        warnings=warnings,
        paper=None,
        unusable=found.unusable(),
    )
    shared.show(console, rows, warnings=warnings, paper=None, path=path, content=content)


def _pairs(
    given: Mapping[str, Any], pictures: Pictures, networks: Networks, folder: Path, metrics: Sequence[str]
) -> Table:
    """Every picture against the one of the same name."""
    from sdxl_cli.evaluation.pairs import compared
    from sdxl_cli.evaluation.pictures import open_pictures

    others = open_pictures(given["reference"], pictures.framing)
    return compared(pictures, others, networks, folder / "pairs", metrics=metrics, batch=given["batch_size"])


def _texts(pictures: Pictures, prompts: Path | None) -> list[str]:
    from sdxl_cli.evaluation.pictures import read_prompts

    if prompts is not None:
        texts = read_prompts(prompts)
        if len(texts) != len(pictures):
            raise UsageError(f"--prompts {prompts}: has {len(texts)} texts for {len(pictures)} pictures")
        return texts
    captions = pictures.captions()
    if captions is None:
        raise UsageError(
            f"{pictures.source}: not every picture has a caption or says its prompt; give --prompts FILE"
        )
    return captions

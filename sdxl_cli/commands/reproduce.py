"""``sdxl reproduce``: a picture made again and compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Json, Quiet

if TYPE_CHECKING:
    from sdxl_cli.console import Console
    from sdxl_cli.generation.metadata import Stored

PANEL = "Generate"
_NOT_KNOWN = "it does not say"


def command(
    picture: Annotated[
        Path,
        typer.Argument(
            help="A picture by sdxl; also one with A1111's or ComfyUI's metadata.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", "--ckpt", help="Where its model is now.", metavar="FILE"),
    ] = None,
    refiner: Annotated[str | None, typer.Option(help="Where its refiner is now.", metavar="FILE")] = None,
    vae: flags.Vae = None,
    device: flags.Device = None,
    dtype: flags.Dtype = None,
    vae_dtype: flags.VaeDtype = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Keep the new picture: a file.", metavar="FILE"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> int:
    """Make a picture again from what it says, compare all pixels, name what differs."""
    console = consoles.configure(quiet=quiet, json=as_json)
    from sdxl_cli.commands.generate import _buckets, _locate
    from sdxl_cli.commands.refine import _locate as locate_refiner
    from sdxl_cli.generation.jobs import Workshop
    from sdxl_cli.generation.picture import read_pixels, target
    from sdxl_cli.generation.reproduce import compare, differences, remake

    names = ("model", "refiner", "vae", "device", "dtype", "vae_dtype")
    given = dict(zip(names, (model, refiner, vae, device, dtype, vae_dtype), strict=True))
    before = read_pixels(picture)
    place = target(str(output), prefix="sdxl") if output is not None else None
    stored = _stored(picture, given, console)
    shop = Workshop(lambda asked: _locate(asked, console), _buckets, console)
    now, made = remake(picture, stored, shop, lambda asked: locate_refiner(asked, console), console)
    # another program's picture has no record of ours to compare with
    changes = differences(stored, made) if stored.raw else []
    result = compare(before, now)
    if changes:
        rows = [(name, _text(old), _text(new)) for name, old, new in changes]
        console.table(("differs", "in the picture", "now"), rows)
    console.print_result(str(result))
    if not result.identical:
        console.note(f"first difference: {_first(changes)}")
    if place is not None:
        console.note(f"written to {place.save(now, made.request.seed, made.texts())}")
    console.json(
        {
            "picture": picture,
            "identical": result.identical,
            "differences": [{"what": name, "picture": old, "now": new} for name, old, new in changes],
            "comparison": result,
        }
    )
    return 0 if result.identical else 1


def _stored(picture: Path, given: dict[str, Any], console: Console) -> Stored:
    """What the picture says, with the flags on top."""
    from sdxl_cli.commands._recall import again
    from sdxl_cli.generation.metadata import Stored
    from sdxl_cli.generation.recall import recall
    from sdxl_cli.generation.request import RefineRequest
    from sdxl_cli.generation.values import changed

    found = recall(picture)
    if isinstance(found, Stored) and isinstance(found.request, RefineRequest):
        said = {name: value for name, value in given.items() if value is not None and name != "refiner"}
        if given["refiner"] is not None:
            said["model"] = given["refiner"]
        return replace(found, request=changed(found.request, said, "flags"))
    request, stored = again(picture, (), given, console)
    return replace(stored, request=request)


def _first(changes: list[tuple[str, Any, Any]]) -> str:
    if not changes:
        return "none in the settings; the same ones gave other pixels"
    name, old, new = changes[0]
    return f"{name}: {_text(old)} in the picture, {_text(new)} now"


def _text(value: Any) -> str:
    return _NOT_KNOWN if value is None else str(value)

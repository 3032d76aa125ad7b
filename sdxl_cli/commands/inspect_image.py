"""``sdxl inspect-image``: what pictures say about how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet

if TYPE_CHECKING:
    from sdxl_cli.generation.foreign import Foreign
    from sdxl_cli.generation.metadata import Stored

PANEL = "Inspect"


def command(
    pictures: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
    everything: Annotated[
        bool, typer.Option("--all", help="Also settings that are as they are by default.")
    ] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The texts in the file, as they are.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Print what pictures say about how they were made: ours, A1111's and ComfyUI's."""
    console = consoles.configure(quiet=quiet, json=as_json)
    from sdxl_cli.generation.picture import describe, file_texts

    results = []
    for picture in pictures:
        result: dict[str, Any] = {"path": picture, **describe(picture), **_said(picture)}
        result["texts"] = file_texts(picture)
        results.append(result)
        if raw:
            for key, text in result["texts"].items():
                console.print_result(f"{key}:\n{text}")
            continue
        title = f"{picture}: {result['format']}, {result['width']}x{result['height']}, by {result['made_by']}"
        settings = result["settings"] if everything else result["changed"]
        rows = [(name, _text(value)) for name, value in settings.items()]
        rows += [(f"{role} model", _model(model)) for role, model in result["models"].items()]
        rows += [(name, str(value)) for name, value in result["run"].items()]
        console.table(("setting", "value"), rows, title=title)
        for remark in result["not_taken_over"]:
            console.print_result(f"not taken over: {remark}")
    console.json({"pictures": results})


def _said(picture: Path) -> dict[str, Any]:
    """Who made it, all settings, those that are not the default's, models, and what is not understood."""
    from dataclasses import asdict

    from sdxl_cli.generation.foreign import Foreign, all_remarks
    from sdxl_cli.generation.recall import recall

    found: Stored | Foreign | None = recall(picture)
    if found is None:
        return _nothing("nobody who says so")
    models = {role: asdict(model) for role, model in found.models.items()}
    if isinstance(found, Foreign):
        said = _nothing(found.origin) | {"models": models, "not_taken_over": list(all_remarks(found))}
        return said | {"settings": found.fields, "changed": found.fields}
    settings = asdict(found.request)
    defaults = asdict(type(found.request)(prompt=""))
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    run = {"made with": f"sdxl {found.raw.get('sdxl')}", **found.raw.get("run", {})}
    return _nothing(f"sdxl {found.kind}") | {
        "models": models, "settings": settings, "changed": changed, "run": run, "record": dict(found.raw)
    }  # fmt: skip


def _nothing(maker: str) -> dict[str, Any]:
    return {"made_by": maker, "settings": {}, "changed": {}, "models": {}, "run": {}, "not_taken_over": []}


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _model(model: dict[str, Any]) -> str:
    return model["name"] + (f" [{model['sha256'][:10]}]" if model["sha256"] else "")

"""Requests read back from pictures: ``--from`` and ``sdxl reproduce``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl_cli import presets
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.console import Console
    from sdxl_cli.generation.foreign import Foreign
    from sdxl_cli.generation.metadata import Stored
    from sdxl_cli.generation.request import GenerateRequest


def again(
    picture: Path, sets: Sequence[str], asked: Mapping[str, object], console: Console
) -> tuple[GenerateRequest, Stored]:
    """The request a picture was made from, with changes.

    Args:
        picture: made by this program, or by one that writes A1111's or ComfyUI's metadata.
        sets: ``--set`` texts.
        asked: the other flags by field; None is "not given".
        console: hears what could not be taken over from another program.

    Raises:
        UsageError: the picture says nothing, or was made by ``sdxl refine``, or its model is not here.
        FileError: the file is missing or no picture.
    """
    from sdxl_cli.generation.foreign import Foreign
    from sdxl_cli.generation.metadata import Stored
    from sdxl_cli.generation.recall import recall
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.generation.values import changed

    found = recall(picture)
    if found is None:
        raise UsageError(f"{picture}: does not say how it was made; give the prompt and the flags yourself")
    given = {name: value for name, value in asked.items() if value is not None}
    if isinstance(found, Foreign):
        request = _foreign(found, given, picture, console)
        stored = Stored("generate", request, found.models)
    elif not isinstance(found.request, GenerateRequest):
        raise UsageError(
            f"{picture}: was made by sdxl refine, from {found.raw.get('source', {}).get('name')}"
        )
    else:
        request, stored = found.request, found
    return changed(presets.apply_overrides(request, sets), given, "flags"), stored


def _foreign(found: Foreign, given: Mapping[str, object], picture: Path, console: Console) -> GenerateRequest:
    from sdxl_cli.generation.foreign import all_remarks
    from sdxl_cli.generation.request import GenerateRequest

    found.needs_picture(given)
    found.find_models(given, picture.parent)
    console.note(f"{picture.name}: made by {found.origin}")
    for remark in all_remarks(found):
        console.warn(remark)
    # what a flag decides need not be right in the picture
    fields = {name: value for name, value in found.fields.items() if name not in given}
    fields.setdefault("prompt", given.get("prompt", ""))
    fields |= {name: given[name] for name in ("init_img", "mask") if name in given}
    return presets.layered(GenerateRequest, preset="generate", flags=fields)

"""``sdxl decode``: pictures from latents that could not be decoded when they were made."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Json, Quiet

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_cli.console import Console
    from sdxl_cli.generation.picture import Pixels
    from sdxl_cli.generation.request import SamplingRequest

PANEL = "Generate"


def command(
    latents: Annotated[list[Path], typer.Argument(help="Files saved by sdxl generate.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model they are of; default: the one they name.",
            metavar="FILE",
            rich_help_panel=flags.MODEL,
        ),
    ] = None,
    vae: flags.Vae = None,
    device: flags.Device = None,
    vae_dtype: flags.VaeDtype = None,
    vae_tiling: flags.VaeTiling = None,
    winograd: flags.Winograd = None,
    output: flags.Output = None,
    overwrite: flags.Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Decode latents that were saved when memory ran out."""
    changes = {
        name: value
        for name, value in (
            ("model", model),
            ("vae", vae),
            ("device", device),
            ("vae_dtype", vae_dtype),
            ("vae_tiling", vae_tiling),
            ("winograd", winograd),
        )
        if value is not None
    }
    console = consoles.configure(quiet=quiet, json=as_json)

    from sdxl_cli.generation.latents import read_latents
    from sdxl_cli.generation.metadata import parse_record
    from sdxl_cli.generation.picture import target

    made = []
    for path in latents:
        latent, texts = read_latents(path)
        asked = parse_record(texts.record, path).request
        request = presets.from_table(type(asked), asdict(asked) | changes, "flags")
        name = path.name.removesuffix(".safetensors").removesuffix(".latents")
        place = target(output, prefix=name, count=len(latents), overwrite=overwrite)
        written = place.save(_decoded(latent, request, console), request.seed, texts)
        console.print_result(str(written))
        made.append({"path": written, "seed": request.seed})
    console.json({"pictures": made})


def _decoded(latent: Tensor, request: SamplingRequest, console: Console) -> Pixels:
    """The finished picture: decoded, and laid over what it was made from."""
    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.generation.plan import plan_generation
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.generation.rescue import decode_safely
    from sdxl_cli.generation.session import open_weights

    files = locate(request.model, "base")
    if request.vae is not None:
        files = files.with_vae(locate(request.vae, "vae"))
    (weights,) = open_weights([files], request, console)

    def free() -> str:
        weights.forget()
        return ""

    pixels, _ = decode_safely(latent, weights, console, tiling=request.vae_tiling, before_retry=free)
    assert isinstance(request, GenerateRequest)
    canvas = plan_generation(request, files.config).canvas
    return pixels if canvas is None else canvas.finish(pixels)

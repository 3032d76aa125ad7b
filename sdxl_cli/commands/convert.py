"""``sdxl convert``: a model in another layout or precision."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.errors import UsageError, unknown

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.convert import Converted
    from sdxl_cli.checkpoint.convert_source import Layout, Storage
    from sdxl_cli.console import Console
    from sdxl_cli.model.config import Part

PANEL = "Models"

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="File (.safetensors, .ckpt), diffusers folder, cached hub id, base, refiner, vae or bundled.",
            metavar="IN",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors file, or a folder; never replaced.", metavar="OUT", show_default=False
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="single or diffusers.",
            metavar="LAYOUT",
            show_default="single if OUT ends in .safetensors",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="fp16, bf16, fp32 or fp8_e4m3.", metavar="NAME", show_default="as it is"
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Put in the autoencoder of this file or folder.", metavar="FILE"),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            "--parts", help="Only these of unet,vae,text.", metavar="NAMES", show_default="all there are"
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            "--variant",
            help="Of a folder: to read where there are several, and to write (fp16: *.fp16.safetensors).",
            metavar="NAME",
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        typer.Option("--max-shard-size", help="Largest file of a folder; 0 for any.", metavar="SIZE"),
    ] = "10GB",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a model as a single file or a diffusers folder, in another precision.

    Reads and writes tensor by tensor, so the memory needed is that of the largest one. Without --dtype, from one layout
    to the other and back gives the same file again, metadata included.
    """
    from sdxl_cli.checkpoint.locate import locate

    console = consoles.configure(quiet=quiet, json=as_json)
    layout, asked = _layout(to, output), _parts(parts)
    shard, storage = _bytes(max_shard_size), _storage(dtype)
    files = locate(source, "any", variant=variant)
    if vae is not None:
        files = files.with_vae(locate(vae, "vae"))
    console.note(f"from: {files.describe()}")

    from sdxl_cli.checkpoint.convert import Vocabulary, convert
    from sdxl_cli.checkpoint.convert_source import Conversion, parts_of
    from sdxl_cli.generation.prompt import Tokenizer

    job = Conversion(
        source=files,
        target=output,
        layout=layout,
        dtype=storage,
        parts=parts_of(files, asked),
        variant=variant if layout == "diffusers" else None,
        max_shard_size=shard if layout == "diffusers" else 0,
    )
    tokenizer = Tokenizer.default()
    result = convert(job, Vocabulary(tokenizer.vocabulary, tokenizer.merges))
    _tell(console, result, is_pipeline=layout == "diffusers" and "text" in job.parts)


def _tell(console: Console, result: Converted, *, is_pipeline: bool) -> None:
    from sdxl_cli.checkpoint.header import format_bytes

    if result.not_finite:
        names = ", ".join(result.not_finite[:3])
        console.warn(f"NaN or infinity, as in the source, in {len(result.not_finite)} tensors: {names}")
    if result.dropped:
        names = ", ".join(result.dropped[:3])
        console.warn(f"a diffusers folder has no place for {len(result.dropped)} tensors: {names}")
    if is_pipeline and not result.has_tokenizers:
        console.warn("no tokenizers were written: this model's vocabulary is not CLIP's")
    console.note(f"{result.tensors} tensors, {format_bytes(result.size)}")
    console.print_result(str(result.path))
    console.json(result)


def _layout(to: str | None, output: Path) -> Layout:
    layouts: dict[str, Layout] = {"single": "single", "diffusers": "diffusers"}
    if to is None:
        to = "single" if output.suffix == ".safetensors" else "diffusers"
    if to not in layouts:
        raise unknown("layout", to, layouts)
    if to == "single" and output.suffix != ".safetensors":
        raise UsageError(f"{output}: a single file is written as .safetensors; name it so")
    if to == "diffusers" and output.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise UsageError(
            f"{output} is the name of a file, and a diffusers folder is asked for; name a folder"
        )
    return layouts[to]


def _storage(dtype: str | None) -> Storage | None:
    names: dict[str, Storage] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16", "fp8_e4m3": "fp8_e4m3"}
    if dtype is not None and dtype not in names:
        raise unknown("dtype", dtype, names)
    return names[dtype] if dtype else None


def _parts(text: str | None) -> tuple[Part, ...] | None:
    from sdxl_cli.model.config import ALL_PARTS

    if text is None:
        return None
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in ALL_PARTS:
            raise unknown("part", name, ALL_PARTS)
    return tuple(part for part in ALL_PARTS if part in asked)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"--max-shard-size {text}: give a size such as 10GB, or 0 for any")
    return int(float(match[1]) * _UNITS[match[2].upper()])

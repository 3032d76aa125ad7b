"""``sdxl cache-dataset``: encode a manifest's pictures and captions once, for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.errors import UsageError, unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from sdxl_cli.console import Console
    from sdxl_cli.data.manifest import Manifest

PANEL = "Data"
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def command(
    data: Annotated[
        Path,
        typer.Argument(help="Manifest that bucket-dataset wrote.", metavar="MANIFEST", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the caches; added to.", metavar="DIR")
    ] = Path("cache"),
    latents: Annotated[
        bool, typer.Option("--latents/--no-latents", help="The autoencoder's moments of every crop.")
    ] = True,
    text: Annotated[
        bool, typer.Option("--text/--no-text", help="Features of every caption, and of the empty one.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Model whose autoencoder and text encoders are used.",
            metavar="FILE",
            show_default="the released one, else the bundled one",
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Another autoencoder.", metavar="FILE", show_default="the model's"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="What is stored: fp16, bf16 or fp32.", metavar="NAME")
    ] = "fp16",
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at a time.", metavar="N", min=1)] = 8,
    workers: Annotated[int, typer.Option(help="Threads that read pictures ahead.", metavar="N", min=1)] = 4,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Encode a manifest's pictures and captions once, so that training reads features.

    Only what is missing is encoded: after an interruption, an edited picture, another crop or another model. The
    networks compute in fp32.
    """
    import torch

    from sdxl_cli.data.manifest import read_manifest
    from sdxl_cli.generation.device import pick_device

    console = consoles.configure(quiet=quiet, json=as_json)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if not latents and not text:
        raise UsageError("--no-latents --no-text leaves nothing to do")
    manifest = read_manifest(data)
    stored, place = getattr(torch, DTYPES[dtype]), pick_device(device)
    result: dict[str, object] = {"folder": output}
    if latents:
        result["latents"] = _latents(
            console, manifest, output, vae or model, stored, place, batch_size, workers
        )
    if text:
        result["text"] = _text(console, manifest, output, model, stored, place)
    console.json(result)
    console.print_result(str(output))


def _latents(
    console: Console,
    manifest: Manifest,
    folder: Path,
    spec: str | None,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    workers: int,
) -> dict[str, int]:
    import torch

    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.checkpoint.read import load_vae
    from sdxl_cli.data.cache import LatentCache, weights_hash
    from sdxl_cli.data.encoding import fill_latents

    files = locate(spec, "vae")
    console.note(f"autoencoder: {files.describe()}")
    vae = load_vae(files, dtype=torch.float32)
    cache = LatentCache(folder, weights_hash(vae.state_dict()), manifest.config.hygiene, dtype=dtype)
    vae.to(device)
    added = 0
    with console.bar("encoding pictures", total=len(cache.missing(manifest.kept))) as bar:
        for count in fill_latents(cache, manifest, vae, batch_size=batch_size, workers=workers):
            added += count
            bar.advance(count)
    return _said(console, "crops", len(manifest.kept), added, cache.stale(manifest.kept))


def _text(
    console: Console,
    manifest: Manifest,
    folder: Path,
    spec: str | None,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, int]:
    import torch

    from sdxl_cli.checkpoint.locate import locate
    from sdxl_cli.checkpoint.read import load_model
    from sdxl_cli.data.cache import TextCache, weights_hash
    from sdxl_cli.data.encoding import fill_text, text_encoder_of

    files = locate(spec, "model")
    console.note(f"text encoders: {files.describe()}")
    encoders = load_model(files, ["text"], dtype=torch.float32, vae_dtype=torch.float32).conditioner
    cache = TextCache(folder, weights_hash(encoders.state_dict()), dtype=dtype)
    encode = text_encoder_of(encoders.to(device), _tokenize)
    captions = {"", *(caption for row in manifest.kept for caption in row.captions)}
    added = 0
    with console.bar("encoding captions", total=len(cache.missing(captions))) as bar:
        for count in fill_text(cache, manifest, encode):
            added += count
            bar.advance(count)
    return _said(console, "captions", len(captions), added, cache.stale(captions))


def _tokenize(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    import torch

    from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer

    tokenizer = Tokenizer.default()
    rows = ([tokenizer.row(c, padding) for c in captions] for padding in (PAD_CLIP_L, PAD_BIG_G))
    ids_l, ids_g = (torch.tensor(ids) for ids in rows)
    return ids_l, ids_g


def _said(console: Console, what: str, wanted: int, added: int, stale: int) -> dict[str, int]:
    """The counts as a sentence, and as values."""
    old = f"; {stale} items are of no use to this manifest and model any more" if stale else ""
    console.print_result(f"{wanted} {what}: {added} encoded, {wanted - added} were there{old}")
    return {"wanted": wanted, "encoded": added, "stale": stale}

"""``sdxl inspect-checkpoint``: what a file is, and whether it is whole and sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from sdxl_cli import console as consoles
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.console import Console
from sdxl_cli.errors import FileError, NumericError

if TYPE_CHECKING:
    from sdxl_cli.inspection.checkpoint import CheckpointReport

PANEL = "Inspect"

_LONG = 100
"""Characters of a metadata value that are shown; --json gives all of them."""


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="File (.safetensors, .ckpt), diffusers folder, cached hub id, base, refiner, vae or bundled.",
            metavar="FILE",
            show_default=False,
        ),
    ],
    variant: Annotated[
        str | None,
        typer.Option("--variant", help="Of a folder with several precisions: fp16.", metavar="NAME"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is, and whether it is whole and sound.

    Reads every byte once: names and shapes against the network it is meant to be, NaN and infinity, hashes in the forms
    A1111 and Civitai use. Exits with 3 when tensors are missing, mis-shaped or unexpected, with 4 when there is NaN or
    infinity; the report is given all the same. LoRAs and other architectures are named.
    """
    from sdxl_cli.checkpoint.locate import locate

    console = consoles.configure(quiet=quiet, json=as_json)
    files = locate(source, "file", variant=variant)

    from sdxl_cli.inspection.checkpoint import inspect_checkpoint

    report = inspect_checkpoint(files)
    _show(console, report)
    console.json(report)
    if report.not_finite:
        first = report.not_finite[0]
        raise NumericError(
            f"{files.path}: {len(report.not_finite)} tensors have NaN or infinity, such as {first.name} "
            f"({first.nan} NaN, {first.infinite} infinite); get the file again, or convert its source to bf16"
        )
    if report.differences:
        raise FileError(f"{files.path} does not fit {report.label}: {report.differences}")


def _show(console: Console, report: CheckpointReport) -> None:
    from sdxl_cli.checkpoint.header import format_bytes

    console.print_result(f"{report.path}: {report.label}")
    stored = ", ".join(f"{count:,} {dtype}" for dtype, count in report.dtypes.items())
    console.print_result(
        f"{report.layout}, {format_bytes(report.size)}, {report.tensors} tensors, {stored} elements"
    )
    if report.parts:
        console.table(
            ["part", "tensors", "parameters", "expected", "dtypes"],
            [
                [
                    part.name,
                    part.tensors,
                    f"{part.parameters:,}",
                    _number(part.expected),
                    ", ".join(part.dtypes),
                ]
                for part in report.parts
            ],
        )
    if report.kind in ("base", "refiner", "inpaint"):
        snr = ", zero terminal SNR" if report.zero_terminal_snr else ""
        console.print_result(f"predicts: {report.prediction}{snr}")
    if report.kept_tokens is not None:
        console.print_result(f"vocabulary: embeddings of {report.kept_tokens} tokens, one for all others")
    _show_problems(console, report)
    for file in report.files:
        known = f" (the released {file.released})" if file.released else ""
        lora = f"  AutoV3 {file.autov3}" if file.autov3 else ""
        name = f"{file.path.parent.name}/{file.path.name}: " if len(report.files) > 1 else ""
        console.print_result(f"{name}sha256 {file.sha256}{known}")
        console.print_result(f"{name}AutoV2 {file.autov2}  AutoV1 {file.autov1}{lora}")
        if file.stated_hash_fits is False:
            console.warn(
                f"{file.path} states another hash of its tensors (modelspec.hash_sha256) than they have: "
                "it was changed after that was written"
            )
    for key, value in sorted(report.metadata.items()):
        shown = value if len(value) <= _LONG else f"{value[:_LONG]}… ({len(value)} characters)"
        console.print_result(f"{key}: {' '.join(shown.split())}")


def _show_problems(console: Console, report: CheckpointReport) -> None:
    for name in report.missing:
        console.print_result(f"missing: {name}")
    for name, here, wanted in report.mis_shaped:
        console.print_result(f"mis-shaped: {name} {list(here)} instead of {list(wanted)}")
    for name in report.unexpected:
        console.print_result(f"unexpected: {name}")
    if report.ignored:
        names = ", ".join(report.ignored[:5]) + (", …" if len(report.ignored) > 5 else "")
        console.print_result(f"ignored: {len(report.ignored)} tensors of no part of SDXL: {names}")
    for item in report.not_finite:
        console.print_result(f"not finite: {item.name}: {item.nan} NaN, {item.infinite} infinite")
    if report.all_zero and report.kind in ("base", "refiner", "inpaint", "vae", "unet"):
        names = ", ".join(report.all_zero[:3]) + (", …" if len(report.all_zero) > 3 else "")
        console.warn(f"{len(report.all_zero)} matrices are all zero, as if never downloaded: {names}")
    if not (report.differences or report.not_finite) and report.parts:
        console.print_result("sound: every tensor is there, in shape, and finite")


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"

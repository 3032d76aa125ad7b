"""``sdxl inspect-latents``: numbers and pictures of what an autoencoder makes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli import console as consoles
from sdxl_cli import presets
from sdxl_cli.commands import _sampling as flags
from sdxl_cli.commands._options import Json, Quiet
from sdxl_cli.console import Cell, Console
from sdxl_cli.errors import NumericError, UsageError, unknown

if TYPE_CHECKING:
    from sdxl_cli.inspection.findings import LatentReport
    from sdxl_cli.inspection.latents import Findings, InspectRequest
    from sdxl_cli.inspection.subject import Perceptual

PANEL = "Inspect"
FOLLOWING, COMPARING = "Following a generation", "Comparing and auditing"
AUDITS = ("vae", "unet", "all")


def command(
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Pictures, folders of them, manifests of bucket-dataset, latent caches, or .safetensors of latents.",
            metavar="[INPUT...]",
            show_default=False,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            "--vae",
            help="Autoencoder, or model that has one; with it stored latents are decoded, too.",
            metavar="FILE",
            show_default="the model's",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Model, for --prompt and --fp16-audit unet; its autoencoder otherwise.",
            metavar="FILE",
            show_default="the released one, else the bundled one",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for sheets, report.json and report.html.", metavar="DIR"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report", help="One HTML file with everything in it, or a folder for it.", metavar="PATH"
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", help="How many to look at, evenly spread; 0 for all.", metavar="N", min=0),
    ] = 1000,
    max_side: Annotated[
        int,
        typer.Option(
            "--max-side",
            help="Shrink larger picture files to this many pixels; 0 never.",
            metavar="N",
            min=0,
        ),
    ] = 1024,
    scale_factor: Annotated[
        float | None,
        typer.Option("--scale-factor", help="Check this one.", metavar="X", show_default="the autoencoder's"),
    ] = None,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Latents in .safetensors are times the scale factor already."),
    ] = False,
    lpips: Annotated[
        str | None,
        typer.Option(
            "--lpips", help="Measure LPIPS, too: vgg or alex.", metavar="NET", rich_help_panel=COMPARING
        ),
    ] = None,
    lpips_weights: Annotated[
        list[Path] | None,
        typer.Option(
            "--lpips-weights",
            help="Its files, where the local caches lack them; may be repeated.",
            metavar="FILE",
            rich_help_panel=COMPARING,
        ),
    ] = None,
    compare_vae: Annotated[
        str | None,
        typer.Option(
            help="The same pictures through another one.", metavar="FILE", rich_help_panel=COMPARING
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            help="Other pictures or latents, side by side.", metavar="INPUT", rich_help_panel=COMPARING
        ),
    ] = None,
    fp16_audit: Annotated[
        str | None,
        typer.Option(
            "--fp16-audit",
            help="Largest output of every layer beside fp16's 65504: vae, unet or all.",
            metavar="PART",
            rich_help_panel=COMPARING,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Make this picture and look at every step.", metavar="TEXT", rich_help_panel=FOLLOWING
        ),
    ] = None,
    negative_prompt: flags.NegativePrompt = None,
    size: Annotated[
        str | None, typer.Option(help="Of the picture.", metavar="WxH", rich_help_panel=FOLLOWING)
    ] = None,
    steps: flags.Steps = None,
    cfg_scale: flags.CfgScale = None,
    sampler: flags.Sampler = None,
    scheduler: flags.Scheduler = None,
    seed: flags.Seed = None,
    refiner: Annotated[
        str | None, typer.Option(help="Does the last steps.", metavar="FILE", rich_help_panel=FOLLOWING)
    ] = None,
    dtype: flags.Dtype = None,
    device: Annotated[
        str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.", metavar="NAME")
    ] = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure latents: range, scale, outliers, NaN; and how well pictures survive.

    Exits with 4 when a latent or a reconstruction has NaN or infinite values; the report is given all the same.
    """
    given = dict(locals())
    console = consoles.configure(quiet=quiet, json=as_json)
    _check(given)
    from sdxl_cli.inspection.latents_page import require_room, write

    require_room(output, report)
    found, asked = _followed(given, console) if prompt is not None else _looked(given, console)
    known = write(found, asked, output, report)
    _show(console, known, given)
    console.json(known)
    stopped = known.followed.stopped if known.followed else None
    if stopped or known.not_finite:
        names = ", ".join(known.not_finite[:3]) + (" …" if len(known.not_finite) > 3 else "")
        raise NumericError(
            stopped
            or f"NaN or infinity in {len(known.not_finite)} of {known.inspected}: {names}; encode them in fp32"
        )


def _check(given: dict[str, Any]) -> None:
    """Refuse flags that contradict each other, or that nothing would come of."""
    from sdxl_cli.metrics.lpips import NETS

    if given["scale_factor"] is not None and not 0 < given["scale_factor"] < math.inf:
        raise UsageError(f"--scale-factor {given['scale_factor']:g}: has to be above 0, such as 0.13025")
    if (given["prompt"] is None) == (not given["inputs"]):
        raise UsageError("give pictures or latents to look at, or --prompt to follow a generation; not both")
    needs = ("compare_vae", "compare", "lpips", "lpips_weights", "scale_factor", "scaled")
    alone = ("negative_prompt", "size", "steps", "cfg_scale", "sampler", "scheduler", "seed", "refiner")
    wrong = [name for name in (needs if given["prompt"] is not None else alone) if given[name]]
    if wrong:
        flag = f"--{wrong[0].replace('_', '-')}"
        what = "pictures or latents" if given["prompt"] is not None else "--prompt"
        raise UsageError(f"{flag}: says something about {what} only")
    if given["compare_vae"] is not None and given["compare"] is not None:
        raise UsageError("--compare-vae and --compare: one at a time")
    if given["fp16_audit"] not in (None, *AUDITS):
        raise unknown("part to audit", given["fp16_audit"], AUDITS)
    if given["fp16_audit"] and given["dtype"] not in (None, "auto", "fp32"):
        raise UsageError(
            f"--dtype {given['dtype']}: an audit runs the networks in fp32, where nothing overflows; leave it out"
        )
    if given["lpips"] not in (None, *NETS):
        raise unknown("LPIPS network", given["lpips"], NETS)


def _looked(given: dict[str, Any], console: Console) -> tuple[Findings, InspectRequest]:
    """Look at what there is."""
    from dataclasses import replace

    from sdxl_cli.generation.device import pick_device
    from sdxl_cli.inspection.latents import InspectRequest, inspect_latents

    settled = None
    if given["fp16_audit"] in ("unet", "all"):
        from sdxl_cli.generation.jobs import Job

        settled = _settled(given, console, Job)
    request = InspectRequest(
        inputs=tuple(given["inputs"]),
        vae=given["vae"] or given["model"],
        compare_vae=given["compare_vae"],
        compare=given["compare"],
        limit=given["limit"],
        max_side=given["max_side"],
        scale_factor=given["scale_factor"],
        latents_are_scaled=given["scaled"],
        audit=given["fp16_audit"] in ("vae", "all"),
        network_channels=settled.models.base.config.vae.z_channels if settled else None,
        device=str(pick_device(given["device"])),
    )
    found = inspect_latents(request, _perceptual(given, request.device))
    if settled is not None:
        from sdxl_cli.inspection.following import audit_levels

        height, width = found.sample[0].shape[-2:]
        same = [latent for latent in found.sample if latent.shape[-2:] == (height, width)]
        audit = audit_levels(settled.models.base, settled.plan, same)
        found = replace(found, report=replace(found.report, audits=(*found.report.audits, audit)))
    return found, request


def _followed(given: dict[str, Any], console: Console) -> tuple[Findings, Any]:
    """Follow a generation."""
    from sdxl_cli.generation.jobs import Job
    from sdxl_cli.inspection.following import follow

    settled = _settled(given, console, Job)
    audit = given["fp16_audit"]
    found = follow(
        settled.plan,
        settled.models,
        audit_autoencoder=audit in ("vae", "all"),
        audit_network=audit in ("unet", "all"),
    )
    return found, settled.plan.request


def _settled(given: dict[str, Any], console: Console, job: Any) -> Any:
    """The generation that is asked for, with its models; of no prompt, for what the U-Net is told."""
    from sdxl_cli.commands.generate import _buckets, _locate
    from sdxl_cli.generation.fewstep import FewSteps
    from sdxl_cli.generation.jobs import Workshop
    from sdxl_cli.generation.request import GenerateRequest

    names = flags.flags_of(GenerateRequest, given)
    asked = {name: value for name, value in names.items() if value is not None} | {"num_images": 1}
    if given["fp16_audit"]:
        asked |= {"dtype": "fp32", "vae_dtype": "fp32"}
    request = presets.layered(
        GenerateRequest, preset="generate", config=None, sets=(), flags={"prompt": "", **asked}
    )
    shop = Workshop(lambda one: _locate(one, console), _buckets, console, FewSteps(frozenset(asked), console))
    return shop.settle(job(request=request))


def _perceptual(given: dict[str, Any], device: str) -> Perceptual | None:
    """LPIPS, when it is asked for."""
    if given["lpips"] is None and not given["lpips_weights"]:
        return None
    from sdxl_cli.metrics.lpips import load_lpips

    model = load_lpips(given["lpips"] or "vgg", given["lpips_weights"] or ())
    return lambda images, others: model(images, others)


def _show(console: Console, report: LatentReport, given: dict[str, Any]) -> None:
    """The numbers as tables and sentences."""
    from sdxl_cli.inspection import latents_page as words

    if report.followed is not None:
        console.table(words.FOLLOWED, words.followed_rows(report.followed))
    console.table(
        words.STATISTICS, words.statistic_rows(report.channels, report.together, report.scale_factor)
    )
    names = [str(index) for index in range(len(report.channels))]
    rows: list[list[Cell]] = [[name, *row] for name, row in zip(names, report.correlation, strict=True)]
    console.table(["correlation", *names], rows)
    if report.posterior_std is not None:
        console.print_result(
            "posterior std by channel: " + ", ".join(f"{value:.3g}" for value in report.posterior_std)
        )
    verdict = "fits" if report.scale_fits else "does not fit"
    console.print_result(
        f"{report.inspected} of {report.found}: std x scale factor is {report.scaled_std:.3f}, so "
        f"{report.scale_factor:g} {verdict}; 1/std is {report.measured_scale_factor:.5f}"
    )
    console.print_result(f"looks like: {report.family.says}")
    if report.colours is not None:
        console.print_result(f"colours: {words.colour_sentence(report.colours)}")
    _show_quality(console, report)
    if report.comparison is not None:
        other = report.comparison
        console.table(
            words.STATISTICS,
            words.statistic_rows(other.channels, other.together, other.scale_factor),
            title=f"beside it: {other.name}",
        )
        console.table(["", report.vae or "first", other.name], words.comparison_rows(report, other))
    for audit in report.audits:
        loud: list[list[Cell]] = [[one.name, one.kind, one.largest, one.at] for one in audit.loudest(8)]
        console.table(["layer", "kind", "largest", "at"], loud)
        console.print_result(audit.verdict)
    for path in report.files:
        console.print_result(str(path))


def _show_quality(console: Console, report: LatentReport) -> None:
    """How well pictures survive."""
    means = report.quality
    if means.psnr is None:
        return
    low = report.reconstructions[0]
    ssim = f", SSIM {means.ssim:.4f}" if means.ssim is not None else ""
    lpips = f", LPIPS {means.lpips:.4f}" if means.lpips is not None else ""
    console.print_result(
        f"reconstruction: {means.psnr:.2f} dB{ssim}{lpips} on average, {low.psnr:.2f} dB at worst ({low.name})"
    )
    if means.lpips is None:
        console.note(
            "LPIPS is not measured; --lpips vgg does, with weights from the local caches or --lpips-weights"
        )

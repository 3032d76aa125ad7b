"""What was found about latents, written down: sheets, JSON, and a report to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.console import Cell, to_jsonable
from sdxl_cli.errors import FileError
from sdxl_cli.inspection import page
from sdxl_cli.inspection.audit import FP16_MAX, Audit
from sdxl_cli.inspection.colours import ColourReport
from sdxl_cli.inspection.findings import Comparison, Followed, LatentReport, Reconstruction
from sdxl_cli.inspection.latents import Findings
from sdxl_cli.inspection.sheets import Sheet, save_png
from sdxl_cli.inspection.statistics import Statistics

REPORT, PAGE = "report.json", "report.html"
LOUDEST = 30
"""Layers of an audit that the report draws."""
SHEETS = ("steps", "reconstructions", "versus", "decoded", "channels")


def page_path(asked: Path) -> Path:
    """Where a report goes: the .html file itself, or ``report.html`` in the folder."""
    return asked if asked.suffix.lower() in (".html", ".htm") else asked / PAGE


def require_room(folder: Path | None, report: Path | None) -> None:
    """Refuse to overwrite, before any work is done.

    Raises:
        FileError: something is there already.
    """
    wanted = [page_path(report)] if report is not None else []
    if folder is not None:
        wanted += [folder / f"{name}.png" for name in SHEETS] + [folder / REPORT, folder / PAGE]
    if taken := [path for path in wanted if path.exists()]:
        raise FileError(f"{taken[0]} exists already; give another place")


def write(found: Findings, asked: Any, folder: Path | None, report: Path | None) -> LatentReport:
    """Write sheets, JSON and report into ``folder``, and the report to ``report``; returns what was found with the
    names of the files.

    Raises:
        FileError: something cannot be written, or is there already.
    """
    places = list(dict.fromkeys(page_path(place) for place in (folder, report) if place is not None))
    files = [folder / f"{sheet.name}.png" for sheet in found.sheets] if folder is not None else []
    if folder is not None:
        for path, sheet in zip(files, found.sheets, strict=True):
            save_png(path, sheet.draw())
    known = replace(found.report, files=(*files, *places))
    for place in places:
        page.write_page(place, _title(known), _lead(known), _parts(known, found.sheets))
    if folder is not None:
        text = json.dumps(to_jsonable({"request": asked, "report": known}), indent=2, ensure_ascii=False)
        with atomic_write(folder / REPORT, overwrite=False) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return known


def statistic_rows(channels: Sequence[Statistics], together: Statistics, scale: float) -> list[list[Cell]]:
    """A row for every channel and one for all: see :data:`STATISTICS`."""
    named = [*((str(index), values) for index, values in enumerate(channels)), ("all", together)]
    return [
        [
            name,
            v.mean,
            v.std,
            v.minimum,
            v.maximum,
            f"{100 * v.outliers:.3f} %",
            v.skewness,
            v.kurtosis,
            v.std * scale,
            1 / v.std if v.std else None,
            v.non_finite,
        ]
        for name, v in named
    ]


STATISTICS = (
    "channel", "mean", "std", "min", "max", "beyond 4 std", "skewness", "kurtosis", "std x scale", "1/std", "NaN, inf",
)  # fmt: skip
"""What the columns of :func:`statistic_rows` are."""


def _title(report: LatentReport) -> str:
    if report.followed is not None:
        return f"“{report.followed.prompt}”, step by step"
    return f"Latents of {report.vae}" if report.vae else "Latents"


def _lead(report: LatentReport) -> str:
    return (
        f"{report.inspected} of {report.found} looked at"
        + (f", {len(report.unusable)} left out" if report.unusable else "")
        + "."
    )


def _parts(report: LatentReport, sheets: Sequence[Sheet]) -> Iterator[str]:
    named = {sheet.name: sheet for sheet in sheets}
    yield _cards(report)
    if report.followed is not None:
        yield from _steps(report.followed)
    if "steps" in named:
        yield page.pictures(named["steps"])
    yield page.heading("Statistics", "Of unscaled latents; where there is a posterior, of samples of it.")
    yield page.table(STATISTICS, statistic_rows(report.channels, report.together, report.scale_factor))
    yield page.paragraph(f"Looks like: {report.family.says}.")
    yield page.charts(
        (svg, f"channel {index}: bars, and a Gaussian of the same mean and deviation; mean ± 5 deviations")
        for index, values in enumerate(report.channels)
        if (svg := page.histogram(values))
    )
    yield from _correlation(report)
    yield from _colours(report.colours)
    for name in ("reconstructions", "decoded"):
        if name in named:
            yield page.pictures(named[name])
    if report.reconstructions:
        yield page.heading("Every reconstruction", "The worst first.")
        yield _reconstructions(report.reconstructions)
    yield from _comparison(report, report.comparison)
    if "versus" in named:
        yield page.pictures(named["versus"])
    if "channels" in named:
        yield page.pictures(named["channels"])
    for audit in report.audits:
        yield from _audit(audit)
    if report.unusable:
        yield page.heading("Left out") + page.table(("picture",), [(line,) for line in report.unusable])


def _cards(report: LatentReport) -> str:
    fits = "good" if report.scale_fits else "bad"
    values: dict[str, tuple[str, str]] = {
        f"std x scale factor {report.scale_factor:g}; 1 fits": (f"{report.scaled_std:.3f}", fits),
        "measured scale factor, 1/std": (f"{report.measured_scale_factor:.5f}", ""),
        "looks like": (report.family.family or "cannot be told", ""),
        "with NaN or infinity": (str(len(report.not_finite)), "bad" if report.not_finite else "good"),
    }
    means = report.quality
    if means.psnr is not None:
        values["PSNR, mean"] = (f"{means.psnr:.2f} dB", "")
    if means.ssim is not None:
        values["SSIM, mean"] = (f"{means.ssim:.4f}", "")
    if means.lpips is not None:
        values["LPIPS, mean"] = (f"{means.lpips:.4f}", "")
    if report.colours is not None:
        values["of the colours are a linear map"] = (f"{100 * report.colours.r2:.1f} %", "")
    for audit in report.audits:
        bad = len(audit.overflowing)
        values[f"layers of the {audit.network} leave fp16"] = (str(bad), "bad" if bad else "good")
    return page.cards(values)


def _steps(followed: Followed) -> Iterator[str]:
    yield page.paragraph(
        f"{followed.size}, seed {followed.seed}, {followed.sampler}, {followed.guidance}; {followed.plan}."
    )
    if followed.stopped:
        yield page.paragraph(f"It ended early: {followed.stopped}.")
    steps = followed.steps
    at = [(float(s.step), s) for s in steps]
    channels = range(len(steps[0].denoised.channel_means))
    yield page.charts(
        [
            (
                page.lines(
                    {
                        "x": [(x, s.x.std) for x, s in at],
                        "expected": [(x, s.expected_std) for x, s in at],
                        "denoised": [(x, s.denoised.std) for x, s in at],
                        "eps": [(x, s.eps.std) for x, s in at],
                    },
                    logarithmic=True,
                    across="step",
                ),
                "deviation; x is expected to have sqrt(sigma² + 1), eps 1",
            ),
            (
                page.lines(
                    {f"channel {c}": [(x, s.denoised.channel_means[c]) for x, s in at] for c in channels},
                    across="step",
                ),
                "mean of the denoised latents, channel by channel",
            ),
            (
                page.lines(
                    {"change": [(x, s.change) for x, s in at if s.change is not None]},
                    logarithmic=True,
                    across="step",
                ),
                "how much the denoised latents changed since the step before, root mean square",
            ),
        ]
    )
    yield page.table(FOLLOWED, followed_rows(followed))


FOLLOWED = (
    "step", "who", "t", "sigma", "std of x", "expected", "denoised: mean", "std", "min", "max", "std of eps", "change",
    "NaN, inf",
)  # fmt: skip
"""What the columns of :func:`followed_rows` are."""


def followed_rows(followed: Followed) -> list[list[Cell]]:
    """A row for every step: see :data:`FOLLOWED`."""
    return [
        [
            s.step,
            s.who,
            s.timestep,
            s.sigma,
            s.x.std,
            s.expected_std,
            s.denoised.mean,
            s.denoised.std,
            s.denoised.minimum,
            s.denoised.maximum,
            s.eps.std,
            s.change,
            s.x.non_finite + s.denoised.non_finite,
        ]
        for s in followed.steps
    ]


def _correlation(report: LatentReport) -> Iterator[str]:
    yield page.heading(
        "Correlation of channels", "Channels that say nearly the same are room that is not used."
    )
    names = [str(index) for index in range(len(report.channels))]
    rows: list[list[Cell]] = [[name, *row] for name, row in zip(names, report.correlation, strict=True)]
    yield page.table(["", *names], rows)


def _colours(colours: ColourReport | None) -> Iterator[str]:
    if colours is None:
        return
    yield page.heading(
        "Colours as a linear map of the channels",
        "Latents times the scale factor to red, green and blue in -1 … 1, by least squares over "
        f"{colours.positions} positions.",
    )
    rows: list[list[Cell]] = [[str(i), *row] for i, row in enumerate(colours.weight)]
    yield page.table(
        ("channel", "red", "green", "blue"), [*rows, ["bias", *colours.bias], ["R²", *colours.r2_rgb]]
    )
    text = colour_sentence(colours)
    yield page.paragraph(text[0].upper() + text[1:] + ".")


def colour_sentence(colours: ColourReport) -> str:
    """What a linear map explains, in words."""
    text = f"a linear map explains {100 * colours.r2:.1f} % of the colours' variance"
    if colours.preview_r2 is not None:
        text += f", the one of previews {100 * colours.preview_r2:.1f} %"
    if colours.like:
        text += "; its direction beside published maps: " + ", ".join(
            f"{name} {cosine:+.2f}" for name, cosine in colours.like.items()
        )
    return text


def _reconstructions(found: Sequence[Reconstruction]) -> str:
    return page.table(
        ("picture", "PSNR, dB", "SSIM", "LPIPS"), [(r.name, r.psnr, r.ssim, r.lpips) for r in found[:200]]
    )


def _comparison(report: LatentReport, other: Comparison | None) -> Iterator[str]:
    if other is None:
        return
    yield page.heading(f"Beside {other.name}", "The same numbers of the other one.")
    yield page.table(STATISTICS, statistic_rows(other.channels, other.together, other.scale_factor))
    yield page.table(("", report.vae or "first", other.name), comparison_rows(report, other))


def comparison_rows(report: LatentReport, other: Comparison) -> list[list[Cell]]:
    """What is compared, of the first, of the other."""
    ours, theirs = report.quality, other.quality
    rows: list[list[Cell]] = [
        ["latents", report.inspected, other.inspected],
        ["std x scale factor", report.scaled_std, other.scaled_std],
        ["PSNR, dB", ours.psnr, theirs.psnr],
        ["SSIM", ours.ssim, theirs.ssim],
        ["LPIPS", ours.lpips, theirs.lpips],
        ["pictures that are better by 0.01 dB", other.worse, other.better],
        ["Fréchet distance of latents", None, other.frechet],
        ["latents of the same name", None, other.pairs],
        ["difference of those, root mean square", None, other.rms_difference],
    ]
    if other.channel_correlation is not None:
        rows += [
            [f"correlation of channel {index}", None, value]
            for index, value in enumerate(other.channel_correlation)
        ]
    return [row for row in rows if row[1] is not None or row[2] is not None]


def _audit(audit: Audit) -> Iterator[str]:
    yield page.heading(
        f"fp16: the {audit.network}", f"Largest output of every layer in fp32; fp16 ends at {FP16_MAX:g}."
    )
    yield page.paragraph(audit.verdict + ".")
    yield page.levels([(layer.name, layer.largest) for layer in audit.loudest(LOUDEST)], FP16_MAX)

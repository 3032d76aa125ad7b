"""Frames of every aspect a model was trained on (paper, Figure 5), and base beside refiner (Figure 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import numpy as np
from PIL import Image

from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.sizes import format_size, nearest_bucket, output_size
from sdxl_cli.inspection.studies.base import (
    About,
    Design,
    Frame,
    Outcome,
    Place,
    StudyRequest,
    mean_and_error,
    rows_of,
    with_error,
)
from sdxl_cli.inspection.studies.measures import busiest, repetition, sharpness, subject

FEW = 9
"""Aspects of the study unless all of them are asked for."""


class AspectStudy:
    """The same prompt in every format."""

    name = "aspect"
    title = "Frames of every aspect (Figure 5)"
    about = "the same prompt in the sizes the model was trained on, from wide to tall"
    values_are = f"sizes WxH or ratios; all: every trained one, else {FEW} of them"
    needs_refiner = False

    def design(self, asked: StudyRequest, base: GenerateRequest, about: About) -> Design:
        """A near square of frames for every prompt, from the widest to the tallest."""
        sizes = self._sizes(asked, about)
        rows = rows_of(asked, base)
        requests = [
            (
                f"{prompt}: " * (len(rows) > 1) + f"{format_size(size)}, {size[1] / size[0]:.2f}",
                prompt,
                seed,
                size,
            )
            for _, prompt, seed in rows
            for size in sizes
        ]
        wide = math.ceil(math.sqrt(len(requests)))
        frames = tuple(
            Frame(
                place=(index % wide, index // wide),
                request=replace(
                    base, prompt=prompt, seed=seed, size=format_size(size), width=None, height=None
                ),
            )
            for index, (_, prompt, seed, size) in enumerate(requests)
        )
        return Design(
            columns=("",) * wide,
            rows=("",) * math.ceil(len(requests) / wide),
            frames=frames,
            captions=tuple(label for label, *_ in requests),
        )

    def _sizes(self, asked: StudyRequest, about: About) -> list[tuple[int, int]]:
        usable = [size for size in about.buckets if not any(side % about.multiple for side in size)]
        ordered = sorted(usable, key=lambda size: (-size[1] / size[0], size))
        if asked.values == ("all",):
            return ordered
        if asked.values:
            return [
                output_size(text, "--values", buckets=usable, multiple=about.multiple)
                for text in asked.values
            ]
        widest = math.log(ordered[0][1] / ordered[0][0])
        ratios = [math.exp(widest * (1 - 2 * part / (FEW - 1))) for part in range(FEW)]
        return list(dict.fromkeys(nearest_bucket(ratio, usable) for ratio in ratios))

    def extra(self, pictures: Mapping[Place, Pixels], design: Design) -> tuple[Design, dict[Place, Pixels]]:
        """As they are."""
        return design, dict(pictures)

    def measure(self, pictures: Mapping[Place, Pixels], design: Design) -> Outcome:
        """By format: detail, where the subject is, and how much the picture repeats itself."""
        sizes = dict.fromkeys(frame.request.size or "" for frame in design.frames)
        table = []
        twice: list[tuple[float, float]] = []
        for size in sizes:
            shown = [pictures[frame.place] for frame in design.frames if frame.request.size == size]
            height, width = shown[0].shape[:2]
            found = [subject(pixels) for pixels in shown]
            repeats = [repetition(pixels) for pixels in shown]
            twice.append((abs(math.log2(width / height)), fmean(repeats)))
            table.append(
                (
                    size,
                    f"{width / height:.2f}",
                    with_error([100 * sharpness(pixels) for pixels in shown], 2),
                    with_error([100 * one.coverage for one in found], 1),
                    with_error([100 * one.cut for one in found], 1),
                    with_error(repeats, 2),
                )
            )
        square = min(twice)[1]
        long = max(twice)[1]
        return Outcome(
            head=(
                "size",
                "width/height",
                "fine detail, %",
                "subject, % of area",
                "border covered, %",
                "repetition",
            ),
            table=tuple(table),
            numbers={"repetition_nearest_square": square, "repetition_longest": long},
            says=f"repetition along the longer side is {square:.2f} in the format nearest a square and {long:.2f} in "
            "the longest; above 0.8 a subject is usually there twice",
            curves={"repetition": sorted(twice)},
            across="how long the format is, log2 of the ratio",
        )


class RefinerStudy:
    """What the refiner changes, as the last steps of one run and as a pass over the finished picture."""

    name = "refiner"
    title = "Base and refiner (Figure 6)"
    about = "without refiner, with it for the last steps, and with it over the finished picture"
    values_are = ""
    needs_refiner = True
    labels = ("base", "base + refiner", "refined again (SDEdit)")

    def design(self, asked: StudyRequest, base: GenerateRequest, about: About) -> Design:
        """Columns are the three ways."""
        ways = (
            replace(base, refiner=None, refiner_strength=None),
            replace(base, refiner_mode="ensemble", refiner_strength=None),
            replace(base, refiner_mode="sdedit"),
        )
        rows = rows_of(asked, base)
        frames = tuple(
            Frame(place=(column, row), request=replace(way, prompt=prompt, seed=seed))
            for row, (_, prompt, seed) in enumerate(rows)
            for column, way in enumerate(ways)
        )
        return Design(columns=self.labels, rows=tuple(label for label, _, _ in rows), frames=frames)

    def extra(self, pictures: Mapping[Place, Pixels], design: Design) -> tuple[Design, dict[Place, Pixels]]:
        """With the part that changes most, four times as large, to the right."""
        shown = dict(pictures)
        for row in range(len(design.rows)):
            first, second = pictures[0, row], pictures[1, row]
            side = min(first.shape[:2]) // 4
            top, left = busiest(first, second, side)
            for column in range(len(self.labels)):
                part = pictures[column, row][top : top + side, left : left + side]
                larger = Image.fromarray(part).resize((side * 4, side * 4), Image.Resampling.NEAREST)
                shown[len(self.labels) + column, row] = np.asarray(larger)
        columns = (*self.labels, *(f"{label}, enlarged" for label in self.labels))
        return replace(design, columns=columns), shown

    def measure(self, pictures: Mapping[Place, Pixels], design: Design) -> Outcome:
        """Detail of each, and how far the refined pictures are from the base's."""
        rows = range(len(design.rows))
        sharp = [
            [100 * sharpness(pictures[column, row]) for row in rows] for column in range(len(self.labels))
        ]
        apart = [
            [_rms(pictures[0, row], pictures[column, row]) for row in rows]
            for column in range(len(self.labels))
        ]
        means = [mean_and_error(values)[0] for values in sharp]
        gains = [mean / means[0] if means[0] else math.nan for mean in means]
        table = tuple(
            (label, with_error(values, 2), gain, with_error(differences, 1))
            for label, values, gain, differences in zip(self.labels, sharp, gains, apart, strict=True)
        )
        return Outcome(
            head=("", "fine detail, % of power", "times the base's", "differs from the base, of 255"),
            table=table,
            numbers={"ensemble_gain": gains[1], "sdedit_gain": gains[2]},
            says=f"with the refiner for the last steps pictures have {gains[1]:.2f} times the base's fine detail, "
            f"refined again {gains[2]:.2f} times",
        )


def _rms(a: Pixels, b: Pixels) -> float:
    return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()))

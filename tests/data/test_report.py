from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxl_cli.data.manifest import DatasetConfig, Manifest
from sdxl_cli.data.report import write_report
from sdxl_cli.errors import FileError, UsageError
from tests.data.pictures import TINY, make_manifest, noise

CONFIG = DatasetConfig(buckets=TINY, batch_size=4, flip=True)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def manifest(pictures: Path) -> Manifest:
    (pictures / "metadata.jsonl").unlink()
    (pictures / "zero.png").touch()
    (pictures / "<b>copy.png").write_bytes((pictures / "00.png").read_bytes())
    made = make_manifest(pictures, CONFIG)
    return replace(
        made, rows=tuple(replace(row, tokens_clip_l=(index * 9,)) for index, row in enumerate(made.rows))
    )


def html(manifest: Manifest, folder: Path) -> str:
    write_report(folder / "r.html", manifest, ["a <note>"])
    return (folder / "r.html").read_text()


def test_the_page_needs_nothing_from_elsewhere_and_names_every_reject(
    manifest: Manifest, tmp_path: Path
) -> None:
    page = html(manifest, tmp_path)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "url(" not in page
    assert "<script" not in page
    assert "a &lt;note&gt;" in page
    assert "<h3>empty</h3>" in page
    assert "<h3>duplicate</h3>" in page
    assert "&lt;b&gt;copy.png" in page or "00.png" in page
    assert "<b>copy" not in page
    assert "zero.png" in page


def test_the_heat_map_counts_every_picture_once(manifest: Manifest, tmp_path: Path) -> None:
    write_report(tmp_path / "r.svg", manifest)
    tree = ET.parse(tmp_path / "r.svg")
    hints = [title.text or "" for title in tree.iter(f"{SVG}title")]
    cells = [hint for hint in hints if re.search(r"\d+-\d+ wide, \d+-\d+ high", hint)]
    sizes = [row.original_size for row in manifest.rows if row.original_size]
    assert sum(int(cell.split(":")[0]) for cell in cells) == len(sizes)
    for cell in cells:
        count, w0, w1, h0, h1 = map(int, re.findall(r"\d+", cell))
        # bounds are rounded to whole pixels
        inside = sum(h0 <= h <= h1 and w0 <= w <= w1 for h, w in sizes)
        assert inside >= count
    bars = [int(hint.split()[0]) for hint in hints if "pictures," in hint]
    assert sum(bars) == len(manifest.kept)


def test_histograms_hold_every_value_on_its_side_of_the_line(manifest: Manifest, tmp_path: Path) -> None:
    page = html(manifest, tmp_path)
    charts = page.split("<h2>")
    scale = next(chart for chart in charts if chart.startswith("Scale"))
    bars = re.findall(r"<title>(\d+): ([\d.e+-]+)x to ([\d.e+-]+)x</title>", scale)
    assert sum(int(count) for count, _, _ in bars) == len(manifest.kept)
    enlarged = sum(int(count) for count, low, _ in bars if float(low) >= 0.999)
    assert enlarged == sum(row.plan.scale > 1 for row in manifest.kept)


def test_the_frame_of_a_small_picture_is_its_crop(tmp_path: Path) -> None:
    """A wide picture that is bright where its crop is, mirrored or not."""
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        noise(64, 120, seed).save(folder / "a.png")
        manifest = make_manifest(folder, replace(CONFIG, seed=seed, batch_size=None))
        row = manifest.kept[0]
        plan = row.plan
        left = plan.crop_top_left[1]
        if plan.flipped:
            left = plan.resized_size[1] - plan.target_size[1] - left
        pixels = np.zeros((64, 120, 3), np.uint8)
        pixels[:, left : left + plan.target_size[1]] = 255
        Image.fromarray(pixels).save(folder / "a.png")
        page = html(manifest, folder)
        data = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)[0]
        small = np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).astype(int)
        middle = small[small.shape[0] // 2]
        frame = np.flatnonzero((middle[:, 0] > 150) & (middle[:, 2] < 130))
        white = np.flatnonzero(middle.min(axis=1) > 200)
        assert frame.size
        assert white.size
        assert frame.min() <= white.min() + 3
        assert frame.max() >= white.max() - 3
        assert white.max() - white.min() >= plan.target_size[1] - 12


def test_png_is_the_same_sheet(manifest: Manifest, tmp_path: Path) -> None:
    write_report(tmp_path / "r.png", manifest)
    write_report(tmp_path / "r.svg", manifest)
    image = Image.open(tmp_path / "r.png")
    root = ET.parse(tmp_path / "r.svg").getroot()
    assert image.size == (2 * int(root.get("width", 0)), 2 * int(root.get("height", 0)))
    bar = next(
        r for r in root.iter(f"{SVG}rect") if r.get("fill") == "#2f6db3" and float(r.get("width", 0)) > 20
    )
    x, y, height = (float(bar.get(key, 0)) for key in ("x", "y", "height"))
    assert image.getpixel((int(2 * x) + 6, int(2 * (y + height / 2)))) == (0x2F, 0x6D, 0xB3)


def test_a_report_of_nothing_but_rejects(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    manifest = make_manifest(tmp_path, CONFIG)
    for name in ("r.html", "r.svg", "r.png"):
        write_report(tmp_path / name, manifest)
    assert "cannot be shown" in (tmp_path / "r.html").read_text()


def test_names_that_are_taken_or_of_no_kind(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.html, \.svg or \.png"):
        write_report(tmp_path / "r.pdf", manifest)
    write_report(tmp_path / "r.svg", manifest)
    with pytest.raises(FileError, match="exists already"):
        write_report(tmp_path / "r.svg", manifest)

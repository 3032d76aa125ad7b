from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdxl_cli import cli
from sdxl_cli.data.manifest import read_manifest


def run(*args: object) -> int:
    return cli.run(["bucket-dataset", *map(str, args)])


def test_from_a_folder_to_a_manifest(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "stray.jpg").write_bytes(b"x")
    output = tmp_path / "m.parquet"
    options = (
        "--preset",
        "buckets-tiny",
        "--output",
        output,
        "--crops-per-image",
        2,
        "--flip",
        "--verify",
        8,
    )
    assert run(pictures, *options) == 0
    out = capsys.readouterr().out
    assert "verified: 8 rows regenerate their pixels bit for bit" in out
    assert "13 of 14 pictures kept, 26 crops" in out
    assert "not_listed" in out
    assert out.rstrip().endswith(str(output))
    manifest = read_manifest(output)
    assert len(manifest.kept) == 26
    assert {row.plan.target_size for row in manifest.kept} >= {(256, 256), (192, 320), (320, 192)}
    assert run(pictures, *options) == 3  # nothing is overwritten
    assert run(pictures, *options, "--overwrite") == 0


def test_json(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pictures, "--preset", "buckets-256", "-o", tmp_path / "m.jsonl", "--verify", 3, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["summary"]["kept"] == 13
    assert result["summary"]["buckets"][0]["size"] == [256, 256]
    assert (result["verified"], result["mismatches"]) == (3, [])


def test_flags_win_over_set_and_the_manifest_says_what_was_used(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.jsonl"
    args = ("--preset", "buckets-256", "--set", "crop=center", "--set", "seed=3", "--seed", 4, "-o", output)
    assert run(pictures, *args, "--set", "hygiene.background=[1,2,3]", "-q") == 0
    config = read_manifest(output).config
    assert (config.crop, config.seed, config.hygiene.background) == ("center", 4, (1, 2, 3))


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--preset", "buckets-pape"), 2, "buckets-paper"),
        (("--crop", "middle"), 2, "center"),
        (("-o", "m.csv"), 2, ".parquet or .jsonl"),
        (("--max-upscale", "0.5"), 2, "max_upscale"),
        (("--min-side", "9000"), 1, "none of 13 pictures"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(pictures, *args) == code
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_made_table_and_small_pictures_in_buckets_of_their_own(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.jsonl"
    args = (
        "--area",
        "128x96",
        "--step",
        16,
        "--min-bucket",
        64,
        "--max-bucket",
        192,
        "--no-upscale",
        "-o",
        output,
    )
    assert run(pictures, *args, "-q", "--report", tmp_path / "r.svg") == 0
    assert (tmp_path / "r.svg").is_file()
    manifest = read_manifest(output)
    assert manifest.config.buckets.grid is not None
    sizes = {row.path: row.target_size for row in manifest.kept}
    table = set(manifest.config.buckets.grid.sizes())
    assert sizes["04.png"] == (32, 32)  # the picture of 40 x 40, which no made bucket fits into
    assert sizes["03.png"] in table
    assert all(row.plan.scale <= 1 for row in manifest.kept)
    assert all(len(row.tokens_clip_l) == len(row.captions) == 2 for row in manifest.kept)
    assert manifest.kept[0].tokens_clip_l == (2, 2)  # "one 0": a word and a digit


def test_merging_fills_batches_and_is_verified(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "m.parquet"
    args = (
        "--preset",
        "buckets-tiny",
        "--batch-size",
        3,
        "--remainder",
        "merge",
        "--verify",
        50,
        "-o",
        output,
    )
    assert run(pictures, *args, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["verified"], result["mismatches"]) == (13, [])
    assert sum(line["over"] > 0 for line in result["repeats"]) == 1
    assert sum(line["pictures"] for line in result["repeats"]) == 13
    assert any("merged" in row.notes for row in read_manifest(output).kept)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--area", "big"), "1024x1024"),
        (("--area", "128x128", "--preset", "buckets-256"), "one of the two"),
        (("--min-bucket", 64), "--area"),
        (("--column", "caption"), "ROLE=NAME"),
        (("--column", "captoin=x"), "caption"),
        (("--remainder", "merge"), "batch_size"),
        (("--remainder", "merg"), "merge"),
        (("--no-upscale", "--max-upscale", 2), "exclude each other"),
        (("--engine", "spark"), "ray"),
        (("--report", "r.pdf"), ".html"),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_together(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(pictures, *args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not list(tmp_path.glob("*.parquet"))

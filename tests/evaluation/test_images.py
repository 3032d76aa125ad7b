"""One folder against another, beside torch-fidelity's own program on the same folders and weights."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_fidelity
from PIL import Image

from sdxl_cli import cli
from sdxl_cli.errors import FileError
from sdxl_cli.evaluation.distribution import read_statistics
from sdxl_cli.evaluation.networks import Networks
from sdxl_cli.evaluation.pictures import Framing, open_pictures
from tests.evaluation.conftest import draw, scores

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def theirs(sets: tuple[Path, Path], inception_file: Path) -> dict[str, float]:
    found: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=str(sets[0]), input2=str(sets[1]), fid=True, kid=True, isc=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=str(inception_file), kid_subsets=5, kid_subset_size=4, isc_splits=2,
        rng_seed=2020, save_cpu_ram=True,
    )  # fmt: skip
    return found


def test_fid_kid_and_is_are_those_of_torch_fidelity(
    sets: tuple[Path, Path], inception_file: Path, theirs: dict[str, float], run: Run
) -> None:
    found = scores(
        run(
            "images", sets[0], "--reference", sets[1], "--inception-weights", inception_file,
            "--kid-subsets", 5, "--kid-subset-size", 4, "--is-splits", 2, "-o", "out",
        )
    )  # fmt: skip
    fid = theirs["frechet_inception_distance"]
    assert found["FID"]["value"] == pytest.approx(fid, rel=1e-4)
    assert found["KID"]["value"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert found["KID"]["spread"] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)
    assert found["IS"]["value"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert (found["FID"]["pictures"], found["FID"]["reference"]) == (6, 5)
    saved = json.loads(Path("out/results.json").read_text())
    assert saved["results"][0]["scores"][0]["value"] == found["FID"]["value"]
    assert saved["settings"]["inception"]["resize"] == "tf1"
    assert any("5 pictures are too few" in text for text in saved["warnings"])


def test_statistics_stand_for_their_pictures(
    sets: tuple[Path, Path],
    inception_file: Path,
    theirs: dict[str, float],
    run: Run,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--inception-weights", inception_file)
    for name in ("with.safetensors", "with.npz"):
        run("statistics", sets[1], "-o", name, "--features", *flags)
    assert not list(Path().glob("*.partial"))
    more = ("--kid-subset-size", 4, "--is-splits", 2, *flags)
    args = ("images", sets[0], "-o", "a", *more, "--reference")
    expected = scores(run(*args, sets[1], "--metrics", "kid,is"))
    # the pictures' own features are there already; only what they are compared with is another
    found = scores(run(*args, "with.safetensors", "--metrics", "kid"))
    assert found["KID"]["value"] == pytest.approx(expected["KID"]["value"], rel=1e-9)
    found = scores(run(*args, "with.npz", "--metrics", "fid"))
    assert found["FID"]["value"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    # no result takes the place of another
    assert len(list(Path("a").glob("results*.json"))) == 3
    with np.load("with.npz") as content:
        np.savez("foreign.npz", mu=content["mu"], sigma=content["sigma"])
        reference, warnings = read_statistics(Path("foreign.npz"), {"size": 256})
        assert (reference.gaussian.mean.numpy() == content["mu"]).all()
        assert reference.gaussian.count is None
    assert "does not say how its pictures were measured" in warnings[0]
    for args, says in (
        (("--reference", "foreign.npz", "--metrics", "kid"), "the statistics have no features"),
        (("--reference", "with.npz", "--resize", "clean"), "was measured otherwise (inception"),
        (("--reference", "with.npz", "--size", "64"), "was measured otherwise (size"),
        ((), "give --reference PATH"),
    ):
        assert cli.run(["eval", "images", str(sets[0]), *args, "-o", "a", *map(str, more)]) == 2
        assert says in capsys.readouterr().err


def test_the_clean_resize_gives_other_numbers(
    sets: tuple[Path, Path], inception_file: Path, run: Run, theirs: dict[str, float]
) -> None:
    flags = ("--metrics", "is", "--is-splits", 2, "--resize", "clean", "--inception-weights", inception_file)
    found = scores(run("images", sets[0], *flags))["IS"]["value"]
    assert found == pytest.approx(theirs["inception_score_mean"], rel=0.1)
    assert found != pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert next(Path("evaluations").glob("images-*/results.json")).is_file()


def test_clip_score_of_captions(
    sets: tuple[Path, Path], clip_folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = draw(Path("captioned"), 3, 0)
    for number in range(3):
        (folder / f"{number:03d}.txt").write_text(f"a picture of {number} cats")
    args = ("images", folder, "--metrics", "clip", "--clip-model", clip_folder, "--batch-size", 2)
    score = scores(run(*args, "-o", "a"))["CLIP score"]
    Path("texts.txt").write_text("".join(f"a picture of {number} cats\n" for number in range(3)))
    assert scores(run(*args, "-o", "b", "--prompts", "texts.txt"))["CLIP score"] == score
    assert score["pictures"] == 3
    Path("long.txt").write_text("a cat\na dog\n" + 90 * "very " + "long\n")
    content = run(*args, "-o", "c", "--prompts", "long.txt")
    assert "CLIP read only the beginning of 1 texts" in content["warnings"][0]
    assert score["spread_is"].startswith("standard error")
    for more, says in (
        ((), "not every picture has a caption"),
        (("--prompts", "texts.txt"), "3 texts for 6"),
    ):
        bare = ["eval", "images", str(sets[0]), "--metrics", "clip", "--clip-model", str(clip_folder), *more]
        assert cli.run(bare) == 2
        assert says in capsys.readouterr().err


def test_pictures_that_changed_are_measured_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Same names, other pictures."""
    one = draw(Path("one"), 1, 0)
    args = ("images", one, "--reference", draw(Path("other"), 1, 1), "--metrics", "psnr")
    before = scores(run(*args))["PSNR"]["value"]
    assert scores(run(*args))["PSNR"]["value"] == before
    run(*args, "-o", "a")
    (draw(Path("after"), 1, 2) / "000.png").replace(one / "000.png")
    assert scores(run(*args))["PSNR"]["value"] != before
    assert cli.run(["eval", *map(str, args), "-o", "a"]) == 3
    assert "was begun with other settings (files_sha256" in capsys.readouterr().err


def test_a_tar_that_changed_is_another_set_of_pictures(own_place: Path) -> None:
    found = []
    for seed in (0, 1):
        picture = draw(Path(str(seed)), 1, seed) / "000.png"
        with tarfile.open("one.tar", "w") as tar:
            tar.add(picture, "000.png")
        found.append(open_pictures(Path("one.tar"), Framing()).settings())
    assert found[0]["files_sha256"] != found[1]["files_sha256"]
    assert open_pictures(Path("one.tar"), Framing()).settings() == found[1]


def test_a_pair_too_small_for_a_metric_is_named(lpips_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (draw(Path(name), 1, seed, (8, 20)) for seed, name in enumerate(("one", "other")))
    alex = ("--lpips-net", "alex", "--lpips-weights", str(lpips_file))
    for args, says in ((("ssim",), "ssim needs sides of 11"), (("lpips", *alex), "lpips needs sides of 63")):
        flags = ["--reference", str(other), "--device", "cpu", "--metrics", *args]
        assert cli.run(["eval", "images", str(one), *flags]) == 3
        assert f"000.png is 20x8, {says} pixels" in capsys.readouterr().err


def test_what_cannot_be_had_is_refused_before_anything_is_measured(
    sets: tuple[Path, Path],
    inception_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 6 pictures and a reference of 3 with features, or without."""
    gaussian = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez("bare.npz", **gaussian)
    np.savez("three.npz", **gaussian, features=np.zeros((3, 2048), np.float32), count=3)
    monkeypatch.setattr(Networks, "features", lambda self, pictures: pytest.fail("measured"))
    flags = ["--inception-weights", str(inception_file), "--device", "cpu"]
    for args, says in (
        (("--metrics", "is", "--is-splits", "7"), "--is-splits 7: there are only 6 pictures"),
        (
            ("--metrics", "fid", "--reference", str(sets[1]), "--limit", "1"),
            "FID needs at least two pictures",
        ),
        (
            ("--metrics", "kid", "--reference", str(sets[1]), "--kid-subset-size", "7"),
            "there are 6 pictures, and",
        ),
        (("--metrics", "kid", "--reference", "bare.npz"), "the statistics have no features"),
        (
            ("--metrics", "kid", "--reference", "three.npz", "--kid-subset-size", "4"),
            "there are 6 pictures and 3 to compare",
        ),
        (("--metrics", "is,psnr"), "psnr compare pairs of pictures: give --reference"),
    ):
        assert cli.run(["eval", "images", str(sets[0]), *args, *flags]) == 2
        assert says in capsys.readouterr().err


def test_features_serve_every_metric_and_every_reference(
    sets: tuple[Path, Path], inception_file: Path, run: Run
) -> None:
    """Without --output, too: what changes no picture and no feature begins no other folder."""
    features = np.ones((4, 2048), np.float32)
    np.savez("other.npz", mu=np.zeros(2048), sigma=np.eye(2048), features=features)
    flags = ("--inception-weights", inception_file, "--is-splits", 2, "--kid-subsets", 2)
    for more in (
        ("--metrics", "is"),
        ("--metrics", "is", "--metric-seed", 1),
        ("--metrics", "kid,is", "--reference", "other.npz"),
    ):
        run("images", sets[0], *flags, *more)
    (folder,) = Path("evaluations").iterdir()
    assert len(list(folder.glob("results*.json"))) == 3
    pairs = ("images", sets[0], "--limit", 3, "--reference")
    for metrics in ("psnr", "psnr,ssim"):
        run(*pairs, sets[0], "--metrics", metrics)
    run(*pairs, sets[1], "--metrics", "psnr")


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"mu": np.zeros(9), "sigma": np.eye(2048)}, r"has no mu \[2048\]"),
        ({"settings": np.array("a cat")}, "its settings are not those of sdxl eval statistics"),
        ({"settings": np.array("[1]")}, "its settings are not those of sdxl eval statistics"),
        ({"count": np.zeros(3)}, r"its count is \[3\]"),
        ({"features": np.zeros((3, 4))}, r"its features are \[3, 4\]"),
    ],
)
def test_statistics_of_something_else_are_refused(arrays: dict[str, Any], says: str, own_place: Path) -> None:
    np.savez("x.npz", **({"mu": np.zeros(2048), "sigma": np.eye(2048)} | arrays))
    with pytest.raises(FileError, match=rf"^x\.npz: {says}"):
        read_statistics(Path("x.npz"), {})


def test_statistics_that_were_cut_off_are_refused(own_place: Path) -> None:
    np.savez("whole.npz", mu=np.zeros(2048))
    np.save("array.npy", np.zeros(3))
    whole = Path("whole.npz").read_bytes()
    for content in (whole[:1000], whole[:-30], b"", Path("array.npy").read_bytes()):
        Path("x.npz").write_bytes(content)
        with pytest.raises(FileError, match=r"^x\.npz: is no whole \.npz of plain arrays"):
            read_statistics(Path("x.npz"), {})


def test_other_texts_are_another_measurement(
    sets: tuple[Path, Path], clip_folder: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("images", sets[0], "--metrics", "clip", "--clip-model", clip_folder, "--prompts", "texts.txt")
    found = []
    for animal in ("cats", "dogs"):
        Path("texts.txt").write_text("".join(f"a picture of {number} {animal}\n" for number in range(6)))
        found.append(run(*args))
        assert len(found[-1]["settings"]["texts_sha256"]) == 64
    assert scores(found[0]) != scores(found[1])
    run(*args, "-o", "a")
    Path("texts.txt").write_text("something else\n" * 6)
    assert cli.run(["eval", *map(str, args), "-o", "a"]) == 3
    assert "was begun with other settings (texts_sha256" in capsys.readouterr().err


def test_pairs_by_name(lpips_file: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = draw(Path("one"), 3, 0), draw(Path("other"), 4, 1)
    args = ("--metrics", "psnr,ssim,lpips", "--lpips-net", "alex", "--lpips-weights", lpips_file)
    found = scores(run("images", one, "--reference", other, "-o", "a", *args))
    errors = [
        np.mean(
            (np.asarray(Image.open(one / name), float) - np.asarray(Image.open(other / name), float)) ** 2
        )
        for name in ("000.png", "001.png", "002.png")
    ]
    assert found["PSNR"]["value"] == pytest.approx(
        np.mean(10 * np.log10(255**2 / np.array(errors))), rel=1e-6
    )
    assert found["SSIM"]["better"] == "higher"
    assert found["LPIPS"]["better"] == "lower"
    assert cli.run(["eval", "images", "other", "--reference", "one", "--metrics", "psnr"]) == 3
    assert "has no picture for 003.png (1 of 4 lack one)" in capsys.readouterr().err
    same = run("images", one, "--reference", one, "-o", "b", "--metrics", "psnr,ssim")
    assert "PSNR" not in scores(same)
    assert any("are the same as their originals" in text for text in same["warnings"])


def test_broken_pictures_are_left_out_and_named(inception_file: Path, run: Run) -> None:
    folder = draw(Path("broken"), 4, 0)
    (folder / "001.png").write_bytes(b"nothing")
    args = (
        "images",
        folder,
        "--metrics",
        "is",
        "--is-splits",
        1,
        "--inception-weights",
        inception_file,
        "-o",
        "a",
    )
    for _ in range(2):  # and again when all is there already
        content = run(*args)
        assert scores(content)["IS"]["pictures"] == 3
        assert content["unusable"][0].startswith("001.png: ")


def test_weights_that_are_missing_end_the_run_before_it_begins(
    sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["eval", "images", str(sets[0]), "--reference", str(sets[1])]) == 6
    told = capsys.readouterr().err
    assert "pt_inception-2015-12-05-6726825d.pth" in told
    assert "--inception-weights" in told
    assert not Path("evaluations").exists()
    assert cli.run(["eval", "images", str(sets[0]), "--metrics", "fad"]) == 2
    assert "unknown metric 'fad'; did you mean fid" in capsys.readouterr().err

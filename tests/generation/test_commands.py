"""``sdxl generate`` and ``sdxl refine`` as people run them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdxl_cli import cli
from sdxl_cli.commands.generate import _buckets as buckets_of
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.picture import read_pixels, read_texts
from sdxl_cli.generation.sizes import output_size


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


Sdxl = Callable[..., Result]


@pytest.fixture
def sdxl(capsys: pytest.CaptureFixture[str]) -> Sdxl:
    def run(*args: object) -> Result:
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def generate(sdxl: Sdxl, models: dict[str, Path]) -> Sdxl:
    """``sdxl generate`` with the small base, four steps and seed 5, unless said otherwise."""

    def run(*args: object) -> Result:
        return sdxl("generate", "-m", models["base"], "--steps", 4, "--seed", 5, *args)

    return run


def test_the_same_command_twice_gives_the_same_bytes(generate: Sdxl) -> None:
    first, second = (generate("a red guitar", "-o", folder).paths[0] for folder in ("one", "two"))
    assert first == Path("one/sdxl-00000-5.png")
    assert first.read_bytes() == second.read_bytes()


def test_four_at_once_are_the_same_files_as_one_at_a_time(generate: Sdxl) -> None:
    together = generate("a red guitar", "-o", "one", "--num-images", 4, "--batch-size", 4).paths
    single = generate("a red guitar", "-o", "two", "--num-images", 4, "--batch-size", 1).paths
    assert [path.name for path in together] == [f"sdxl-{i:05d}-{5 + i}.png" for i in range(4)]
    assert [path.read_bytes() for path in together] == [path.read_bytes() for path in single]
    last = generate("a red guitar", "-o", "three", "--seed", 8).paths[0]
    assert last.read_bytes() == together[3].read_bytes()


def test_paths_are_on_stdout_and_all_else_on_stderr(generate: Sdxl) -> None:
    result = generate("a red guitar")
    assert (result.code, result.out) == (0, "outputs/sdxl-00000-5.png\n")
    assert "64x64, base: 4 steps t=999→0, DPM++ 2M, cfg 5" in result.err
    assert generate("a red guitar", "--quiet").err == ""
    assert generate("a red guitar").paths == [Path("outputs/sdxl-00002-5.png")]


def test_json_is_one_object_on_stdout(generate: Sdxl) -> None:
    found = json.loads(generate("a red guitar", "--json", "--num-images", 2).out)
    assert [picture["seed"] for picture in found["pictures"]] == [5, 6]
    assert found["request"]["prompt"] == "a red guitar"
    assert found["resolved"]["size"] == {"height": 64, "width": 64}
    assert all(Path(picture["path"]).is_file() for picture in found["pictures"])


def test_a_random_seed_is_printed_in_the_name_and_makes_the_picture_again(generate: Sdxl) -> None:
    path = generate("a cat", "--seed", -1).paths[0]
    seed = int(path.stem.rpartition("-")[2])
    assert np.array_equal(read_pixels(generate("a cat", "--seed", seed).paths[0]), read_pixels(path))


def test_from_makes_the_same_picture_and_flags_win(
    generate: Sdxl, sdxl: Sdxl, models: dict[str, Path]
) -> None:
    asked = (
        "--negative-prompt",
        "blue",
        "-W",
        96,
        "--sampler",
        "euler",
        "--original-size",
        "32x16",
        "--cfg-scale",
        3,
    )
    first = generate("a red guitar", *asked, "--refiner", models["refiner"], "--num-images", 2).paths[1]
    again = sdxl("generate", "--from", first, "-o", "again")
    assert again.paths[0].name == "sdxl-00000-6.png"
    assert again.paths[0].read_bytes() == first.read_bytes()
    changed = sdxl("generate", "a blue table", "--from", first, "--steps", 3, "--set", "cfg_scale=2.0").paths[
        0
    ]
    stored = read_record(changed)
    assert stored is not None
    request = stored.request
    assert (request.prompt, request.steps, request.cfg_scale) == ("a blue table", 3, 2.0)
    assert (request.negative_prompt, request.seed, request.original_size) == ("blue", 6, "32x16")


def test_from_with_another_model_says_that_it_will_differ(
    generate: Sdxl, sdxl: Sdxl, models: dict[str, Path]
) -> None:
    first = generate("a red guitar").paths[0]
    result = sdxl("generate", "--from", first, "-m", models["pruned"])
    assert "warning: the picture was made with base [" in result.err


def test_micro_conditioning_changes_the_picture_and_is_written_down(generate: Sdxl) -> None:
    plain = generate("a red guitar").paths[0]
    for flag, value in {
        "--original-size": "16x32",
        "--crop-top-left": "8,4",
        "--target-size": "32x32",
        "--negative-original-size": "8x8",
        "--negative-crop-top-left": "1,2",
        "--negative-target-size": "16x8",
    }.items():
        path = generate("a red guitar", flag, value).paths[0]
        assert not np.array_equal(read_pixels(path), read_pixels(plain)), flag
        stored = read_record(path)
        assert stored is not None
        assert stored.request != getattr(read_record(plain), "request", None), flag
    resolved = stored.raw["resolved"]
    assert resolved["negative_target_size"] == {"height": 8, "width": 16}
    assert resolved["target_size"] == {"height": 64, "width": 64}


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_other_formats_carry_their_metadata(generate: Sdxl, sdxl: Sdxl, suffix: str) -> None:
    path = generate("a red guitar", "-o", f"cat.{suffix}").paths[0]
    assert path == Path(f"cat.{suffix}")
    assert read_texts(path).parameters.startswith("a red guitar\nSteps: 4, Sampler: DPM++ 2M")
    assert sdxl("generate", "--from", path, "-o", "again.png").code == 0


def test_no_metadata_leaves_none(generate: Sdxl, sdxl: Sdxl) -> None:
    path = generate("a red guitar", "--no-metadata").paths[0]
    assert not Image.open(path).info.keys() & {"parameters", "sdxl"}
    result = sdxl("generate", "--from", path)
    assert result.code == 2
    assert "does not say how it was made" in result.err


def test_the_vae_of_another_file_is_used_and_named(generate: Sdxl, models: dict[str, Path]) -> None:
    own = generate("a red guitar").paths[0]
    other = generate("a red guitar", "--vae", models["refiner"]).paths[0]
    assert not np.array_equal(read_pixels(own), read_pixels(other))
    assert "VAE: refiner" in read_texts(other).parameters


def test_refine_takes_the_prompt_from_the_picture_and_chains_the_record(
    generate: Sdxl, sdxl: Sdxl, models: dict[str, Path]
) -> None:
    picture = generate("a red guitar", "-n", "blue").paths[0]
    result = sdxl("refine", picture, "-m", models["refiner"], "--seed", 3, "--steps", 20)
    assert result.code == 0
    assert result.paths == [Path("outputs/sdxl-00000-5-refined-00000-3.png")]
    assert "5 of 20 steps: refiner: 5 steps t=" in result.err
    stored = read_record(result.paths[0])
    assert stored is not None
    assert (stored.kind, stored.request.prompt, stored.request.negative_prompt) == (
        "refine",
        "a red guitar",
        "blue",
    )
    assert stored.raw["source"]["sdxl"]["request"]["seed"] == 5
    again = sdxl("generate", "--from", result.paths[0])
    assert again.code == 2
    assert "was made by sdxl refine, from sdxl-00000-5.png" in again.err


def test_refine_cuts_to_what_the_model_can_and_says_so(sdxl: Sdxl, models: dict[str, Path]) -> None:
    Image.new("RGB", (100, 70), "green").save("photo.jpg")
    result = sdxl(
        "refine", "photo.jpg", "--prompt", "a lawn", "-m", models["refiner"], "-o", "out.png", "--steps", 8
    )
    assert result.code == 0
    assert "photo.jpg: cut from 100x70 to 96x64" in result.err
    assert Image.open("out.png").size == (96, 64)
    assert sdxl("refine", "photo.jpg", "-m", models["refiner"]).err.endswith(
        "photo.jpg: does not say what it shows; give --prompt\n"
    )


Cases = dict[str, tuple[Sequence[object], int, str]]


def bad_files(base: Path, refiner: Path) -> Cases:
    whole = base.read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("page.safetensors").write_text("<html>404</html>")
    save_file({"a": torch.zeros(2)}, "other.safetensors")
    Path("text.png").write_text("no picture")
    Path("mine.toml").write_text("stepps = 3\n")
    return {
        "missing model": (["generate", "x", "-m", "gone.safetensors"], 3, "gone.safetensors: no such file"),
        "truncated": (
            ["generate", "x", "-m", "half.safetensors"],
            3,
            r"half.safetensors: [\d.]+ of [\d.]+ MB are here",
        ),
        "not a checkpoint": (
            ["generate", "x", "-m", "page.safetensors"],
            3,
            "page.safetensors is a web page",
        ),
        "not SDXL": (
            ["generate", "x", "-m", "other.safetensors"],
            3,
            "other.safetensors is .*, not an SDXL base",
        ),
        "refiner as base": (["generate", "x", "-m", refiner], 3, "refiner.*give it with --refiner"),
        "base as refiner": (
            ["generate", "x", "-m", base, "--refiner", base],
            3,
            "base.*give it with --model",
        ),
        "config key": (
            ["generate", "x", "-m", base, "--config", "mine.toml"],
            2,
            "mine.toml.*did you mean steps",
        ),
        "no config": (["generate", "x", "--config", "gone.toml"], 3, "gone.toml: cannot be read"),
        "unreadable picture": (["refine", "text.png", "--prompt", "x", "-m", refiner], 3, "is not a picture"),
        "missing picture": (
            ["refine", "gone.png", "--prompt", "x", "-m", refiner],
            3,
            "gone.png: no such file",
        ),
        "from no picture": (["generate", "--from", "text.png"], 3, "text.png: is not a picture"),
        "format": (["generate", "x", "-m", base, "-o", "a.gif"], 2, "unknown picture format '.gif'"),
        "existing file": (["generate", "x", "-m", base, "-o", "text.png"], 2, "text.png: there already"),
    }


def bad_flags(base: Path, refiner: Path) -> Cases:
    long = "a red guitar " * 26 + "with a purple zeppelin"
    Image.new("RGB", (64, 64)).save("photo.png")
    photo = ["refine", "photo.png", "--prompt", "x", "-m", refiner]
    return {
        "no prompt": (["generate"], 2, 'For example: sdxl generate "a red guitar"'),
        "bad size": (
            ["generate", "x", "-m", base, "--size", "large"],
            2,
            "--size large: expected WIDTHxHEIGHT",
        ),
        "odd size": (
            ["generate", "x", "-m", base, "--size", "100x64"],
            2,
            "multiples of 8 .* nearest is 104x64",
        ),
        "sampler": (["generate", "x", "-m", base, "--sampler", "eulr"], 2, "did you mean.*euler"),
        "scheduler": (["generate", "x", "-m", base, "--scheduler", "kerras"], 2, "did you mean.*karras"),
        "set key": (["generate", "x", "-m", base, "--set", "stepps=3"], 2, "'stepps'; did you mean steps"),
        "preset": (["generate", "x", "--preset", "genrate"], 2, "'genrate'; did you mean generate"),
        "flag": (["generate", "x", "--stepz", "3"], 2, "--stepz"),
        "dtype": (["generate", "x", "-m", base, "--dtype", "fp8"], 2, "dtype: unknown value 'fp8'"),
        "fp16 on a CPU": (
            ["generate", "x", "-m", base, "--device", "cpu", "--dtype", "fp16"],
            2,
            "slower than fp32",
        ),
        "device": (["generate", "x", "-m", base, "--device", "gpu"], 2, "unknown device 'gpu'"),
        "no such GPU": (["generate", "x", "-m", base, "--device", "cuda:9"], 2, "use --device cpu"),
        "steps": (["generate", "x", "-m", base, "--steps", "0"], 2, "at least 1 is needed"),
        "long prompt": (
            ["generate", long, "-m", base, "--strict-tokens"],
            2,
            "82 tokens in 2 chunks.* the first: '.*a purple zeppelin'",
        ),
        "long negative": (
            ["generate", "x", "-n", long, "-m", base, "--strict-tokens"],
            2,
            "negative prompt: 82 tokens",
        ),
        "AND": (["generate", "cat AND dog", "-m", base], 2, "prompt: AND in capitals"),
        "prompt editing": (["generate", "a [cat:dog:0.5]", "-m", base], 2, r"\[cat:dog:0.5\] changes"),
        "syntax": (["generate", "x", "-m", base, "--prompt-syntax", "a1112"], 2, "did you mean a1111"),
        "emphasis": (
            ["generate", "x", "-m", base, "--prompt-syntax", "comfy", "--emphasis", "no-norm"],
            2,
            "is A1111's",
        ),
        "clip skip": (["generate", "x", "-m", base, "--clip-skip", "9"], 2, "--clip-skip 9.* allow 1 … 3"),
        "no embedding": (["generate", "embedding:nice", "-m", base], 2, "give --embedding FILE:nice"),
        "strength": ([*photo, "--strength", "2"], 2, "strength 2.0: must be above 0, and at most 1"),
        "no step": ([*photo, "--strength", "0.01"], 2, "0.01 of 30 steps leaves none to run"),
        "no prompt for a photo": (["refine", "photo.png", "-m", refiner], 2, "photo.png: .*give --prompt"),
    }


def bad_numbers(base: Path, refiner: Path) -> Cases:
    return {
        "no side": (["generate", "x", "-m", base, "-W", "-8"], 2, "width -8: expected 1 to 16384 pixels"),
        "no words": (["generate", "", "-m", base], 2, "the command line: has no prompt"),
        "no refiner step": (
            [
                *["generate", "x", "-m", base, "--refiner", refiner],
                *["--refiner-mode", "sdedit", "--steps", "5"],
            ],
            2,
            "give at least --refiner-strength 0.34",
        ),
    }


def test_bad_input_is_one_line_and_its_exit_code(sdxl: Sdxl, models: dict[str, Path]) -> None:
    wrong = {}
    base, refiner = models["base"], models["refiner"]
    cases = bad_files(base, refiner) | bad_flags(base, refiner) | bad_numbers(base, refiner)
    for name, (args, code, words) in cases.items():
        result = sdxl(*args, "--quiet")
        lines = result.err.splitlines()
        told = len(lines) == 1 and lines[0].startswith("sdxl: ") and re.search(words, lines[0])
        if not told or (result.code, result.out) != (code, ""):
            wrong[name] = result
    assert not wrong
    assert not Path("outputs").exists() or not list(Path("outputs").iterdir())


def test_nan_weights_are_exit_code_4_and_leave_no_picture(sdxl: Sdxl, broken: Callable[[str], Path]) -> None:
    model = broken("model.diffusion_model.out.2.bias")
    result = sdxl("generate", "x", "-m", model, "--steps", 3, "--quiet")
    assert result.code == 4
    assert result.err.startswith("sdxl: the U-Net of the base, step 1 of 3 (t=999): gave NaN or infinity")
    assert not list(Path("outputs").iterdir())


def test_words_the_model_never_saw_are_a_warning(sdxl: Sdxl, models: dict[str, Path]) -> None:
    result = sdxl("generate", "a red zeppelin", "-m", models["pruned"], "--steps", 1, "--quiet")
    assert result.code == 0
    assert result.err == "warning: this model never saw the word zeppelin\n"


def test_sides_need_not_halve_evenly(generate: Sdxl, models: dict[str, Path]) -> None:
    """1920x1080 and its like: 135 latents are no multiple of 4."""
    path = generate(
        "a red guitar", "--size", "72x88", "--refiner", models["refiner"], "--scheduler", "sgm"
    ).paths[0]
    assert Image.open(path).size == (72, 88)


@pytest.mark.parametrize(
    ("native", "ratio", "size"),
    [
        (1024, "16:9", (768, 1344)),
        (1024, "4:1", (512, 2048)),
        (1024, "3:4", (1152, 896)),
        (512, "16:9", (384, 640)),
        (256, "4:3", (224, 288)),
        (256, "1:1", (256, 256)),
    ],
)
def test_a_ratio_is_a_trained_size_of_the_models_own_area(
    native: int, ratio: str, size: tuple[int, int]
) -> None:
    """For SDXL the paper's Appendix I, for the bundled model its own table, for other areas the rule."""
    assert output_size(ratio, "--size", buckets=buckets_of(native), multiple=32) == size


@pytest.mark.parametrize(
    ("flags", "settled"),
    [
        (["--sampler", "DPM++ 2M SDE Karras", "--eta", "0.5"], ("dpmpp_2m_sde", "karras", 0.5)),
        (["--sampler", "dpmpp_sde"], ("dpmpp_sde", "karras", None)),
        (["--sampler", "lcm", "--scheduler", "auto"], ("lcm", "lcm", None)),
        (["--sampler", "euler_a", "--timesteps", "999,499,99"], ("euler_a", "custom", None)),
    ],
)
def test_a_picture_of_any_sampler_is_made_again_from_what_it_says(
    generate: Sdxl, sdxl: Sdxl, flags: list[str], settled: tuple[str, str, float | None]
) -> None:
    first = generate("a red guitar", *flags, "-o", "one").paths[0]
    stored = read_record(first)
    assert stored is not None
    assert (stored.request.sampler, stored.request.scheduler, stored.request.eta) == settled
    again = sdxl("generate", "--from", first, "-o", "two").paths[0]
    assert np.array_equal(read_pixels(first), read_pixels(again))


def test_a_batch_and_a_picture_alone_take_the_same_path(generate: Sdxl) -> None:
    """A sampler that adds noise: the second picture of two is the one of its own seed."""
    flags = ("a red guitar", "--sampler", "dpmpp_2m_sde")
    second = generate(*flags, "--num-images", 2, "-o", "two").paths[1]
    alone = generate(*flags, "--seed", 6, "-o", "one").paths[0]
    assert np.array_equal(read_pixels(second), read_pixels(alone))

"""From what people type to files, without the network."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdxl_cli.checkpoint import files as files_module
from sdxl_cli.checkpoint import locate as locate_module
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.write import save_model, save_tensors, save_vae
from sdxl_cli.errors import FileError, NetworkError, UsageError
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL

COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
BASE_REPO = "stabilityai/stable-diffusion-xl-base-1.0"
Cached = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache and an empty folder to work in."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hf" / "hub"


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig, small_refiner_config: ModelConfig
) -> Path:
    """Small base, refiner and VAE files."""
    folder = tmp_path_factory.mktemp("models")
    for name, config in (("base", small_config), ("refiner", small_refiner_config)):
        save_model(folder / f"{name}.safetensors", SDXL(config), config)
    save_vae(folder / "vae.safetensors", SDXL(small_config, ("vae",)).vae, small_config.vae)
    return folder


@pytest.fixture
def cached(cache: Path, saved: Path) -> Cached:
    """Put a file into the cache as huggingface_hub does: a blob and a link to it."""

    def put(
        name: str, repo: str = BASE_REPO, source: str = "base", commit: str = COMMIT, ref: bool = True
    ) -> Path:
        home = cache / f"models--{repo.replace('/', '--')}"
        content = (saved / f"{source}.safetensors").read_bytes()
        blob = home / "blobs" / ("ab" * 32)
        link = home / "snapshots" / commit / name
        for path in (blob, link, home / "refs" / "main"):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
        if ref:
            (home / "refs" / "main").write_text(commit)
        return link

    return put


def test_a_file_by_its_path(saved: Path, cache: Path, small_config: ModelConfig) -> None:
    found = locate(str(saved / "base.safetensors"))
    assert (found.name, found.layout, found.config, found.is_bundled) == (
        "base",
        "original",
        small_config,
        False,
    )
    assert found.describe().startswith("base, an SDXL base model, ")


@pytest.mark.parametrize(
    ("name", "role", "says"),
    [
        ("refiner", "base", "is an SDXL refiner model, not an SDXL base model; give it with --refiner"),
        ("base", "refiner", "is an SDXL base model, not an SDXL refiner model; give it with --model"),
        ("vae", "model", "is a VAE, not an SDXL base or refiner model; give it with --vae"),
    ],
)
def test_the_wrong_kind_is_refused_by_name(name: str, role: str, says: str, saved: Path, cache: Path) -> None:
    with pytest.raises(FileError, match=says):
        locate(str(saved / f"{name}.safetensors"), role)  # type: ignore[arg-type]


def test_a_vae_may_come_from_a_whole_model(saved: Path, cache: Path, small_config: ModelConfig) -> None:
    for name in ("vae", "base", "refiner"):
        assert locate(str(saved / f"{name}.safetensors"), "vae").config.vae == small_config.vae


def test_a_lora_is_no_model(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_tensors(path, {"lora_unet_x_attn2_to_k.lora_down.weight": torch.zeros(16, 2048)})
    with pytest.raises(FileError, match=r"is a LoRA \(SDXL, rank 16\), not an SDXL base model"):
        locate(str(path))


def test_a_typing_error_is_answered_with_the_nearest_name(saved: Path, cache: Path) -> None:
    with pytest.raises(FileError, match=r"no such file or folder; did you mean base\.safetensors"):
        locate(str(saved / "bse.safetensors"))
    with pytest.raises(FileError, match=r"the folder .*nowhere does not exist"):
        locate(str(saved / "nowhere" / "base.safetensors"))
    with pytest.raises(FileError, match=r"model\.safetensors: no such file"):
        locate("model.safetensors")


def test_a_word_is_no_model(cache: Path) -> None:
    with pytest.raises(UsageError, match="'dreamshaper' is no file, folder or hub id"):
        locate("dreamshaper")


def test_a_plain_folder_is_no_model(saved: Path, cache: Path) -> None:
    with pytest.raises(
        FileError, match=r"without model_index\.json.* give a file, such as .*base\.safetensors"
    ):
        locate(str(saved))


@pytest.mark.parametrize(
    "spec", ["base", BASE_REPO, f"{BASE_REPO}@main", f"{BASE_REPO}/sd_xl_base_1.0.safetensors"]
)
def test_names_in_the_cache(spec: str, cached: Cached) -> None:
    link = cached("sd_xl_base_1.0.safetensors")
    found = locate(spec)
    assert found.path == link
    assert found.name == "sd_xl_base_1.0"
    assert "from the local Hugging Face cache" in found.describe()


def test_the_hash_of_a_cached_file_is_free(cached: Cached) -> None:
    cached("sd_xl_base_1.0.safetensors")
    assert locate("base").sha256 == "ab" * 32
    assert locate("base").short_hash == "ababababab"


def test_what_is_not_in_the_cache_is_said_with_the_place(cache: Path) -> None:
    with pytest.raises(NetworkError, match=f"{BASE_REPO} is not in the local cache .*hub"):
        locate("base")
    with pytest.raises(NetworkError, match="somebody/some-model"):
        locate("somebody/some-model")


def test_a_file_that_is_not_in_a_cached_repository(cached: Cached) -> None:
    cached("sd_xl_base_1.0.safetensors")
    with pytest.raises(NetworkError, match=r"other\.safetensors is not in the local cache"):
        locate(f"{BASE_REPO}/other.safetensors")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_the_cache_may_be_elsewhere(
    variable: str, cached: Cached, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("sd_xl_base_1.0.safetensors")
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setenv(variable, str(cache))
    assert locate("base").name == "sd_xl_base_1.0"


def test_the_older_vae_beside_the_released_file_is_passed_over(cached: Cached) -> None:
    cached("sd_xl_base_1.0.safetensors")
    path = locate("base").path
    (path.parent / "sd_xl_base_1.0_0.9vae.safetensors").symlink_to(path.resolve())
    assert locate("base").path.name == "sd_xl_base_1.0.safetensors"


def test_several_models_in_one_repository_must_be_told_apart(cached: Cached) -> None:
    path = cached("v1.safetensors", repo="me/mine")
    (path.parent / "v2.safetensors").symlink_to(path.resolve())
    with pytest.raises(
        FileError, match=r"several models \(v1\.safetensors, v2\.safetensors\); .* me/mine/v1"
    ):
        locate("me/mine")
    assert locate("me/mine/v2.safetensors").name == "v2"


def test_an_older_whole_copy_is_used_when_the_newest_is_not_whole(cached: Cached) -> None:
    cached("sd_xl_base_1.0.safetensors", commit="0" * 40)
    home = locate("base").path.parent.parent
    newest = home / COMMIT
    newest.mkdir()
    (newest / "sd_xl_base_1.0.safetensors").write_bytes(b"\x10\x00")
    (home.parent / "refs" / "main").write_text(COMMIT)
    assert locate("base").path.parent.name == "0" * 40


def test_a_cached_repository_of_something_else_says_so(cached: Cached) -> None:
    cached("sd_xl_refiner_1.0.safetensors", source="refiner")
    with pytest.raises(FileError, match="is in the local cache but cannot be used"):
        locate("base")


def test_nothing_given_means_released_else_bundled(
    cached: Cached, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate_module, "BUNDLED", saved)
    bundled = locate(None)
    assert bundled.is_bundled
    assert bundled.describe().startswith("the bundled tiny model (")
    assert "give --model FILE" in bundled.describe()
    assert locate(None, "refiner").is_bundled
    assert locate("bundled", "refiner").path.name == "refiner.safetensors"
    cached("sd_xl_base_1.0.safetensors")
    assert not locate(None).is_bundled
    assert locate("bundled").is_bundled


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ("blobs/cd.incomplete", r"a download stopped \(1\.2 kB are here\); `sdxl download base` goes on"),
        (f"snapshots/{COMMIT}/sd_xl_base_1.0.safetensors", r"cannot be used: .*no safetensors file"),
    ],
)
def test_a_copy_that_is_not_whole_is_told_of_before_the_bundled_model_is_taken(
    left: str, says: str, cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(locate_module, "BUNDLED", saved)
    path = cache / f"models--{BASE_REPO.replace('/', '--')}" / left
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1234))
    assert locate(None).is_bundled
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {BASE_REPO} is in the local cache but ")
    assert re.search(f"{says}.*; the bundled tiny model takes its place", told)
    with pytest.raises(FileError, match=says):
        locate("base")


def test_the_bundled_model_is_taken_in_silence_when_there_is_no_copy(
    cache: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(locate_module, "BUNDLED", saved)
    assert locate(None).is_bundled
    assert capsys.readouterr().err == ""


def test_an_installation_without_the_bundled_model_says_so(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate_module, "BUNDLED", tmp_path)
    with pytest.raises(FileError, match="bundled model is not in this installation"):
        locate(None)


def test_hashes_are_computed_once(saved: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved / "base.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert locate(str(path)).sha256 == expected
    monkeypatch.setattr(files_module.hashlib, "file_digest", None)
    assert locate(str(path)).sha256 == expected


def test_a_vae_with_other_latents_does_not_fit(saved: Path, cache: Path) -> None:
    model = locate(str(saved / "base.safetensors"))
    assert model.with_vae(locate(str(saved / "vae.safetensors"), "vae")).vae is not None
    other = locate(str(saved / "vae.safetensors"), "vae")
    wide = replace(
        other, config=replace(other.config, vae=replace(other.config.vae, channel_mult=(1, 2, 4, 4)))
    )
    with pytest.raises(FileError, match="makes latents of 4 channels at 1/8, base wants 4 at 1/4"):
        model.with_vae(wide)


def test_a_wrong_path_is_told_before_torch_is_imported() -> None:
    code = (
        "import sys\n"
        "from sdxl_cli.checkpoint.locate import locate\n"
        "try: locate('nothing.safetensors')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    root = Path(locate_module.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.split() == ["FileError", "False", "False"]


def test_a_damaged_config_is_reported_with_the_path(tmp_path: Path, cache: Path, saved: Path) -> None:
    path = tmp_path / "odd.safetensors"
    tensors = {"encoder.conv_in.weight": torch.zeros(1), "decoder.conv_in.weight": torch.zeros(1, 4)}
    save_tensors(path, tensors, {"sdxl.config": json.dumps({"vae": {"oops": 1}})})
    with pytest.raises(FileError, match=r"odd\.safetensors: .*oops"):
        locate(str(path), "vae")

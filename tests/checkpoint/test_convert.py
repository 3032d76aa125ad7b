"""From layout to layout and precision to precision: diffusers runs what we write, and the way back is exact."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from sdxl_cli.checkpoint import stream
from sdxl_cli.checkpoint.locate import BUNDLED, locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.checkpoint.write import save_model, save_tensors, save_vae
from sdxl_cli.cli import run
from sdxl_cli.model.config import ModelConfig, TextTowerConfig
from sdxl_cli.model.sdxl import SDXL

diffusers = pytest.importorskip("diffusers")

Build = Callable[[ModelConfig], SDXL]
Capture = pytest.CaptureFixture[str]
F32 = torch.float32


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr("socket.socket.connect", no_network)


def no_network(*args: object) -> None:
    raise AssertionError("something wants the network")


def worded(config: ModelConfig) -> ModelConfig:
    """With CLIP's whole vocabulary, so that prompts can be read."""

    def full(tower: TextTowerConfig | None) -> Any:
        return replace(tower, vocab_size=49408) if tower else None

    return replace(config, clip_l=full(config.clip_l), big_g=full(config.big_g))


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory, small_config: ModelConfig, small_refiner_config: ModelConfig
) -> Path:
    """Files of a small base, refiner, inpainting model and autoencoder, all in fp16 but the last."""
    folder = tmp_path_factory.mktemp("models")
    small, refiner = worded(small_config), worded(small_refiner_config)
    inpaint = replace(small, unet=replace(small.unet, in_channels=9))
    for name, config in (("base", small), ("refiner", refiner), ("inpaint", inpaint)):
        model = filled(config)
        save_model(
            folder / f"{name}.safetensors",
            model,
            config,
            dtype=torch.float16,
            metadata={"modelspec.author": "ünïcode", "my.note": "kept"},
        )
    save_vae(folder / "vae.safetensors", filled(small).vae, small.vae)
    return folder


def filled(config: ModelConfig) -> SDXL:
    torch.manual_seed(0)
    model = SDXL(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # around 1/sqrt(width), so that differences of networks are seen and nothing saturates
            parameter.normal_(std=0.15).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def convert(*args: object) -> int:
    return run(["convert", *map(str, args), "--quiet"])


def tensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(path)


def metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("name", ["base", "refiner", "inpaint"])
def test_there_and_back_is_the_same_file(name: str, saved: Path) -> None:
    original = saved / f"{name}.safetensors"
    assert convert(original, "folder") == 0
    assert convert("folder", "back.safetensors") == 0
    assert Path("back.safetensors").read_bytes() == original.read_bytes()


def test_the_bundled_model_and_its_vocabulary_survive_the_way_there_and_back() -> None:
    assert convert("bundled", "folder") == 0
    table = tensors(Path("folder/text_encoder_2/model.safetensors"))
    assert table["text_model.embeddings.token_embedding.weight"].shape[0] == 49408
    assert convert("folder", "back.safetensors") == 0
    original = BUNDLED / "base.safetensors"
    ours, theirs = tensors(Path("back.safetensors")), tensors(original)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    assert metadata(Path("back.safetensors")) == metadata(original)


@torch.no_grad()
def test_diffusers_makes_the_same_pictures_of_a_converted_base(saved: Path) -> None:
    """The pipeline as anybody loads it, offline; its latents against ours with its own noise and schedule."""
    assert convert(saved / "base.safetensors", "folder", "--dtype", "fp32") == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained("folder", local_files_only=True)
    ours = load_model(locate(str(saved / "base.safetensors")), dtype=F32, vae_dtype=F32)
    prompt = "A red Guitar, 100% naïve café — in Σ"
    theirs = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    ids = clip_ids(prompt)
    text = ours.conditioner.text(ids, torch.where(after_the_end(ids), 0, ids))
    assert relative(text.crossattn, theirs[0]) < 1e-5
    assert relative(text.pooled, theirs[2]) < 1e-5

    side = 16
    x, t = torch.randn(1, 4, side, side), torch.tensor([621])
    numbers = torch.tensor([[64.0, 48, 0, 8, 64, 64]])
    scalars = pipe.unet.add_time_proj(numbers.flatten()).reshape(1, -1)
    added = {"text_embeds": theirs[2], "time_ids": numbers}
    expected = pipe.unet(x, t, theirs[0], added_cond_kwargs=added).sample
    assert relative(ours.unet(x, t, text.crossattn, torch.cat([text.pooled, scalars], 1)), expected) < 1e-5
    assert relative(ours.vae.decode(x), pipe.vae.decode(x).sample) < 1e-5
    assert pipe.vae.config.scaling_factor == ours.config.vae.scale_factor
    picture = pipe(prompt, num_inference_steps=2, height=64, width=64, output_type="np").images
    assert picture.shape == (1, 64, 64, 3)
    assert picture.std() > 0


@torch.no_grad()
def test_diffusers_runs_a_converted_refiner(saved: Path) -> None:
    assert convert(saved / "refiner.safetensors", "folder", "--dtype", "fp32") == 0
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained("folder", local_files_only=True)
    assert pipe.text_encoder is None
    assert pipe.config.requires_aesthetics_score
    assert not pipe.config.force_zeros_for_empty_prompt
    ours = load_model(locate("folder", "refiner"), dtype=F32, vae_dtype=F32)
    theirs = pipe.encode_prompt("a chair", device="cpu", do_classifier_free_guidance=False)
    ids = clip_ids("a chair")
    text = ours.conditioner.text(None, torch.where(after_the_end(ids), 0, ids))
    assert relative(text.crossattn, theirs[0]) < 1e-5
    assert relative(text.pooled, theirs[2]) < 1e-5
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = pipe("a chair", image=picture, num_inference_steps=4, strength=0.5, output_type="np").images
    assert made.shape == (1, 64, 64, 3)


def test_diffusers_loads_a_converted_inpainting_model(saved: Path) -> None:
    assert convert(saved / "inpaint.safetensors", "folder") == 0
    pipe = diffusers.StableDiffusionXLInpaintPipeline.from_pretrained("folder", local_files_only=True)
    assert pipe.unet.config.in_channels == 9
    assert locate("folder", "any").identity.kind == "inpaint"


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def clip_ids(text: str) -> Tensor:
    """open_clip's own tokenizer, with CLIP-L's padding: [1, 77]."""
    import open_clip

    ids = open_clip.tokenizer.SimpleTokenizer()(text)
    return torch.where(after_the_end(ids), 49407, ids)


def after_the_end(ids: Tensor) -> Tensor:
    return (ids == 49407).cumsum(1).sub((ids == 49407).int()) > 0


@pytest.mark.parametrize("pad", [("tokenizer", 49407), ("tokenizer_2", 0)])
def test_the_tokenizers_read_like_open_clips(pad: tuple[str, int], saved: Path) -> None:
    import open_clip
    from transformers import CLIPTokenizer

    assert convert(saved / "base.safetensors", "folder", "--parts", "text") == 0
    theirs = CLIPTokenizer.from_pretrained(f"folder/{pad[0]}", local_files_only=True)
    reference = open_clip.tokenizer.SimpleTokenizer()
    # no "!", which is id 0 for a tokenizer that pads with it, here as in the released folder
    texts = [
        "",
        "a red guitar",
        "Ünïcödé ßtraße 東京",
        "it's 3.14 (really)??",
        "x" * 300,
        "🎸 emoji, #tags_and:more",
    ]
    for text in texts:
        ids = reference(text)
        expected = torch.where(after_the_end(ids), pad[1], ids)[0].tolist()
        got = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert got == expected, text
    assert theirs.model_max_length == 77


def test_shards_and_variants_as_diffusers_names_them(saved: Path) -> None:
    assert (
        convert(saved / "base.safetensors", "folder", "--variant", "fp16", "--max-shard-size", "500kB") == 0
    )
    unet = Path("folder/unet")
    index = json.loads((unet / "diffusion_pytorch_model.safetensors.index.fp16.json").read_text())
    files = sorted(unet.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"diffusion_pytorch_model.fp16-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * 2 for file in files for tensor in tensors(file).values()
    )
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        "folder", variant="fp16", torch_dtype=torch.float16, local_files_only=True
    )
    stored = {key: value for file in files for key, value in tensors(file).items()}
    assert all(torch.equal(value, stored[key]) for key, value in pipe.unet.state_dict().items())
    assert convert("folder", "back.safetensors", "--variant", "fp16") == 0
    assert Path("back.safetensors").read_bytes() == (saved / "base.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_every_weight_is_cast_and_nothing_else(name: str, dtype: torch.dtype, saved: Path) -> None:
    source = saved / "base.safetensors"
    assert convert(source, "cast.safetensors", "--dtype", name) == 0
    before, after = tensors(source), tensors(Path("cast.safetensors"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        wanted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        assert after[key].dtype == wanted.dtype
        assert torch.equal(after[key], wanted)
    notes = metadata(Path("cast.safetensors"))
    assert notes["modelspec.hash_sha256"] != metadata(source)["modelspec.hash_sha256"]
    assert {k: v for k, v in notes.items() if "hash" not in k} == {
        k: v for k, v in metadata(source).items() if "hash" not in k
    }


def test_fp8_is_for_matrices(saved: Path) -> None:
    assert convert(saved / "base.safetensors", "fp8.safetensors", "--dtype", "fp8_e4m3") == 0
    for key, tensor in tensors(Path("fp8.safetensors")).items():
        vector = tensor.ndim < 2 or key.startswith("first_stage_model.") or "embedding" in key
        expected = torch.int64 if "position_ids" in key else torch.float16 if vector else torch.float8_e4m3fn
        assert tensor.dtype == expected, key
    before = tensors(saved / "base.safetensors")
    loaded = load_model(locate("fp8.safetensors"), dtype=F32, vae_dtype=F32).state_dict()
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert torch.equal(loaded[name], before[name].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [(7e4, "fp16", 4), (500.0, "fp8_e4m3", 4), (7e4, "bf16", 0), (float("nan"), "fp16", 0)],
)
def test_numbers_too_large_for_the_new_dtype_are_an_error(
    value: float, dtype: str, code: int, small_config: ModelConfig, capsys: Capture
) -> None:
    state = filled(small_config).state_dict()
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    state[name][0, 0, 0, 0] = value
    save_model("big.safetensors", state, small_config)
    assert convert("big.safetensors", "out.safetensors", "--dtype", dtype) == code
    told = capsys.readouterr().err
    assert Path("out.safetensors").exists() == (code == 0)
    if code:
        assert f"{name} reaches {value:g}, more than" in told
    elif value != value:
        assert f"NaN or infinity, as in the source, in 1 tensors: {name}" in told


def test_another_autoencoder_is_put_in(saved: Path, small_config: ModelConfig) -> None:
    config = replace(small_config.vae, channels=8, scale_factor=0.9)
    save_vae("other.safetensors", filled(replace(small_config, vae=config)).vae, config)
    assert convert(saved / "base.safetensors", "new.safetensors", "--vae", "other.safetensors") == 0
    files = locate("new.safetensors")
    assert files.config.vae == config
    after, other = tensors(Path("new.safetensors")), tensors(Path("other.safetensors"))
    inside = {
        k.removeprefix("first_stage_model."): v
        for k, v in after.items()
        if k.startswith("first_stage_model.")
    }
    assert inside.keys() == other.keys()
    assert all(torch.equal(inside[key], other[key]) for key in other)
    assert convert("new.safetensors", "folder") == 0
    assert json.loads(Path("folder/vae/config.json").read_text())["scaling_factor"] == 0.9


def test_an_autoencoder_alone_in_both_layouts(saved: Path) -> None:
    assert convert(saved / "vae.safetensors", "vae") == 0
    loaded = diffusers.AutoencoderKL.from_pretrained("vae", local_files_only=True)
    assert loaded.config.scaling_factor == 0.5
    assert convert("vae", "back.safetensors") == 0
    assert Path("back.safetensors").read_bytes() == (saved / "vae.safetensors").read_bytes()
    assert convert(saved / "base.safetensors", "taken.safetensors", "--parts", "vae") == 0
    assert tensors(Path("taken.safetensors")).keys() == tensors(Path("back.safetensors")).keys()
    assert locate("taken.safetensors", "vae").config.vae == locate("vae", "vae").config.vae


def test_parts(saved: Path, capsys: Capture) -> None:
    assert convert(saved / "base.safetensors", "unet.safetensors", "--parts", "unet") == 0
    assert all(key.startswith("model.diffusion_model.") for key in tensors(Path("unet.safetensors")))
    assert convert(saved / "base.safetensors", "half", "--parts", "unet,text") == 0
    assert sorted(path.name for path in Path("half").iterdir()) == [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "unet",
    ]
    diffusers.UNet2DConditionModel.from_pretrained("half/unet", local_files_only=True)
    assert convert(saved / "vae.safetensors", "x.safetensors", "--parts", "unet") == 2
    assert "is a VAE and has no such part" in capsys.readouterr().err
    assert convert(saved / "base.safetensors", "x.safetensors", "--parts", "unte") == 2
    assert "unknown part 'unte'; did you mean unet?" in capsys.readouterr().err


def test_a_folder_of_diffusers_itself_becomes_a_single_file(saved: Path) -> None:
    """Without our notes: what only the single file has is made up as in the released one."""
    assert convert(saved / "base.safetensors", "ours") == 0
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained("ours", torch_dtype=torch.float16)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    pipe.save_pretrained("theirs")
    assert convert("theirs", "theirs.safetensors") == 0
    ours, before = tensors(Path("theirs.safetensors")), tensors(saved / "base.safetensors")
    assert ours.keys() - before.keys() == {"v_pred", "ztsnr"}
    assert before.keys() - ours.keys() == {"conditioner.embedders.1.model.logit_scale"}
    assert all(torch.equal(ours[key], before[key]) for key in before if key in ours)
    files = locate("theirs.safetensors")
    assert (files.prediction, files.identity.zero_terminal_snr) == ("v", True)
    assert files.config == locate(str(saved / "base.safetensors")).config
    # and into a folder, where the scheduler says it
    assert convert("theirs.safetensors", "again") == 0
    assert locate("again").prediction == "v"
    assert convert("again", "again.safetensors") == 0
    assert Path("again.safetensors").read_bytes() == Path("theirs.safetensors").read_bytes()


def test_a_ckpt_becomes_a_safetensors_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, small_config: ModelConfig
) -> None:
    config = worded(small_config)
    monkeypatch.setattr("sdxl_cli.checkpoint.identify.BASE", config)
    state = tensors(saved / "base.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, "old.ckpt")
    assert convert("old.ckpt", "new.safetensors") == 0
    after = tensors(Path("new.safetensors"))
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert metadata(Path("new.safetensors"))["modelspec.sai_model_spec"] == "1.0.1"


def test_large_tensors_of_no_part_are_named_when_they_are_left_behind(saved: Path, capsys: Capture) -> None:
    state = tensors(saved / "base.safetensors")
    notes = metadata(saved / "base.safetensors")
    extra = {"model_ema.everything": torch.ones(1 << 20), "denoiser.sigmas": torch.arange(1000.0)}
    save_tensors("ema.safetensors", state | extra, notes)
    assert convert("ema.safetensors", "folder") == 0
    assert "has no place for 1 tensors: model_ema.everything" in capsys.readouterr().err
    assert convert("folder", "back.safetensors") == 0
    assert tensors(Path("back.safetensors")).keys() == state.keys() | {"denoiser.sigmas"}


def test_nothing_is_replaced(saved: Path, capsys: Capture) -> None:
    Path("out.safetensors").write_text("mine")
    Path("dir").mkdir()
    for target in ("out.safetensors", "dir"):
        assert convert(saved / "base.safetensors", target) == 3
        assert f"{target} exists already" in capsys.readouterr().err
    assert Path("out.safetensors").read_text() == "mine"
    assert not list(Path("dir").iterdir())


@pytest.mark.parametrize("target", ["folder", "file.safetensors"])
def test_room_is_checked_first_and_nothing_stays_behind(
    target: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    usage = shutil.disk_usage(".")._replace(free=1_000_000)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage)
    assert convert(saved / "base.safetensors", target) == 1
    assert "the disk has 1.0 MB free; make room" in capsys.readouterr().err
    assert [path for path in Path().iterdir() if path.name != "cache"] == []


def test_an_interruption_leaves_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdxl_cli.checkpoint.stream._write_all", interrupted)
    for target in ("folder", "file.safetensors"):
        assert convert(saved / "base.safetensors", target) == 130
    assert [path for path in Path().iterdir() if path.name != "cache"] == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["out.ckpt"], "is the name of a file, and a diffusers folder is asked for"),
        (["out", "--to", "single"], "a single file is written as .safetensors"),
        (["out", "--to", "diffuser"], "did you mean diffusers?"),
        (["out", "--dtype", "fp61"], "did you mean fp16"),
        (["out", "--max-shard-size", "big"], "give a size such as 10GB"),
    ],
)
def test_wrong_flags(args: list[str], says: str, saved: Path, capsys: Capture) -> None:
    assert convert(saved / "base.safetensors", *args) == 2
    assert says in capsys.readouterr().err


def test_a_network_diffusers_has_no_words_for(small_config: ModelConfig, capsys: Capture) -> None:
    odd = replace(small_config, unet=replace(small_config.unet, transformer_depth_middle=1))
    save_model("odd.safetensors", filled(odd), odd)
    assert convert("odd.safetensors", "folder") == 3
    assert "convert it to a single file" in capsys.readouterr().err


def test_memory_is_that_of_one_tensor(saved: Path) -> None:
    """A file of 96 MB, of which neither the tensors nor the pages stay in memory."""
    extra = {f"model.diffusion_model.more.{index}": torch.ones(2 << 20) for index in range(12)}
    state, notes = tensors(saved / "vae.safetensors"), metadata(saved / "base.safetensors")
    save_tensors("large.safetensors", state | extra | tensors(saved / "base.safetensors"), notes)
    code = (
        "import resource\nfrom sdxl_cli.cli import run\nfrom sdxl_cli.checkpoint import convert\n"
        "from sdxl_cli.generation.prompt import Tokenizer\nTokenizer.default()\n"
        "for args in (['warm', '--parts', 'vae'], ['a.safetensors'], ['folder', '--dtype', 'bf16']):\n"
        "    assert run(['convert', 'large.safetensors', *args, '--quiet']) == 0\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, *after = map(int, done.stdout.split()[1::2])
    assert max(after) - before < 48 << 10  # kilobytes; a tensor is 8 MB, twice that while it is cast

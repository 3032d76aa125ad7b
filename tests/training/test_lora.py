"""Whole LoRA runs as the command makes them: what is in the state and the file, and what going on from them gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_cli import cli
from sdxl_cli.checkpoint.files import remembered_sha256
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.lora import Lora, LoraMerge, WornLora, fit
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.checkpoint.tensor_file import TensorFile
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training import unet_run
from sdxl_cli.training.adapted import Adapter
from sdxl_cli.training.config import EmbeddingConfig, LoraConfig, OptimizerConfig
from sdxl_cli.training.lora_run import learn_lora
from sdxl_cli.training.session import Share
from sdxl_cli.training.state import load_state
from sdxl_cli.training.unet_request import UNetRequest, starting_points
from sdxl_cli.training.unet_run import train_unet, try_unet
from sdxl_cli.training.unet_task import UNetTask
from tests.training.files import assert_same_bits, tensors
from tests.training.small import SMALL_REFINER, unet_config

LORA = LoraConfig(rank=2, alpha=4.0)


def config(**changes: Any) -> Any:
    return unet_config(**{"lora": LORA, "ema_decay": 0.0, "text_dropout": 0.0, "max_steps": 3} | changes)


@pytest.fixture
def asked(manifest: Path, base_file: Path, latents: Path, tmp_path: Path) -> UNetRequest:
    """Three steps of a LoRA for U-Net and text encoders."""
    return UNetRequest(
        data=manifest, output=tmp_path / "run", config=config(), init=str(base_file), cache=latents
    )


def evaluated(model: SDXL) -> torch.Tensor:
    """Something that everything which a LoRA changes has a part in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    ids = torch.tensor([[49406, 320, 736, 49407, *[0] * 73], [49406, 736, 1449, 320, 49407, *[0] * 72]])
    text = model.conditioner.text(ids, ids)
    y = torch.cat([text.pooled, torch.randn(2, 6 * 32, generator=generator)], dim=1)
    with torch.no_grad():
        return model.unet(x, torch.tensor([10, 700]), text.crossattn, y)


def worn(base: str, lora: Path) -> SDXL:
    files = locate(base, "model")
    merge = LoraMerge([WornLora(fit(Lora(lora), files), 1.0, 1.0)])
    return load_model(files, ("unet", "text"), dtype=torch.float32, vae_dtype=torch.float32, merge=merge)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_the_file_makes_of_the_base_the_model_that_was_trained(
    dora: bool, asked: UNetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[SDXL] = []
    original = unet_run.learn_lora
    monkeypatch.setattr(unet_run, "learn_lora", lambda *args: (trained.append(args[1]), original(*args))[1])
    lora = replace(LORA, dora=dora, conv_rank=1, targets=(*LORA.targets, "convolutions"))
    result = train_unet(replace(asked, config=config(lora=lora)))
    assert result.path.name == "lora.safetensors"
    expected = evaluated(trained[0].eval())
    torch.testing.assert_close(evaluated(worn(str(asked.init), result.path)), expected, rtol=1e-4, atol=1e-5)
    before = load_model(
        locate(asked.init, "model"), ("unet", "text"), dtype=torch.float32, vae_dtype=torch.float32
    )
    assert float((evaluated(before) - expected).abs().max()) > 1e-3


def test_the_state_has_the_adapters_alone_and_two_halves_are_a_whole(asked: UNetRequest) -> None:
    """With dropout, whose random numbers are the step's too, and averages."""
    make = {"lora": replace(LORA, dropout=0.3), "ema_decay": 0.9}
    rate = replace(config().loop.optimizer, decay_steps=0)
    whole = replace(asked, config=config(**make, optimizer=rate, max_steps=4))
    halves = replace(whole, output=asked.output.parent / "halves")
    train_unet(whole)
    train_unet(replace(halves, config=config(**make, optimizer=rate, max_steps=2)))
    train_unet(replace(halves, resume=True))
    (one, _), (other, _) = load_state(whole.output), load_state(halves.output)
    assert_same_bits(one, other)
    first, second = (tensors(run.output / "lora.safetensors") for run in (whole, halves))
    assert_same_bits(first, second)
    assert all("adapter" in name for name in one if not name.startswith("random."))
    base = Path(str(asked.init)).stat().st_size
    assert sum(value.nbytes for value in one.values()) < base / 4


def test_validation_leaves_nothing_of_the_change_out(
    asked: UNetRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is of training."""
    seen: list[tuple[str, bool]] = []

    def watched(name: str) -> Any:
        original = getattr(UNetTask, name)

        def call(task: UNetTask, *args: Any) -> Any:
            seen.append((name, any(m.training for m in task.module.modules() if isinstance(m, Adapter))))
            return original(task, *args)

        return call

    for name in ("step", "evaluate"):
        monkeypatch.setattr(UNetTask, name, watched(name))
    drops = config(lora=replace(LORA, dropout=0.5), validate_every=1, max_steps=2)
    train_unet(replace(asked, config=drops, validation=asked.data))
    assert set(seen) == {("step", True), ("evaluate", False)}
    assert [name for name, _ in seen].index("evaluate") < len(seen) - 1 - [n for n, _ in seen][::-1].index(
        "step"
    )


@pytest.mark.parametrize("part", [{}, {"lora": LoraConfig(), "embedding": EmbeddingConfig(word="x")}])
def test_what_begins_at_zero_is_not_for_adafactor(part: dict[str, Any]) -> None:
    """Its rate is relative to the weight: with 1e-4 a LoRA would be nothing after 1500 steps."""
    optimizer = OptimizerConfig(name="adafactor")
    with pytest.raises(UsageError, match="give --optimizer adamw, adamw8bit or prodigy"):
        config(optimizer=optimizer, train_text_encoders=False, **part)
    assert unet_config(optimizer=optimizer).loop.optimizer == optimizer


def test_averages_are_what_is_shipped(asked: UNetRequest) -> None:
    train_unet(replace(asked, config=config(ema_decay=0.9)))
    state, _ = load_state(asked.output)
    name = next(name for name in state if name.startswith("ema.") and "attn2.to_k.adapter.up" in name)
    shipped = tensors(asked.output / "lora.safetensors")
    path = name.removeprefix("ema.model.diffusion_model.").removesuffix(".adapter.up").replace(".", "_")
    assert torch.equal(shipped[f"lora_unet_{path}.lora_up.weight"], state[name])
    assert not torch.equal(state[name], state["weights." + name.removeprefix("ema.")])


def test_front_ends_are_told_what_kohya_tells_them(asked: UNetRequest) -> None:
    path = train_unet(replace(asked, config=config(save_dtype="fp16"))).path
    file = TensorFile(path)
    notes = file.metadata
    body = remembered_sha256(path, body=True)
    assert notes["sshs_model_hash"] == body
    assert notes["modelspec.hash_sha256"] == f"0x{body}"
    assert Lora(path).short_hash == body[:12]
    assert notes["modelspec.architecture"] == "stable-diffusion-xl-v1-base/other-size/lora"
    assert (notes["ss_network_module"], notes["ss_network_dim"]) == ("networks.lora", "2")
    assert (notes["ss_output_name"], notes["modelspec.title"]) == ("run", "run"), "the folder's, as it tells"
    assert (notes["ss_network_alpha"], notes["ss_steps"], notes["ss_epoch"]) == ("4.0", "3", "0")
    assert notes["ss_new_sd_model_hash"] == locate(asked.init, "model").sha256
    (frequency,) = json.loads(notes["ss_tag_frequency"]).values()
    assert frequency["a red disc"] == 2, "two of the seven pictures"
    sizes = {
        tuple(b["resolution"]): b["count"] for b in json.loads(notes["ss_bucket_info"])["buckets"].values()
    }
    assert sizes == {(64, 64): 5, (80, 40): 2}
    assert {file.read(name).dtype for name in file.shapes if ".lora_" in name} == {torch.float16}
    kinds = {name.split("_", 2)[1] for name in file.shapes}
    assert kinds == {"unet", "te1", "te2"}


def test_a_file_knows_of_all_processes(asked: UNetRequest, tmp_path: Path) -> None:
    """Of four that it began with, two go on: each has half of every batch, one part after the other."""
    model = load_model(
        locate(asked.init, "model"), ("unet", "text"), dtype=torch.float32, vae_dtype=torch.float32
    )
    asked = replace(asked, config=config(batch_size=2, accumulate=3))
    share = Share(processes=2, began_with=4, parts=2)
    export = learn_lora(asked, model, read_manifest(Path(str(asked.data))), 12, share)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    export.write(tmp_path / "lora.safetensors", trained, 5)
    notes = TensorFile(tmp_path / "lora.safetensors").metadata
    assert (notes["ss_total_batch_size"], notes["ss_gradient_accumulation_steps"]) == ("24", "3")
    assert notes["ss_epoch"] == "2", "of 5 steps of 6 batches, 12 batches an epoch"


def test_kohyas_script_names_the_released_model_so() -> None:
    from sdxl_cli.checkpoint.write import modelspec
    from sdxl_cli.model.config import BASE
    from sdxl_cli.training.lora_notes import _VERSIONS

    assert modelspec(Path("x"), BASE, None)["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert _VERSIONS[False] == "sdxl_base_v1-0"


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_a_lora_can_be_gone_on_from(layout: Any, asked: UNetRequest, tmp_path: Path) -> None:
    """At a rate too small to matter the second file is the first."""
    lora = replace(LORA, layout=layout, dora=True)
    first = train_unet(replace(asked, config=config(lora=lora))).path
    rate = replace(config().loop.optimizer, learning_rate=1e-12, weight_decay=0.0)
    start, found = starting_points(asked.init, str(first), config(lora=lora))
    assert (start, found) == (asked.init, str(first))
    again = replace(asked, lora=found, output=tmp_path / "again", config=config(lora=lora, optimizer=rate))
    second = tensors(train_unet(again).path)
    for name, value in tensors(first).items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-7)
    other = config(lora=replace(lora, rank=3))
    with pytest.raises(UsageError, match=r"rank 2, alpha 4 and DoRA; here it has rank 3, alpha 4"):
        train_unet(replace(again, output=tmp_path / "other", config=other))
    fewer = config(lora=replace(lora, targets=("feedforward",)))
    with pytest.raises(FileError, match=r"not trained here.*lora\.targets"):
        train_unet(replace(again, output=tmp_path / "fewer", config=fewer))


def test_a_lora_is_no_start_for_a_whole_model(asked: UNetRequest) -> None:
    lora = str(train_unet(replace(asked, config=config(max_steps=1))).path)
    with pytest.raises(UsageError, match="is a LoRA; give --preset lora"):
        starting_points(None, lora, unet_config())
    with pytest.raises(UsageError, match="both name a model"):
        starting_points(asked.init, asked.init, unet_config())
    assert starting_points(None, asked.init, unet_config()) == (asked.init, None)


def test_another_base_is_another_run(asked: UNetRequest, tmp_path: Path) -> None:
    from tests.training.small import SMALL

    train_unet(replace(asked, config=config(max_steps=1)))
    save_model(tmp_path / "other.safetensors", SDXL(SMALL), SMALL)
    with pytest.raises(FileError, match=r"of another run \(base changed\)"):
        train_unet(replace(asked, init=str(tmp_path / "other.safetensors"), vae=asked.init, resume=True))


def test_a_refiner_learns_a_lora(manifest: Path, tmp_path: Path) -> None:
    base = tmp_path / "refiner.safetensors"
    save_model(base, SDXL(SMALL_REFINER), SMALL_REFINER)
    asked = UNetRequest(
        data=manifest, output=tmp_path / "run", config=config(model="small-refiner"), init=str(base)
    )
    path = train_unet(asked).path
    files = locate(str(base), "model")
    assert fit(Lora(path), files).unmatched == ()
    assert TensorFile(path).metadata["modelspec.architecture"].startswith("stable-diffusion-xl-v1-refiner/")


def test_targets_are_groups_ends_of_paths_and_patterns(asked: UNetRequest) -> None:
    frozen = {"train_text_encoders": False, "max_steps": 1}

    def names(*targets: str, **changes: Any) -> set[str]:
        output = asked.output.parent / targets[0].replace("*", "x")
        lora = replace(LORA, targets=targets)
        asking = replace(asked, output=output, config=config(lora=lora, **(frozen | changes)))
        return {name.partition(".")[0] for name in tensors(train_unet(asking).path)}

    keys = names("attn2.to_k", "conv_out")
    assert keys == {n for n in keys if n.endswith("attn2_to_k")} | {"lora_unet_out_2"}
    assert len(keys) > 4
    middle = names("unet.middle_block.*to_q")
    assert {n.partition("_transformer")[0] for n in middle} == {"lora_unet_middle_block_1"}
    for target in ("atention", "unet.nowhere.*"):
        with pytest.raises(UsageError, match=r"lora\.targets"):
            names(target)


def test_the_frozen_weights_are_kept_in_what_is_computed_in(asked: UNetRequest, tmp_path: Path) -> None:
    """With pictures made in between, which have to bear both precisions."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc --w 64 --h 64 --s 2 --d 3\n")
    seen: dict[str, Any] = {}

    class Look:
        def after_step(self, run: Any, done: int) -> None:
            seen.update({n: p.dtype for n, p in run.task.module.named_parameters()})

    from sdxl_cli.commands import generate
    from sdxl_cli.commands._working import aliases, read_prompts
    from sdxl_cli.generation.request import GenerateRequest

    lines = tuple(read_prompts(prompts, aliases(generate.command, GenerateRequest)))
    original = unet_run._watchers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet_run, "_watchers", lambda *args: [*original(*args), Look()])
        bf16 = config(dtype="bf16", max_steps=2)
        result = train_unet(replace(asked, config=bf16, sample_lines=lines))
    kinds = {
        (("adapter" in name), dtype)
        for name, dtype in seen.items()
        if "norm" not in name and "weight" in name
    }
    assert (False, torch.bfloat16) in kinds
    assert {dtype for name, dtype in seen.items() if "adapter" in name} == {torch.float32}
    assert (asked.output / "samples" / "000002-0.png").exists()
    command = (asked.output / "samples" / "commands.txt").read_text()
    assert f"--model {asked.init} --lora {result.path}" in command
    exact = train_unet(replace(asked, output=tmp_path / "fp32", config=config(max_steps=2)))
    assert result.loss == pytest.approx(exact.loss, rel=0.02)
    with pytest.raises(UsageError, match="frozen_dtype"):
        train_unet(replace(asked, output=tmp_path / "no", config=config(frozen_dtype="bf16")))


def test_the_command_trains_a_lora_of_any_model_and_generation_wears_it(
    asked: UNetRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: flags, a dry run, a run that validates, a picture with the result."""
    data = ["train-unet", "--preset", "lora", "--data", str(asked.data), "--model", str(asked.init)]
    flags = [
        "-o",
        "run",
        "--rank",
        "3",
        "--alpha",
        "1.5",
        "--dora",
        "--train-text-encoders",
        "--clip-l-lr",
        "2e-5",
    ]
    few = ["--max-steps", "2", "--validation", str(asked.data), "--cache", str(asked.cache), "-q"]
    assert cli.run([*data, *flags, *few, "--dry-run"]) == 0
    assert not Path("run").exists()
    assert cli.run([*data, *flags, *few]) == 0
    notes = TensorFile(Path("run/lora.safetensors")).metadata
    assert notes["ss_network_module"] == "lycoris.kohya"
    assert json.loads(notes["ss_network_args"])["dora_wd"] is True
    assert json.loads(notes["ss_text_encoder_lr"]) == [2e-5, 1e-5]
    assert "validation_loss" in Path("run/metrics.jsonl").read_text()
    capsys.readouterr()
    picture = ["generate", "a red disc", "--model", str(asked.init), "--steps", "2", "--size", "64x64"]
    assert cli.run([*picture, "--lora", "run/lora.safetensors", "-o", "with.png"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "layers matched, rank 3 DoRA" in said
    assert "not in" not in said


def test_prodigy_says_which_rates_of_the_preset_are_in_its_way(
    asked: UNetRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("prodigyopt")
    command = ["train-unet", "--preset", "lora", "--data", str(asked.data), "--model", str(asked.init)]
    command += ["--cache", str(asked.cache), "-o", "run", "--max-steps", "2", "-q"]
    command += ["--train-text-encoders", "--optimizer", "prodigy", "--learning-rate", "1"]
    assert cli.run(command) == 2
    said = capsys.readouterr().err
    assert "prodigy finds one rate for all parts, and rates has others for clip_l and big_g" in said
    sets = said.strip().rpartition("; give ")[2].split()
    assert sets == ["--set", "loop.optimizer.rates.clip_l=1", "--set", "loop.optimizer.rates.big_g=1"]
    assert cli.run([*command, *sets]) == 0
    alone = [word for word in command if word != "--train-text-encoders"]
    assert cli.run([*alone, "-o", "alone"]) == 0


def test_a_dry_run_of_a_lora_is_one(asked: UNetRequest) -> None:
    assert try_unet(asked).memory > 0
    assert not asked.output.exists()

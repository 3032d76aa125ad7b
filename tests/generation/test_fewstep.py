"""Few-step models: what they are known by, what they get, and what they are warned of."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest

from sdxl_cli import cli
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.identify import Identity
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.generation.fewstep import FAMILIES, FewSteps, clashes, detect
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.model.config import BASE as SDXL_BASE
from tests.generation.conftest import BASE, random_model


def files(name: str, title: str = "", config: Any = SDXL_BASE) -> ModelFiles:
    identity = Identity(kind="base", label="an SDXL base model", config=config, title=title)
    return ModelFiles(
        name=name, path=Path(name), layout="original", components=(), identity=identity, config=config
    )


class Heard:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize(
    ("name", "steps", "cfg", "sampler", "scheduler", "size"),
    [
        ("sd_xl_turbo_1.0_fp16", 4, 1, "euler_a", "trailing", "512x512"),
        ("sdxl-turbo", 4, 1, "euler_a", "trailing", "512x512"),
        ("sdxl_lightning_1step_x0", 1, 1, "euler", "trailing", None),
        ("sdxl_lightning_2step", 2, 1, "euler", "trailing", None),
        ("sdxl_lightning_4step_unet", 4, 1, "euler", "trailing", None),
        ("SDXL-Lightning-8steps", 8, 1, "euler", "trailing", None),
        ("Hyper-SDXL-1step-Unet-Comfyui.fp16", 1, 1, "lcm", "auto", None),
        ("Hyper-SDXL-4steps-merged", 4, 1, "ddim", "trailing", None),
        ("juggernaut_dmd2", 4, 1, "lcm", "trailing", None),
        ("dmd2_sdxl_1step_unet", 1, 1, "lcm", "auto", None),
        ("my-sdxl-lcm", 4, 1, "lcm", "lcm", None),
        ("dreamshaperXL_v21TurboDPMSDE", 6, 2, "dpmpp_sde", "karras", None),
        ("juggernautXL_v9Rdphoto2Lightning", 6, 2, "dpmpp_sde", "karras", None),
    ],
)
def test_published_names_get_what_their_pages_say(
    name: str, steps: int, cfg: float, sampler: str, scheduler: str, size: str | None
) -> None:
    request = FewSteps((), Heard())(GenerateRequest(prompt="x"), [files(name)])
    found = (request.steps, request.cfg_scale, request.sampler, request.scheduler, request.size)
    assert found == (steps, cfg, sampler, scheduler, size)
    plan = plan_generation(request, SDXL_BASE)
    assert plan.steps == steps


@pytest.mark.parametrize(
    ("lora", "label", "steps"),
    [
        ("loras/sdxl_lightning_4step_lora.safetensors:0.9", "SDXL-Lightning", 4),
        ("Hyper-SDXL-1step-lora.safetensors", "Hyper-SD", 1),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors:1:0.5", "Hyper-SD, guidance kept", 8),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "DMD2", 4),
        ("lcm-lora-sdxl/pytorch_lora_weights.safetensors", "LCM", 4),
        ("TCD-SDXL-LoRA.safetensors", "TCD", 4),
    ],
)
def test_loras_are_known_too(lora: str, label: str, steps: int) -> None:
    found = detect(files("sd_xl_base_1.0"), ["style.safetensors:0.5", lora])
    assert found is not None
    assert (found.family.label, found.steps) == (label, steps)


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("sd_xl_base_1.0", ""),
        ("noobaiXLVpred_v10", ""),
        ("hyperrealism_v3", ""),
        ("film_calcm_xl", ""),
        ("sd_xl_base_1.0", "turbografx_style.safetensors"),
        ("sd_xl_base_1.0", "lightning_magic.safetensors:0.7"),
    ],
)
def test_others_are_not_taken_for_one(name: str, lora: str) -> None:
    assert detect(files(name), [lora] if lora else []) is None


def test_a_title_tells_what_the_name_does_not() -> None:
    found = detect(files("model-7", title="Stable Diffusion XL Turbo"))
    assert found is not None
    assert found.family.label == "SDXL-Turbo"
    assert "by its title" in found.why


def test_a_model_of_the_right_size_keeps_its_own() -> None:
    request = FewSteps((), Heard())(GenerateRequest(prompt="x"), [files("sdxl-turbo", config=BASE)])
    assert request.size is None


def test_what_was_given_stays_and_one_line_says_all() -> None:
    heard = Heard()
    adapt = FewSteps({"cfg_scale", "width"}, heard)
    asked = GenerateRequest(prompt="x", cfg_scale=1.5, width=768, steps=8, scheduler="sgm")
    request = adapt(asked, [files("sdxl-turbo")], {"scheduler"})
    assert (request.cfg_scale, request.width, request.size, request.scheduler) == (1.5, 768, None, "sgm")
    assert (request.steps, request.sampler) == (4, "euler_a")
    adapt(asked, [files("sdxl-turbo")], {"scheduler"})
    assert heard.notes == [
        "few-step model: SDXL-Turbo (by the name of sdxl-turbo); chosen for it: --steps 4, --sampler euler_a; "
        "as you said: --cfg-scale 1.5"
    ]


def test_levels_of_their_own_give_way_to_steps_that_were_given() -> None:
    name = [files("Hyper-SDXL-1step-Unet")]
    assert FewSteps((), Heard())(GenerateRequest(prompt="x"), name).timesteps == "800"
    assert FewSteps({"steps"}, Heard())(GenerateRequest(prompt="x", steps=2), name).timesteps is None


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("sdxl-turbo", {"cfg_scale": 7.0}, "--cfg-scale 7: SDXL-Turbo burns colours above 1"),
        ("sdxl-turbo", {"steps": 30}, "--steps 30: .* beyond 4 steps"),
        ("sdxl_lightning_4step", {"steps": 8}, "--steps 8: .* distilled for exactly 4"),
        ("sdxl_lightning_4step", {"scheduler": "karras"}, "--scheduler karras: .* made for trailing"),
        ("my-lcm", {"sampler": "euler"}, "--sampler euler: LCM needs lcm"),
    ],
)
def test_what_does_not_go_together_is_said(name: str, asked: dict[str, Any], words: str) -> None:
    heard = Heard()
    adapt = FewSteps(asked, heard)
    request = adapt(GenerateRequest(prompt="x", **asked), [files(name)])
    adapt.check(request, [files(name)])
    adapt.check(request, [files(name)])
    assert len(heard.warnings) == 1
    assert re.search(words, heard.warnings[0])


def test_a_refiner_is_said_to_have_little_to_do() -> None:
    found = detect(files("sdxl-turbo"))
    assert found is not None
    plain = FewSteps((), Heard())(GenerateRequest(prompt="x"), [files("sdxl-turbo")])
    assert clashes(found, plain, has_refiner=False) == []
    assert "--refiner" in clashes(found, plain, has_refiner=True)[0]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label + family.pattern)
def test_every_row_agrees_with_itself(family: Any) -> None:
    """Its own values are a request that can be planned, and clash with nothing."""
    values = {"steps": family.steps, "cfg_scale": family.cfg, "sampler": family.sampler}
    request = GenerateRequest(prompt="x", scheduler=family.scheduler, **values, **family.more)
    planned = plan_generation(request, SDXL_BASE).request
    assert planned.sampler == family.sampler
    found = SimpleNamespace(family=family, steps=family.steps)
    assert clashes(found, planned, has_refiner=False) == []  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("my-lcm", {"num_inference_steps": 4}),
        ("dmd2_sdxl_4step", {"timesteps": [999, 749, 499, 249]}),
        ("dmd2_sdxl_1step", {"timesteps": [399]}),
        ("Hyper-SDXL-1step-Unet", {"timesteps": [800]}),
    ],
)
def test_consistency_models_walk_the_timesteps_of_their_pages(name: str, settings: dict[str, Any]) -> None:
    scheduler: Any = diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(**settings)
    request = FewSteps((), Heard())(GenerateRequest(prompt="x"), [files(name)])
    assert plan_generation(request, SDXL_BASE).timesteps == scheduler.timesteps.tolist()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lightning_walks_trailing_timesteps(steps: int) -> None:
    scheduler: Any = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(steps)
    request = FewSteps((), Heard())(GenerateRequest(prompt="x"), [files(f"sdxl_lightning_{steps}step")])
    assert plan_generation(request, SDXL_BASE).timesteps == scheduler.timesteps.tolist()


# As a command ---------------------------------------------------------------------------------------


@pytest.fixture
def sdxl(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*args: object) -> Any:
        code = cli.run([str(arg) for arg in args])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is called one."""
    path = tmp_path_factory.mktemp("few") / "sdxl_lightning_2step.safetensors"
    save_model(path, random_model(BASE, 0), BASE)
    shutil.copy(path, path.with_name("sdxl_lightning_1step_x0.safetensors"))
    return path


def asked_of(result: Any) -> tuple[object, ...]:
    request = json.loads(result.out)["request"]
    return tuple(request[name] for name in ("steps", "cfg_scale", "sampler", "scheduler"))


def test_generate_chooses_only_what_was_left_open(sdxl: Any, lightning: Path) -> None:
    common = ("generate", "a red guitar", "-m", lightning, "--seed", 5, "--json")
    plain = sdxl(*common)
    assert asked_of(plain) == (2, 1.0, "euler", "trailing")
    assert plain.err.count("few-step model: SDXL-Lightning (by the name of sdxl_lightning_2step)") == 1
    assert "base: 2 steps t=999→499" in plain.err
    assert "cfg off" in plain.err
    Path("mine.toml").write_text("steps = 3\n")
    for given, steps in ((("--steps", 3), 3), (("--set", "steps=3"), 3), (("--config", "mine.toml"), 3)):
        result = sdxl(*common, *given)
        assert asked_of(result)[0] == steps
        assert "warning: --steps 3: this SDXL-Lightning was distilled for exactly 2" in result.err
    whole = sdxl(*common, "--preset", "generate", "--steps", 2)
    assert asked_of(whole)[1] == 5.0, "a preset that was asked for is the user's word"


def test_a_one_step_model_gives_the_clean_latent_and_says_so_in_the_picture(
    sdxl: Any, lightning: Path
) -> None:
    one = lightning.with_name("sdxl_lightning_1step_x0.safetensors")
    result = sdxl("generate", "a red guitar", "-m", one, "--seed", 5)
    path = Path(result.out.strip())
    assert "predicts x0" in result.err
    stored = read_record(path)
    assert stored is not None
    assert (stored.request.prediction, stored.request.steps) == ("x0", 1)
    renamed = lightning.with_name("something.safetensors")
    shutil.copy(one, renamed)
    again = sdxl("generate", "--from", path, "-m", renamed, "--no-metadata")
    assert "few-step" not in again.err
    from sdxl_cli.generation.picture import read_pixels

    assert (read_pixels(Path(again.out.strip())) == read_pixels(path)).all()


def test_a_sweep_is_the_users_word(sdxl: Any, lightning: Path) -> None:
    result = sdxl("generate", "a cat", "-m", lightning, "--seed", 5, "--json", "--sweep", "cfg-scale=1,1.5")
    requests = [job["request"] for job in json.loads(result.out)["jobs"]]
    assert [request["cfg_scale"] for request in requests] == [1.0, 1.5]
    assert {request["steps"] for request in requests} == {2}
    assert result.err.count("few-step model") == 1

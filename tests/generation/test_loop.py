"""The whole denoising loop, with steps that are remembered and recorded, on a device without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.generation.checks import FiniteWatch
from sdxl_cli.generation.encode import Prompts
from sdxl_cli.generation.pipeline import Run, started
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.remember import RecordedSteps, Remembering
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.start import Source
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.unet import Prepared, TransformerBlock, UNet
from tests.model.peers import BASE, randomize

META = torch.device("meta")
CONDITIONS = {"adm_scale": "1.5:0.8:0.5", "cfg_interval": "0.2:0.8"}
"""Other sizes at first, and no guidance at both ends."""


class Told(UNet):
    """Is told that the first text is zeros, which it cannot see here, and says when it makes something."""

    def __init__(self) -> None:
        super().__init__(BASE.unet)
        self.made: list[str] = []

    def prepare(self, context: Tensor, y: Tensor) -> Prepared:
        self.made.append("conditions")
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        read = {block: block.attn2.read(context[len(context) // 2 :]) for block in blocks}
        return Prepared(self.label_emb(y), read)

    def shifts(self, timesteps: Tensor, prepared: Prepared) -> Tensor:
        self.made.append(f"{len(timesteps)} timesteps")
        return super().shifts(timesteps, prepared)


class Watching:
    """A reporter that knows what is made inside the loop."""

    def __init__(self, unet: Told) -> None:
        self.unet, self.steps = unet, 0
        self.before: list[str] = []

    def note(self, text: str) -> None:
        pass

    warn = note

    def progress(self, items: Iterable[Any], description: str, *, total: int | None = None) -> Iterator[Any]:
        self.before = self.unet.made[:]
        for item in items:
            self.steps += 1
            yield item


def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    place = work()
    return lambda: None, place


@pytest.fixture
def unet() -> Told:
    with META:
        return Told().requires_grad_(False)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def run(sampler: str, unet: Told, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> Watching:
    """A run as ``generate`` does it; whoever wants to see a number gets an error."""
    monkeypatch.setattr(FiniteWatch, "settle", lambda watch: None)  # reads after the last step
    request = GenerateRequest(prompt="x", seed=5, steps=6, sampler=sampler, **asked)
    plan = plan_generation(request, BASE)
    weights: Any = SimpleNamespace(
        config=BASE, formulation=Formulation(), device=META, dtype=torch.float32, unet=lambda: unet,
        recorded=RecordedSteps(unet, record),
    )  # fmt: skip
    with META:
        text = TextFeatures(torch.empty(1, 77, BASE.unet.context_dim), torch.empty(1, BASE.big_g.embed_dim))
    monkeypatch.setattr("sdxl_cli.generation.encode.conditioning_vector", vector)
    report, walk = Watching(unet), started(plan, [5, 6], weights, Source(vae=BASE.vae))
    assert isinstance(walk, Run)
    walk.advance(weights, Prompts(text, text), plan.steps, report)
    assert walk.latents.is_meta
    assert report.steps == plan.steps
    return report


def vector(*_: object) -> Tensor:
    return torch.empty(1, BASE.unet.adm_in_channels, device=META)


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("asked", [{}, CONDITIONS], ids=["plain", "all conditions"])
def test_no_step_waits_or_makes_what_could_be_made_before(
    sampler: str, asked: dict[str, str], unet: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of a text are looked at once per prompt: that may not be while steps are computed."""
    report = run(sampler, unet, monkeypatch, **asked)
    assert unet.made == report.before
    assert report.before.count("conditions") == (4 if asked else 1)


def test_a_run_has_its_timesteps_in_one_go(unet: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("euler", unet, monkeypatch).before == ["conditions", "6 timesteps"]
    unet.made.clear()
    assert run("heun", unet, monkeypatch).before == ["conditions", "6 timesteps"], (
        "it looks twice at most levels"
    )
    unet.made.clear()
    assert run("dpm2", unet, monkeypatch).before == ["conditions", "11 timesteps"], "half way, too"


def test_a_wait_would_be_noticed(unet: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a number, or copies to the host, cannot be done on that device."""
    step = UNet.step
    for waits in (lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: bool((x == 0).all())):

        def slow(self: UNet, x: Tensor, *rest: Any, waits: Callable[[Tensor], object] = waits) -> Tensor:
            waits(x)
            return step(self, x, *rest)

        monkeypatch.setattr(UNet, "step", slow)
        with pytest.raises(RuntimeError, match="meta"):
            run("euler", unet, monkeypatch)


def test_what_was_not_foreseen_is_made_when_it_is_needed() -> None:
    """With the same bits as beforehand, on a CPU."""
    unet = UNet(BASE.unet).requires_grad_(False)
    randomize(unet)
    text, sizes = torch.randn(2, 7, BASE.unet.context_dim), torch.randn(2, BASE.unet.adm_in_channels)
    foreseen, surprised = Remembering(unet), Remembering(unet)
    foreseen.expect(text, sizes, [999, 500, 250, 3])
    for index in (500, 3, 500, 71):
        x = torch.randn(1, 4, 8, 8)
        assert torch.equal(foreseen(x, index, text, sizes), surprised(x, index, text, sizes))

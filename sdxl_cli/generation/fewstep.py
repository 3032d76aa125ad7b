"""Few-step checkpoints and LoRAs: known by their names, and run as they were made to be.

Distilled models look like any other SDXL inside; only names and titles tell. Each row below has the numbers of the
model's own page: with others such models give noise or burnt colours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.generation.request import GenerateRequest, SamplingRequest
from sdxl_cli.generation.sizes import format_size

TRAILING = ("trailing", "sgm", "sgm_uniform", "simple")
LCM_GRIDS = ("lcm", *TRAILING)
SIZES = ("size", "width", "height", "init_img")
_GENERIC = ("pytorch_lora_weights", "diffusion_pytorch_model", "model")
"""File names that say nothing; their folder does."""


class Told(Protocol):
    """Who hears of what was found."""

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Something to act on."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A way of distilling, and what its models want."""

    label: str
    pattern: str
    """Of a name in small letters with spaces for ``_ - .``; its group n is the number of steps."""
    steps: int
    """When the name has no number."""
    at_most: int | None = None
    """Steps that still help; None: exactly those of the name."""
    cfg: float = 1.0
    highest_cfg: float = 2.0
    sampler: str
    samplers: tuple[str, ...] = ()
    """Others that do as well; empty: any."""
    scheduler: str
    schedulers: tuple[str, ...] = TRAILING
    """Others that do as well."""
    more: Mapping[str, object] = field(default_factory=dict)
    """Further fields of the request."""
    prediction: Literal["x0"] | None = None
    """When it is not the noise."""
    side: int | None = None
    """Pixels it was distilled at, when fewer than SDXL's."""
    in_loras: bool = True
    """Whether a LoRA of such a name is one; words like "turbo" are in the names of many that are not."""


FAMILIES = (
    # huggingface.co/ByteDance/SDXL-Lightning
    Family(
        label="SDXL-Lightning",
        pattern=r"lightning.{0,3}?(?P<n>1) ?step",
        steps=1,
        sampler="euler",
        scheduler="trailing",
        prediction="x0",
    ),
    Family(
        label="SDXL-Lightning",
        pattern=r"lightning.{0,3}?(?P<n>[248]) ?step",
        steps=4,
        sampler="euler",
        scheduler="trailing",
    ),
    # huggingface.co/ByteDance/Hyper-SD
    Family(
        label="Hyper-SD, guidance kept",
        pattern=r"hyper sd.*?\b(?P<n>\d+) ?steps? cfg",
        steps=8,
        cfg=5.0,
        highest_cfg=8.0,
        sampler="ddim",
        scheduler="trailing",
    ),
    Family(
        label="Hyper-SD, U-Net",
        pattern=r"hyper sd.*?\b(?P<n>1) ?step unet",
        steps=1,
        sampler="lcm",
        samplers=("lcm", "tcd"),
        scheduler="auto",
        schedulers=LCM_GRIDS,
        more={"timesteps": "800"},
    ),
    Family(
        label="Hyper-SD",
        pattern=r"hyper sd.*?\b(?P<n>1) ?step",
        steps=1,
        at_most=8,
        sampler="tcd",
        samplers=("tcd",),
        scheduler="lcm",
        schedulers=LCM_GRIDS,
        more={"eta": 1.0},
    ),
    Family(
        label="Hyper-SD",
        pattern=r"hyper sd.*?\b(?P<n>\d+) ?step",
        steps=4,
        sampler="ddim",
        samplers=("ddim", "euler", "tcd"),
        scheduler="trailing",
    ),
    # huggingface.co/tianweiy/DMD2
    Family(
        label="DMD2",
        pattern=r"\bdmd2.*?\b(?P<n>1) ?step",
        steps=1,
        sampler="lcm",
        samplers=("lcm",),
        scheduler="auto",
        schedulers=LCM_GRIDS,
        more={"timesteps": "399"},
    ),
    Family(
        label="DMD2",
        pattern=r"\bdmd2\b",
        steps=4,
        at_most=8,
        sampler="lcm",
        samplers=("lcm",),
        scheduler="trailing",
        schedulers=LCM_GRIDS,
    ),
    # huggingface.co/h1t/TCD-SDXL-LoRA
    Family(
        label="TCD",
        pattern=r"\btcd\b",
        steps=4,
        at_most=50,
        sampler="tcd",
        samplers=("tcd",),
        scheduler="lcm",
        schedulers=LCM_GRIDS,
        more={"eta": 0.3},
    ),
    # huggingface.co/latent-consistency/lcm-lora-sdxl
    Family(
        label="LCM",
        pattern=r"\blcm\b",
        steps=4,
        at_most=8,
        sampler="lcm",
        samplers=("lcm",),
        scheduler="lcm",
        schedulers=LCM_GRIDS,
    ),
    # huggingface.co/stabilityai/sdxl-turbo
    Family(
        label="SDXL-Turbo",
        pattern=r"^(sd ?xl|stable diffusion xl) ?turbo",
        steps=4,
        at_most=4,
        highest_cfg=1.0,
        sampler="euler_a",
        scheduler="trailing",
        side=512,
        in_loras=False,
    ),
    # merges of fine-tunes with either; civitai.com/models/112902 is the best known
    Family(
        label="a merge with Turbo or Lightning",
        pattern=r"turbo|lightning",
        steps=6,
        at_most=10,
        cfg=2.0,
        highest_cfg=3.0,
        sampler="dpmpp_sde",
        scheduler="karras",
        schedulers=("karras", *TRAILING),
        in_loras=False,
    ),
)
"""The first whose pattern is in the name."""


@dataclass(frozen=True, slots=True)
class FewStep:
    """What was found."""

    family: Family
    steps: int
    why: str
    """``by the name of sdxl_lightning_4step``."""

    def defaults(self, files: ModelFiles) -> dict[str, Any]:
        """Field of the request -> value."""
        values: dict[str, Any] = {
            "steps": self.steps,
            "cfg_scale": self.family.cfg,
            "sampler": self.family.sampler,
            "scheduler": self.family.scheduler,
            **self.family.more,
        }
        if self.family.side is not None and files.config.native_size > self.family.side:
            values["size"] = format_size((self.family.side, self.family.side))
        return values


def detect(files: ModelFiles, loras: Sequence[str] = ()) -> FewStep | None:
    """Whether a model, or a LoRA put into it, needs few steps; the LoRA is asked first, for it comes last.

    Args:
        files: the model.
        loras: ``FILE[:SCALE…]``, as the request has them.
    """
    for lora in loras:
        path = Path(re.sub(r"(:-?[\d.]+)+$", "", lora))
        name = path.parent.name if path.stem in _GENERIC else path.stem
        if found := _named(name, f"by the name of the LoRA {name}", lora=True):
            return found
    return _named(files.name, f"by the name of {files.name}") or _named(
        files.identity.title, f"by its title, {files.identity.title}"
    )


def _named(name: str, why: str, *, lora: bool = False) -> FewStep | None:
    words = re.sub(r"[\W_]+", " ", name.lower())
    for family in FAMILIES:
        if (family.in_loras or not lora) and (match := re.search(family.pattern, words)):
            return FewStep(family, int(match.groupdict().get("n") or family.steps), why)
    return None


class FewSteps:
    """Gives requests for few-step models what the user left open, and says so once."""

    def __init__(self, stated: Collection[str] | None, report: Told) -> None:
        """``stated`` are the fields the user gave for all requests; None: every one, as in a picture made again."""
        self._stated, self._report = stated, report
        self._said: set[str] = set()

    def __call__(
        self, request: GenerateRequest, files: Sequence[ModelFiles], stated: Collection[str] = ()
    ) -> GenerateRequest:
        """The request with a few-step model's values where none was given.

        Args:
            request: as asked.
            files: the base and, when there is one, the refiner.
            stated: fields the user gave for this request, besides those for all.
        """
        found = detect(files[0], request.lora)
        if found is None or self._stated is None:
            return request
        given = {*self._stated, *stated}
        if given.intersection(SIZES):
            given.add("size")
        if given.intersection(("timesteps", "sigmas", "steps", "scheduler")):
            given.add("timesteps")  # it would take the place of these
        chosen = {name: value for name, value in found.defaults(files[0]).items() if name not in given}
        kept = [name for name in found.defaults(files[0]) if name in self._stated]
        self._say(self._report.note, f"{described(found, chosen)}{_as_given(request, kept)}")
        request = replace(request, **chosen)
        if request.prediction == "auto" and found.family.prediction == files[0].prediction:
            request = replace(request, prediction=found.family.prediction)
        return request

    def was_given(self, name: str, stated: Collection[str] = ()) -> bool:
        """Whether the user gave a field a value, for all requests or, by ``stated``, for this one."""
        return self._stated is None or name in self._stated or name in stated

    def check(self, request: GenerateRequest, files: Sequence[ModelFiles]) -> None:
        """Warn of what does not go with a few-step model.

        Args:
            request: as planned, with the names of sampler and scheduler as this program spells them.
            files: the base and, when there is one, the refiner.
        """
        found = detect(files[0], request.lora)
        if found is not None and self._stated is not None:
            for clash in clashes(found, request, has_refiner=len(files) > 1):
                self._say(self._report.warn, clash)

    def _say(self, say: Callable[[str], None], text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(text)


def described(found: FewStep, chosen: Mapping[str, object]) -> str:
    """``SDXL-Lightning (by the name of …): steps 4, cfg_scale 1, …``."""
    values = ", ".join(f"{_flag(name)} {_short(value)}" for name, value in chosen.items())
    return f"few-step model: {found.family.label} ({found.why}); chosen for it: {values or 'nothing'}"


def clashes(found: FewStep, request: SamplingRequest, *, has_refiner: bool) -> list[str]:
    """What was asked for and does not go with a few-step model; each says what does."""
    family, warnings = found.family, []
    label = family.label
    if request.cfg_scale > family.highest_cfg:
        warnings.append(
            f"--cfg-scale {request.cfg_scale:g}: {label} burns colours above {family.highest_cfg:g}; "
            f"it is made for {family.cfg:g}"
        )
    if family.at_most is None and request.steps != found.steps:
        warnings.append(f"--steps {request.steps}: this {label} was distilled for exactly {found.steps}")
    elif family.at_most is not None and request.steps > family.at_most:
        warnings.append(
            f"--steps {request.steps}: {label} gains nothing, or loses, beyond {family.at_most} steps"
        )
    if family.samplers and request.sampler not in family.samplers:
        warnings.append(f"--sampler {request.sampler}: {label} needs {' or '.join(family.samplers)}")
    custom = request.timesteps is not None or request.sigmas is not None
    if request.scheduler not in family.schedulers and not custom:
        warnings.append(f"--scheduler {request.scheduler}: {label} is made for {_suited(family)}")
    if has_refiner:
        warnings.append(
            f"--refiner: {label} takes away most of the noise in its last step, which leaves a refiner little or "
            "no step to do; leave it out, or use --refiner-mode sdedit"
        )
    return warnings


def _suited(family: Family) -> str:
    return family.schedulers[0] if family.scheduler == "auto" else family.scheduler


def _as_given(request: GenerateRequest, names: Sequence[str]) -> str:
    words = ", ".join(f"{_flag(name)} {_short(getattr(request, name))}" for name in names)
    return f"; as you said: {words}" if words else ""


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Names of samplers and schedulers, in every front end's spelling, with their options.

``dpmpp_2m_sde:eta=0.5`` and ``karras:rho=5`` are our spelling. A1111's labels may name both at once
(``DPM++ 2M SDE Karras``), as may Invoke's (``dpmpp_2m_sde_k``); diffusers' are classes with options
(``DPMSolverMultistepScheduler use_karras_sigmas=True algorithm_type=sde-dpmsolver++``).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from sdxl_cli.diffusion.grids import GRIDS, grid_options
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError

AUTO = "auto"
"""The scheduler that the sampler's name says, or else the one that suits it."""

SAMPLER_SPELLINGS = {
    "euler": ("eulerdiscrete", "euleredm"),
    "euler_a": ("eulerancestral", "eulerancestraldiscrete"),
    "heun": ("heundiscrete", "heunedm"),
    "dpm2": ("dpm2discrete",),
    "dpm2_a": ("dpm2ancestral", "dpm2ancestraldiscrete"),
    "lms": ("lmsdiscrete", "linearmultistep"),
    "dpmpp_2m": ("dpmsolvermultistep", "dpmppdiscrete"),
    "dpmpp_sde": ("dpmsolversde",),
    "dpmpp_2s_a": ("dpmpp2sancestral",),
    "dpmpp_2s_a:eta=0": ("dpmpp2s", "dpmsolversinglestep"),
    "unipc": ("unipcmultistep",),
    "unipc:solver_type=bh2": ("unipcbh2",),
    "deis": ("deismultistep",),
}
"""Ours -> others', squashed; those that squash to our own name need no row."""

GRID_SPELLINGS = {
    "normal": ("uniform", "discrete", "linspace"),
    "sgm": ("legacyddpm",),
    "trailing": ("turbo",),
    "karras": ("ka", "k"),
    "ddim_uniform": ("ddim",),
    "align_your_steps": ("ays", "aligned"),
    "exponential": ("exp",),
    "polyexponential": ("polyexp",),
    AUTO: ("automatic",),
}

SCHEDULE_LABELS = {
    "sgm_uniform": "SGM Uniform",
    "normal": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta": "Beta",
    "kl_optimal": "KL Optimal",
    "align_your_steps": "Align Your Steps",
}
"""What A1111 calls a scheduler; those it does not have go by their own name."""

DIFFUSERS_GRIDS = {
    ("usekarrassigmas", "true"): "karras",
    ("useexponentialsigmas", "true"): "exponential",
    ("usebetasigmas", "true"): "beta",
    ("timestepspacing", "trailing"): "trailing",
    ("timestepspacing", "leading"): "leading",
    ("timestepspacing", "linspace"): "normal",
}
"""Options of diffusers' classes that say a scheduler."""

DIFFUSERS_MULTISTEP = {
    ("dpmsolver++", "1"): "euler",
    ("dpmsolver++", "2"): "dpmpp_2m",
    ("dpmsolver++", "3"): "dpmpp_3m",
    ("sde-dpmsolver++", "2"): "dpmpp_2m_sde",
    ("sde-dpmsolver++", "3"): "dpmpp_3m_sde",
}
"""DPMSolverMultistepScheduler's (algorithm_type, solver_order)."""


@dataclass(frozen=True)
class NamedGrid:
    """A grid with its options."""

    name: str
    options: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """The noise levels of so many steps, float32, descending to 0."""
        return GRIDS[self.name](schedule, steps, **self.options)

    def __str__(self) -> str:
        return spelled(self.name, self.options)


@dataclass(frozen=True)
class Choice:
    """What a sampler's name says."""

    sampler: Sampler
    grid: NamedGrid | None
    """The scheduler, where the name says one too."""

    def __str__(self) -> str:
        usual = SAMPLERS[self.sampler.name]
        changed = {key: getattr(self.sampler, key) for key in sampler_options(usual)}
        return spelled(
            usual.name, {key: value for key, value in changed.items() if value != getattr(usual, key)}
        )


def sampler_options(sampler: Sampler) -> dict[str, Field[Any]]:
    """The fields of a sampler that users may set, by name."""
    return {item.name: item for item in fields(sampler) if "text" in item.metadata}


def spelled(name: str, options: Mapping[str, object]) -> str:
    """``name:key=value,…``."""
    texts = (
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    )
    return ":".join(filter(None, (name, ",".join(texts))))


def find_sampler(text: str, flags: Mapping[str, float | None] | None = None) -> Choice:
    """The sampler of a name in any spelling.

    Args:
        text: name and options.
        flags: options given by flags of their own, which win; None is "not given".

    Raises:
        UsageError: no such sampler (the nearest are named), or it has no such option.
    """
    name, given = _parts(text)
    match = next(_readings(squash(name)), None)
    if match is None:
        raise _unknown("sampler", text, SAMPLERS, [s.label for s in SAMPLERS.values()])
    ours, grid = match
    ours, options = _parts(ours)
    ours, grid, given = _without_diffusers(ours, grid, given)
    sampler = _with_options(SAMPLERS[ours], options | given, "--sampler")
    for key, value in (flags or {}).items():
        if value is not None:
            sampler = _with_options(sampler, {key: str(value)}, "--" + key.replace("_", "-"))
    return Choice(sampler, NamedGrid(grid) if grid and grid != AUTO else None)


def find_grid(text: str) -> NamedGrid:
    """The scheduler of a name in any spelling; not ``auto``, which is for the caller to decide.

    Raises:
        UsageError: no such scheduler (the nearest are named), or it has no such option.
    """
    name, given = _parts(text)
    ours = _GRID_KEYS.get(squash(name))
    if ours is None or ours == AUTO:
        raise _unknown("scheduler", text, GRIDS, SCHEDULE_LABELS.values())
    known = grid_options(GRIDS[ours])
    options: dict[str, float] = {}
    for key, value in given.items():
        if key not in known:
            raise UsageError(_no_option("--scheduler", ours, key, known))
        options[key] = _number(value, float, f"--scheduler {ours}: {key}", 1e-6)
    return NamedGrid(ours, {key: value for key, value in options.items() if value != known[key]})


def is_auto(text: str) -> bool:
    """Whether a scheduler's name leaves the choice to the sampler."""
    return _GRID_KEYS.get(squash(text)) == AUTO


def schedule_label(name: str) -> str:
    """A1111's name of one of our schedulers, without its options; our own where A1111 has none."""
    bare = name.split(":")[0]
    return SCHEDULE_LABELS.get(bare, bare)


def squash(text: str) -> str:
    """Letters and digits of a name, small, with ++ as pp: what spellings have in common."""
    return re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))


_SAMPLER_KEYS = {squash(name): name for name in SAMPLERS}
_SAMPLER_KEYS |= {squash(sampler.label): name for name, sampler in SAMPLERS.items()}
_SAMPLER_KEYS |= {other: name for name, others in SAMPLER_SPELLINGS.items() for other in others}
_GRID_KEYS = {squash(name): name for name in (*GRIDS, AUTO)}
_GRID_KEYS |= {squash(label): name for name, label in SCHEDULE_LABELS.items()}
_GRID_KEYS |= {other: name for name, others in GRID_SPELLINGS.items() for other in others}


def _readings(key: str) -> Iterator[tuple[str, str | None]]:
    """(sampler, scheduler) that a squashed name can mean, the most literal first."""
    for core in (key, key.removeprefix("sample"), key.removeprefix("k")):
        for end in ("", "gpu", "scheduler", "sampler"):
            if core.endswith(end) and (bare := core.removesuffix(end)) in _SAMPLER_KEYS:
                yield _SAMPLER_KEYS[bare], None
        # longer words first, so that "sgm uniform" is not a sampler "sgm" with "uniform"
        for word in sorted(_GRID_KEYS, key=len, reverse=True):
            if core.endswith(word) and (bare := core.removesuffix(word).removesuffix("gpu")) in _SAMPLER_KEYS:
                yield _SAMPLER_KEYS[bare], _GRID_KEYS[word]


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """A name, and the options after it: ``key=value``, with any of ``: ; , ( )`` and spaces between."""
    first = re.search(r"[\w-]+\s*=", text)
    name, rest = (text[: first.start()], text[first.start() :]) if first else (text, "")
    options = dict(re.findall(r"([\w-]+)\s*=\s*['\"]?([^\s,;()'\"]+)", rest))
    return name.strip(" :;,("), {
        key.lower().replace("-", "_"): value.lower() for key, value in options.items()
    }


def _without_diffusers(
    name: str, grid: str | None, given: Mapping[str, str]
) -> tuple[str, str | None, dict[str, str]]:
    """The options of diffusers' classes that are other names here, turned into those."""
    rest = dict(given)
    for key, value in given.items():
        spelling = (squash(key), value)
        if spelling in DIFFUSERS_GRIDS:
            grid = DIFFUSERS_GRIDS[spelling]
            del rest[key]
        elif spelling[0].startswith("use") and spelling[0].endswith("sigmas") and value == "false":
            del rest[key]
    if name == "dpmpp_2m" and {"algorithm_type", "solver_order"} & rest.keys():
        algorithm = rest.pop("algorithm_type", "dpmsolver++"), rest.pop("solver_order", "2")
        if algorithm not in DIFFUSERS_MULTISTEP:
            known = ", ".join(f"{kind} of order {order}" for kind, order in DIFFUSERS_MULTISTEP)
            raise UsageError(
                f"--sampler: {algorithm[0]} of order {algorithm[1]} is not there; there are {known}"
            )
        name = DIFFUSERS_MULTISTEP[algorithm]
    return name, grid, rest


def _with_options(sampler: Sampler, given: Mapping[str, str], flag: str) -> Sampler:
    known = sampler_options(sampler)
    values: dict[str, Any] = {}
    for key, text in given.items():
        if key not in known:
            raise UsageError(_no_option(flag, sampler.name, key, known))
        what, limits = f"{flag}: {key}" if flag == "--sampler" else flag, known[key].metadata
        if limits["among"]:
            if text not in limits["among"]:
                raise UsageError(f"{what} {text!r} must be {' or '.join(limits['among'])}")
            values[key] = text
        else:
            kind = type(known[key].default)
            values[key] = _number(text, kind, what, limits["low"], limits["high"])
    return replace(sampler, **values)


def _number(text: str, kind: type, what: str, low: float, high: float = float("inf")) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise UsageError(f"{what} {text!r} must be a {'whole ' if kind is int else ''}number") from None
    if not low <= value <= high:
        raise UsageError(
            f"{what} {text} must be at least {low:g}" + (f" and at most {high:g}" if high < 1e9 else "")
        )
    return value


def _no_option(flag: str, name: str, key: str, known: Iterable[str]) -> str:
    has = ", ".join(known) or "none"
    others = [other for other, sampler in SAMPLERS.items() if key in sampler_options(sampler)]
    where = f"; samplers with {key}: {', '.join(others)}" if others and flag != "--scheduler" else ""
    return f"{flag}: {name} has no option {key} (it has {has}){where}"


def _unknown(what: str, text: str, names: Mapping[str, object], labels: Iterable[str]) -> UsageError:
    spellings = {**{label.lower(): label for label in labels}, **{name: name for name in names}}
    near = difflib.get_close_matches(text.strip().lower(), spellings, n=3, cutoff=0.4)
    listed = [spellings[key] for key in near] or list(names)
    return UsageError(f"--{what} {text!r} is unknown; did you mean {', '.join(listed)}? See: sdxl samplers")

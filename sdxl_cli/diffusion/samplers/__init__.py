"""Samplers: a class each, registered by being listed here."""

from __future__ import annotations

import difflib

from sdxl_cli.diffusion.samplers.base import Sampler
from sdxl_cli.diffusion.samplers.dpmpp_2m import DPMpp2M
from sdxl_cli.diffusion.samplers.euler import Euler
from sdxl_cli.errors import UsageError

SAMPLERS: dict[str, Sampler] = {sampler.name: sampler for sampler in (Euler(), DPMpp2M())}
"""Samplers by name, as ``--sampler`` takes them."""

ALIASES = {"dpm++_2m": "dpmpp_2m", "eulerdiscretescheduler": "euler", "dpm++2m": "dpmpp_2m"}


def resolve(name: str) -> Sampler:
    """The sampler of that name, in any front end's spelling.

    Raises:
        UsageError: no such sampler; names the nearest.
    """
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    key = ALIASES.get(key, key)
    if key in SAMPLERS:
        return SAMPLERS[key]
    near = difflib.get_close_matches(key, SAMPLERS, n=3, cutoff=0.4) or list(SAMPLERS)
    raise UsageError(f"--sampler {name!r} is unknown; did you mean {', '.join(near)}?")

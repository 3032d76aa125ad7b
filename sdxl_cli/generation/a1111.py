"""A1111's ``parameters`` text, as A1111 and those who copied it (Forge, SD.Next, sd.cpp) write it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from sdxl_cli.diffusion.names import is_auto
from sdxl_cli.generation.foreign import Foreign, base_name
from sdxl_cli.generation.metadata import ModelRecord
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.values import hints

_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A1111's own rule for the last line."""
_NEGATIVE = "Negative prompt:"
_FEWEST_PAIRS = 3
"""A last line with fewer is part of the prompt (A1111's rule too)."""

_PLAIN = {
    "Steps": "steps",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Size": "size",
    "Refiner switch at": "refiner_switch_at",
    "Mask blur": "mask_blur",
    "Masked area padding": "mask_padding",
    "Hires upscale": "hires_scale",
    "Hires steps": "hires_steps",
    "Hires CFG Scale": "hires_cfg_scale",
    "Hires sampler": "hires_sampler",
    "CFG Rescale": "cfg_rescale",
    "CFG rescale": "cfg_rescale",
    "Eta": "eta",
    "Sigma churn": "s_churn",
    "Sigma noise": "s_noise",
}
"""Key -> field, where the values are written alike."""

_SILENT = frozenset(
    {"Version", "Sampler", "Schedule type", "Model hash", "VAE hash", "Lora hashes", "RNG", "User"}
)
"""Keys that others take care of, or that say nothing about the pixels."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The text, taken apart."""

    prompt: str
    negative_prompt: str
    pairs: dict[str, str]


def parse(text: str) -> Parameters:
    """Take a ``parameters`` text apart, by A1111's rules."""
    *lines, last = text.strip().split("\n")
    if len(_PAIR.findall(last)) < _FEWEST_PAIRS:
        lines.append(last)
        last = ""
    prompt: list[str] = []
    negative: list[str] = []
    into = prompt
    for line in lines:
        if into is prompt and line.strip().startswith(_NEGATIVE):
            into, line = negative, line.strip()[len(_NEGATIVE) :]
        into.append(line.strip())
    pairs = {key: _unquote(value) for key, value in _PAIR.findall(last)}
    return Parameters("\n".join(prompt).strip(), "\n".join(negative).strip(), pairs)


def read(text: str) -> Foreign:
    """A ``parameters`` text as a request."""
    said = parse(text)
    pairs = said.pairs
    ours = pairs.get("Version", "").startswith("sdxl ")
    found = Foreign("A1111", {"prompt": said.prompt, "negative_prompt": said.negative_prompt or None})
    for key, value in pairs.items():
        if key in _PLAIN:
            found.put(_PLAIN[key], value, f"{key}: {value}")
        elif key in _SPECIAL:
            _SPECIAL[key](found, value)
        elif key not in _SILENT:
            _other(found, key, value)
    _hashes(found, pairs)
    _sampler(found, pairs)
    if "Denoising strength" in pairs:
        hires = "Hires upscale" in pairs or "Hires resize" in pairs
        name = "hires_denoising_strength" if hires else "strength"
        found.put(name, pairs["Denoising strength"], f"Denoising strength: {pairs['Denoising strength']}")
    if "Clip skip" in pairs:
        _clip_skip(found, pairs["Clip skip"], ours)
    if not ours and pairs.get("RNG", "GPU") != "CPU":
        found.remarks.append(
            f"RNG: {pairs.get('RNG', 'GPU')}: its noise was drawn on a GPU, here it comes from the CPU: "
            "another composition"
        )
    return found


def _sampler(found: Foreign, pairs: dict[str, str]) -> None:
    """Sampler and schedule; before 1.9 the two were one name ("DPM++ 2M Karras"), and without one it was uniform."""
    name, schedule = pairs.get("Sampler"), pairs.get("Schedule type")
    if name is None:
        return
    choice = found.put_sampler(name, f"Sampler: {name}")
    if schedule is not None and not is_auto(schedule):
        found.put_scheduler(schedule, f"Schedule type: {schedule}")
    elif choice is None:
        return  # what belongs to an unknown sampler is unknown too, and the sampler is a remark already
    elif schedule is None:
        found.put_scheduler(str(choice.grid or "normal"), f"Sampler: {name}")
    else:
        # A1111 names one for those that have a k-diffusion scheduler of their own, as here
        usual = choice.sampler.grid
        found.put_scheduler(
            usual if usual in ("karras", "exponential") else "normal", "Schedule type: Automatic"
        )


def _hashes(found: Foreign, pairs: dict[str, str]) -> None:
    """The hashes of the model and of the autoencoder, to their names; a hash may be all there is."""
    for role, name, key in (("base", "Model", "Model hash"), ("vae", "VAE", "VAE hash")):
        if key in pairs:
            found.models[role] = ModelRecord(base_name(pairs.get(name, pairs[key])), pairs[key])


def _model(found: Foreign, value: str) -> None:
    found.models["base"] = ModelRecord(base_name(value), None)


def _vae(found: Foreign, value: str) -> None:
    found.models["vae"] = ModelRecord(base_name(value), None)


def _refiner(found: Foreign, value: str) -> None:
    match = re.fullmatch(r"(.+?)(?: \[([0-9a-f]+)\])?", value)
    assert match  # (.+?) takes anything that is not empty
    found.models["refiner"] = ModelRecord(base_name(match[1]), match[2])


def _clip_skip(found: Foreign, value: str, ours: bool) -> None:
    # A1111 reads the last layer but one of an SDXL model whatever is set, unless an option says otherwise
    if ours or value == "2":
        found.put("clip_skip", value, f"Clip skip: {value}")
    else:
        found.remarks.append(
            f"Clip skip: {value}: A1111 does not use it for SDXL by itself; give --clip-skip if it did"
        )


def _emphasis(found: Foreign, value: str) -> None:
    choices = {
        "no norm": ("emphasis", "no-norm"),
        "none": ("prompt_syntax", "raw"),
        "ignore": None,
        "original": (),
    }
    choice = choices.get(value.lower())
    if choice is None:
        found.remarks.append(f"Emphasis: {value}: has no counterpart here")
    elif choice:
        found.put(choice[0], choice[1], f"Emphasis: {value}")


def _inpaint_area(found: Foreign, value: str) -> None:
    if value.lower() == "only masked":
        found.put("only_masked", True, f"Inpaint area: {value}")


def _mask_mode(found: Foreign, value: str) -> None:
    if value.lower() == "inpaint not masked":
        found.put("invert_mask", True, f"Mask mode: {value}")


def _masked_content(found: Foreign, value: str) -> None:
    contents = {"original": "original", "latent noise": "noise"}
    found.put("mask_content", contents.get(value.lower(), value), f"Masked content: {value}")


def _hires_upscaler(found: Foreign, value: str) -> None:
    known = {"latent": "latent", "lanczos": "lanczos"}
    if value.lower() not in known:
        found.remarks.append(f"Hires upscaler: {value}: is not here; the default takes its place")
    else:
        found.put("hires_upscaler", known[value.lower()], f"Hires upscaler: {value}")


def _embeddings(found: Foreign, value: str) -> None:
    found.remarks.append(f"TI hashes: {value}: give the files with --embedding or --embeddings-dir")


def _handled(found: Foreign, value: str) -> None:
    """Looked at together with other keys."""


_SPECIAL: dict[str, Callable[[Foreign, str], None]] = {
    "Model": _model,
    "VAE": _vae,
    "Refiner": _refiner,
    "Emphasis": _emphasis,
    "Inpaint area": _inpaint_area,
    "Mask mode": _mask_mode,
    "Masked content": _masked_content,
    "Hires upscaler": _hires_upscaler,
    "TI hashes": _embeddings,
    "Denoising strength": _handled,
    "Clip skip": _handled,
}


def _other(found: Foreign, key: str, value: str) -> None:
    """A key nobody knows: perhaps a field by that name."""
    name = key.lower().replace(" ", "_").replace("-", "_")
    if name in hints(GenerateRequest):
        found.put(name, value, f"{key}: {value}")
    else:
        found.remarks.append(f"{key}: {value}: has no counterpart here")


def _unquote(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value))
    except ValueError:
        return value

"""What a picture says about itself: our JSON, from which it is made again, and A1111's text for others."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdxl_cli import __version__, presets
from sdxl_cli.diffusion.names import schedule_label
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.lora import LoraUse
from sdxl_cli.generation.picture import Texts, read_texts
from sdxl_cli.generation.request import Framing, GenerateRequest, RefineRequest, SamplingRequest
from sdxl_cli.generation.sizes import format_size

FORMAT = 1
"""Version of the JSON's layout."""

Kind = Literal["generate", "refine"]
_REQUESTS: dict[Kind, type[SamplingRequest]] = {"generate": GenerateRequest, "refine": RefineRequest}


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model file, as a picture remembers it."""

    name: str
    sha256: str | None
    """Of the whole file; None for a model that is not on disk."""

    @property
    def short_hash(self) -> str | None:
        """A1111's model hash: the first ten digits."""
        return self.sha256[:10] if self.sha256 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraRecord:
    """A LoRA, as a picture remembers it."""

    name: str
    sha256: str
    """Of the whole file."""
    short_hash: str
    """A1111's, 12 digits: of the tensors without the file's metadata."""
    scale: float
    text_scale: float
    model: str
    """Role of the model it changed: ``base`` or ``refiner``."""

    @property
    def tag(self) -> str:
        """As A1111 has it in a prompt."""
        return LoraUse(self.name, self.scale, self.text_scale).tag(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """How one picture was made."""

    kind: Kind
    request: SamplingRequest
    """With seed and size of this very picture."""
    framing: Framing
    models: Mapping[str, ModelRecord]
    """By role: ``base``, ``refiner``, ``vae`` (only when it is not the model's own)."""
    run: Mapping[str, str]
    """What else decides the bits: device, dtypes, version of torch, timesteps walked through."""
    sampler_label: str
    """A1111's name of the sampler."""
    loras: Sequence[LoraRecord] = ()
    """In the order in which they changed the weights."""
    source: Mapping[str, Any] | None = None
    """The picture this one was made from: its file name, hash and own record."""

    def texts(self) -> Texts:
        """Both texts, as they go into the file."""
        return Texts(parameters=self.parameters(), record=self.to_json())

    def to_json(self) -> str:
        """One line of JSON."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "kind": self.kind,
            "sdxl": __version__,
            "request": asdict(self.request),
            "resolved": self.framing.named(),
            "models": {role: asdict(model) for role, model in self.models.items()},
            "run": dict(self.run),
        }
        if self.loras:
            values["loras"] = [asdict(lora) for lora in self.loras]
        if self.source is not None:
            values["source"] = dict(self.source)
        return json.dumps(values, ensure_ascii=False)

    def parameters(self) -> str:
        """A1111's ``parameters`` text: prompt, negative prompt, and a line of ``key: value`` pairs."""
        request = self.request
        # A1111 has no other place for LoRAs than the prompt
        lines = [" ".join([request.prompt, *(lora.tag for lora in self.loras)])]
        if request.negative_prompt:
            lines.append(f"Negative prompt: {request.negative_prompt}")
        pairs = {key: value for key, value in self._fields().items() if value is not None}
        lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in pairs.items()))
        return "\n".join(lines)

    def _fields(self) -> dict[str, object]:
        request, models = self.request, self.models
        main = models["base"] if "base" in models else models["refiner"]
        vae = models.get("vae")
        fields: dict[str, object] = {
            "Steps": request.steps,
            "Sampler": self.sampler_label,
            "Schedule type": schedule_label(request.scheduler),
            "Eta": None if request.eta is None else f"{request.eta:g}",
            "Sigma churn": None if request.s_churn is None else f"{request.s_churn:g}",
            "Sigma noise": None if request.s_noise is None else f"{request.s_noise:g}",
            "CFG scale": f"{request.cfg_scale:g}",
            "Seed": request.seed,
            "Size": format_size(self.framing.size),
            "Model hash": main.short_hash,
            "Model": main.name,
            "VAE hash": vae.short_hash if vae else None,
            "VAE": vae.name if vae else None,
        }
        if isinstance(request, RefineRequest):
            fields["Denoising strength"] = f"{request.strength:g}"
        if isinstance(request, GenerateRequest) and request.init_img is not None:
            fields["Denoising strength"] = f"{request.share_of_noise:g}"
            fields["Mask blur"] = request.mask_blur if request.mask is not None else None
        fields |= _text_fields(request, models)
        if isinstance(request, GenerateRequest) and request.hires_scale is not None:
            fields["Denoising strength"] = f"{request.hires_denoising_strength:g}"
            fields["Hires upscale"] = f"{request.hires_scale:g}"
            fields["Hires steps"] = request.hires_steps
            fields["Hires upscaler"] = {"latent": "Latent", "lanczos": "Lanczos"}[request.hires_upscaler]
        fields["RNG"] = "CPU"
        if isinstance(request, GenerateRequest) and (refiner := models.get("refiner")):
            short = f" [{refiner.short_hash}]" if refiner.short_hash else ""
            fields["Refiner"] = refiner.name + short
            if request.refiner_mode == "ensemble":
                fields["Refiner switch at"] = f"{request.refiner_switch_at:g}"
        if self.loras:
            fields["Lora hashes"] = ", ".join(f"{lora.name}: {lora.short_hash}" for lora in self.loras)
        return {**fields, "Version": f"sdxl {__version__}"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Our record, read back from a picture."""

    kind: Kind
    request: SamplingRequest
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)


def read_record(path: Path) -> Stored | None:
    """How the picture at ``path`` was made, or None when it does not carry our JSON.

    Raises:
        FileError: the file is missing, is no picture, or its JSON is damaged or of a later version.
    """
    text = read_texts(path).record
    return parse_record(text, path) if text else None


def parse_record(text: str, path: Path) -> Stored:
    """Read our JSON.

    Args:
        text: as in the file.
        path: the file, for messages.

    Raises:
        FileError: it is damaged, or of a later version.
        UsageError: it is that of a grid.
    """
    try:
        values = json.loads(text)
        kind, version = values["kind"], values["format"]
        if kind == "grid":
            raise UsageError(
                f"{path}: is a grid of {len(values['cells'])} pictures; give one of them, such as "
                f"{values['cells'][0]['path']}"
            )
        models = {
            role: ModelRecord(model["name"], model["sha256"]) for role, model in values["models"].items()
        }
        table = values["request"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path}: its sdxl metadata is damaged; give the flags yourself") from error
    if version != FORMAT or kind not in _REQUESTS:
        raise FileError(
            f"{path}: made by a later version of sdxl ({values.get('sdxl')}); update sdxl to read it"
        )
    request = presets.from_table(_REQUESTS[kind], table, path.name)
    return Stored(kind, request, models, values)


def _text_fields(request: SamplingRequest, models: Mapping[str, ModelRecord]) -> dict[str, object]:
    """How the prompts were read, in A1111's words, where it is not how A1111 reads an SDXL prompt by itself."""
    learned = [model for role, model in models.items() if role.startswith("embedding ")]
    hashes = ", ".join(f"{model.name}: {model.sha256[:12]}" for model in learned if model.sha256)
    return {
        "Clip skip": None if request.clip_skip == 2 else request.clip_skip,
        "Emphasis": "No norm" if request.emphasis == "no-norm" else None,
        "TI hashes": hashes or None,
    }


def _quote(text: str) -> str:
    """Values that would confuse A1111's reader go in JSON quotes."""
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text

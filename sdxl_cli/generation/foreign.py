"""What pictures of other programs say about themselves, as a request of this one.

Nothing is dropped in silence: what has no counterpart here, or means something else, comes back as remarks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.diffusion.names import Choice, find_grid, find_sampler
from sdxl_cli.errors import SdxlError, UsageError
from sdxl_cli.generation.metadata import ModelRecord
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.values import hints, typed

RELEASED = {"sd_xl_base_1.0": "base", "sd_xl_refiner_1.0": "refiner", "sdxl_vae": "vae"}
"""Files everybody has under one name -> what they are called here."""

_SUFFIXES = ("", ".safetensors", ".ckpt")


@dataclass(slots=True)
class Foreign:
    """A request read from another program's words, as far as it can be."""

    origin: str
    """``A1111``, ``ComfyUI``."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Field of :class:`GenerateRequest` -> value."""
    models: dict[str, ModelRecord] = field(default_factory=dict)
    """By role: ``base``, ``refiner``, ``vae``; the hash may be A1111's ten digits."""
    remarks: list[str] = field(default_factory=list)
    """What could not be taken over, or will look different, a sentence each."""

    def put(self, name: str, value: Any, said: str) -> bool:
        """Set a field, from its value or from text; a remark when there is no such field or value.

        Args:
            name: the field.
            value: text is read as the field's type.
            said: how the picture says it, for the remark.
        """
        if name not in hints(GenerateRequest):
            self.remarks.append(f"{said}: has no counterpart here")
            return False
        try:
            if isinstance(value, str):
                value = typed(GenerateRequest, name, value, said)
        except UsageError as error:
            self.remarks.append(f"{error}; left out")
            return False
        self.fields[name] = value
        return True

    def put_sampler(self, name: str, said: str) -> Choice | None:
        """Set the sampler, by any program's name; what the name says, or None for an unknown one."""
        try:
            choice = find_sampler(name)
        except UsageError:
            self.remarks.append(f"{said}: no such sampler here; the default takes its place")
            return None
        self.fields["sampler"] = str(choice)
        return choice

    def put_scheduler(self, name: str, said: str) -> None:
        """Set the scheduler, by any program's name."""
        try:
            self.fields["scheduler"] = str(find_grid(name))
        except UsageError:
            self.remarks.append(f"{said}: no such scheduler here; the default takes its place")

    def needs_picture(self, given: Mapping[str, object]) -> None:
        """Leave out what is about a picture to start from, which is not inside the one it led to.

        ``given``: the flags of the command line by field; with ``init_img`` (and ``mask``) all stays.
        """
        for needed, names in _ABOUT.items():
            if given.get(needed) is None and self.fields.get(needed) is None:
                lost = [name for name in names if self.fields.pop(name, None) is not None]
                if lost:
                    flags = ", ".join(f"--{name.replace('_', '-')}" for name in lost)
                    self.remarks.append(
                        f"it was made from another picture, which is not in it: {flags} left out; "
                        f"give --{needed.replace('_', '-')}"
                    )

    def find_models(self, given: Mapping[str, object], folder: Path) -> None:
        """Look for the named models: here, beside the picture, and among the released ones.

        Args:
            given: the flags of the command line by field; what they name is not looked for.
            folder: where the picture is.

        Raises:
            UsageError: the model itself is not found and not given. Another one would make another picture.
        """
        for role, name in (("base", "model"), ("refiner", "refiner"), ("vae", "vae")):
            record = self.models.get(role)
            if record is None or given.get(name) is not None:
                continue
            found = _find(record.name, folder)
            if found is not None:
                self.fields[name] = found
            elif role == "base":
                short = f" [{record.short_hash}]" if record.short_hash else ""
                raise UsageError(
                    f"the picture was made with {record.name}{short}, which is neither here nor beside it; "
                    "give --model FILE (any model will do, but makes another picture)"
                )
            else:
                self.remarks.append(f"{role} {record.name}: is not here; give --{name} FILE")


_ABOUT = {
    "mask": ("mask_blur", "invert_mask", "mask_content", "only_masked", "mask_padding"),
    "init_img": ("strength", "resize_mode", "exact_steps"),
}
"""Field -> those that mean nothing without it."""


def base_name(path: str) -> str:
    """A model's name as A1111 has it: no folder, no suffix. Other programs run on Windows too."""
    return Path(path.replace("\\", "/")).name.removesuffix(".safetensors").removesuffix(".ckpt")


def all_remarks(foreign: Foreign) -> Iterable[str]:
    """Every remark once, in order."""
    return dict.fromkeys(foreign.remarks)


def _find(name: str, folder: Path) -> str | None:
    for place in (Path(), folder):
        for suffix in _SUFFIXES:
            if (path := place / f"{name}{suffix}").exists():
                return str(path)
    spec = RELEASED.get(name)
    if spec is None:
        return None
    try:
        locate(spec, spec)  # type: ignore[arg-type]
    except SdxlError:
        return None
    return spec

"""LoRAs as people ask for them, ``FILE:0.8`` and ``<lora:name:0.8>``, found and put on the models of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sdxl_cli.errors import FileError, UsageError

if TYPE_CHECKING:
    from sdxl_cli.checkpoint.lora import Lora, WornLora
    from sdxl_cli.generation.weights import FileWeights

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_SPEC = re.compile(rf"(?P<file>.+?)(?::(?P<scale>{_NUMBER}))?(?::(?P<text>{_NUMBER}))?")
_TAG = re.compile(r"<(?:lora|lyco):([^>]*)>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LoraUse:
    """One LoRA, as asked for."""

    file: str
    """A path, or a name in the folder of LoRAs."""
    scale: float = 1.0
    """Of its change to the U-Net; 1 is what was trained."""
    text_scale: float = 1.0
    """Of its change to the text encoders."""

    @classmethod
    def parse(cls, text: str) -> LoraUse:
        """``FILE``, ``FILE:SCALE`` or ``FILE:SCALE:TEXT_SCALE``; one scale is for both.

        Raises:
            UsageError: there is no file in it.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise UsageError(f"--lora {text!r}: expected FILE, FILE:SCALE or FILE:SCALE:TEXT_SCALE")
        scale = float(match["scale"] or 1.0)
        return cls(match["file"], scale, float(match["text"]) if match["text"] else scale)

    def __str__(self) -> str:
        scales = (self.scale,) if self.scale == self.text_scale else (self.scale, self.text_scale)
        return ":".join([self.file, *(f"{scale:.12g}" for scale in scales)])

    def tag(self, name: str) -> str:
        """A1111's way to write it in a prompt, where the text encoders come first."""
        scales = (self.scale,) if self.scale == self.text_scale else (self.text_scale, self.scale)
        return f"<lora:{':'.join([name, *(f'{scale:g}' for scale in scales)])}>"


def take_tags(prompt: str) -> tuple[str, tuple[str, ...]]:
    """Take ``<lora:name:0.8>`` and ``<lora:name:TEXT_SCALE:SCALE>`` (A1111's order) out of a prompt.

    A1111's names of the numbers, ``te=`` and ``unet=``, are understood as well.

    Returns:
        The prompt without them, and what :meth:`LoraUse.parse` reads.

    Raises:
        UsageError: a tag has no name, or something else than numbers after it.
    """
    uses = tuple(str(_use(tag.group(), tag[1])) for tag in _TAG.finditer(prompt))
    return (_TAG.sub("", prompt).strip() if uses else prompt), uses


def has_tags(text: str) -> bool:
    """Whether a text names LoRAs."""
    return _TAG.search(text) is not None


def _use(tag: str, inside: str) -> LoraUse:
    name, *values = (value.strip() for value in inside.split(":"))
    numbers: dict[str, float] = {}
    for place, value in zip(("te", "unet"), values, strict=False):
        key, equals, number = value.rpartition("=")
        try:
            numbers[key if equals else place] = float(number)
        except ValueError:
            numbers["wrong"] = math.nan
    if not name or len(values) > 2 or not numbers.keys() <= {"te", "unet"} or not _finite(numbers):
        raise UsageError(f"{tag}: expected <lora:name:0.8>, or <lora:name:TEXT_SCALE:SCALE>")
    text_scale = numbers.get("te", numbers.get("unet", 1.0))
    return LoraUse(name, numbers.get("unet", text_scale), text_scale)


def _finite(numbers: dict[str, float]) -> bool:
    return all(math.isfinite(value) for value in numbers.values())


def find_lora(spec: str, folder: Path) -> Path:
    """The file of a LoRA: a path, or a name (with or without its suffix) anywhere in the folder of LoRAs.

    Raises:
        FileError: there is none, or several; the text says the nearest names.
    """
    path = Path(spec).expanduser()
    if path.exists():
        return path
    known = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    name = spec.removesuffix(".safetensors").casefold()
    found = [file for file in known if name in _names(file, folder)]
    if len(found) > 1:
        paths = " and ".join(str(file) for file in found)
        raise FileError(f"LoRA {spec!r}: {paths} have that name; say which, with its folder")
    if found:
        return found[0]
    near = get_close_matches(name, [file.stem.casefold() for file in known], n=3, cutoff=0.5)
    stems = {file.stem.casefold(): file.stem for file in known}
    if near:
        hint = f"did you mean {' or '.join(stems[match] for match in near)}?"
    elif known:
        hint = f"there are {', '.join(list(stems.values())[:5])}{', …' if len(stems) > 5 else ''}"
    else:
        hint = "give a path, or the folder of your LoRAs with --lora-dir"
    where = f"in the folder {folder}" if folder.is_dir() else f"and no folder {folder}"
    raise FileError(
        f"LoRA {spec!r}: no such file, {'nor one of that name ' if folder.is_dir() else ''}{where}; {hint}"
    )


def _names(file: Path, folder: Path) -> tuple[str, str]:
    return file.stem.casefold(), file.relative_to(folder).with_suffix("").as_posix().casefold()


class _Reporter(Protocol):
    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


class Asking(Protocol):
    """The part of a request that is about LoRAs."""

    @property
    def lora(self) -> tuple[str, ...]:
        """Each ``FILE[:SCALE[:TEXT_SCALE]]``."""
        ...

    @property
    def lora_dir(self) -> str:
        """Folder of LoRAs asked for by name."""
        ...


def wear_loras(weights: Sequence[FileWeights], request: Asking, report: _Reporter) -> None:
    """Put the LoRAs of a request on the models it runs on; what they wore before is taken off.

    Each goes to the first model it was made for. Only tables of contents are read; the weights change when they are
    loaded.

    Args:
        weights: the base (and the refiner).
        request: says which LoRAs.
        report: hears how much of each is used.

    Raises:
        FileError: a file is missing or damaged, no LoRA, or for another architecture.
    """
    worn: list[list[WornLora]] = [[] for _ in weights]
    for use, lora in open_loras(request):
        index, one = _fitted(use, lora, weights)
        worn[index].append(one)
        _report(one, weights[index].files.name, report, " of the refiner" if index else "")
    for model, loras in zip(weights, worn, strict=True):
        model.wear(loras)


def open_loras(request: Asking) -> list[tuple[LoraUse, Lora]]:
    """Find the LoRAs of a request: their names, metadata and tables of contents, in order.

    Raises:
        FileError: a file is missing or damaged, or no LoRA.
        UsageError: a flag is malformed.
    """
    from sdxl_cli.checkpoint.lora import Lora

    uses = [LoraUse.parse(text) for text in request.lora]
    folder = Path(request.lora_dir).expanduser()
    return [(use, Lora(find_lora(use.file, folder))) for use in uses]


def _fitted(use: LoraUse, lora: Lora, weights: Sequence[FileWeights]) -> tuple[int, WornLora]:
    """The first model the LoRA fits; the error of the first when it fits none."""
    from sdxl_cli.checkpoint.lora import WornLora, fit

    errors = []
    for index, model in enumerate(weights):
        try:
            return index, WornLora(fit(lora, model.files), use.scale, use.text_scale)
        except FileError as error:
            errors.append(error)
    raise errors[0]


def _report(worn: WornLora, model: str, report: _Reporter, whose: str) -> None:
    from sdxl_cli.checkpoint.lora import first_names

    fitted, lora = worn.fitted, worn.fitted.lora
    scale = f"scale {worn.scale:g}"
    if worn.text_scale != worn.scale:
        scale += f", {worn.text_scale:g} in the text encoders"
    report.note(
        f"lora {lora.name}: {fitted.matched} of {fitted.total} layers{whose} matched, {lora.kind}, {scale}"
    )
    if fitted.unmatched:
        count = len(fitted.unmatched)
        report.warn(
            f"lora {lora.name}: {count} of {fitted.total} layers {'is' if count == 1 else 'are'} not in {model} "
            f"in that shape and {'does' if count == 1 else 'do'} nothing: {first_names(fitted.unmatched)}"
        )

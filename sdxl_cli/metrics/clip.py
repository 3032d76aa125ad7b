"""CLIP score: how well a picture fits its text, 100 times the cosine of what CLIP makes of both (Hessel et al. 2021).

Which CLIP it is decides the number, so the results name it. Both families are read: transformers' folders, and
OpenCLIP's, whose files need the name of their architecture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdxl_cli.checkpoint import hub
from sdxl_cli.checkpoint.files import remembered_sha256
from sdxl_cli.errors import FileError, NetworkError, UsageError, unknown

DEFAULT = "openai/clip-vit-large-patch14"
"""torchmetrics' default too."""
FLAG, WEIGHTS_FLAG = "--clip-model", "--clip-weights"
OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class ClipFiles:
    """A CLIP on disk."""

    name: str
    """As it was asked for."""
    weights: Path
    folder: Path | None = None
    """Of transformers' files, or of OpenCLIP's with its configuration."""
    architecture: str | None = None
    """OpenCLIP's name of it; None: the folder says."""

    def describe(self) -> dict[str, str]:
        """For the record: which network gave the numbers."""
        digest = hub.blob_sha256(self.weights) or remembered_sha256(self.weights)
        return {"name": self.name, "weights": self.weights.name, "sha256": digest}


class Clip:
    """Pictures and texts to directions."""

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Image.Image], Tensor],
        see: Callable[[Tensor], Tensor],
        read: Callable[[Sequence[str]], tuple[Tensor, list[bool]]],
    ) -> None:
        """``see`` takes preprocessed pictures, ``read`` texts and says which it had to cut; both give [B, D]."""
        self.model, self._preprocess, self._see, self._read = model, preprocess, see, read

    @torch.inference_mode()
    def scores(self, pictures: Sequence[Pixels], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """100 cos of every picture [H, W, 3], uint8, and its text: [B], float64; and which texts were cut."""
        device = next(self.model.parameters()).device
        inputs = torch.stack([self._preprocess(Image.fromarray(pixels)) for pixels in pictures]).to(device)
        described, cut = self._read(texts)
        cosines = nn.functional.cosine_similarity(self._see(inputs).double(), described.double(), dim=1)
        return 100 * cosines.cpu(), torch.tensor(cut)


def find_clip(name: str | None, weights: Path | None) -> ClipFiles:
    """Find a CLIP without loading it.

    Args:
        name: a folder, a hub id in the local cache, or with ``weights`` an architecture of OpenCLIP; None: the usual.
        weights: a file of OpenCLIP's weights.

    Raises:
        NetworkError: it is not in the cache.
        FileError: the folder or file is not there, or has no CLIP.
        UsageError: weights without an architecture, or an unknown one.
    """
    if weights is not None:
        return _by_architecture(name, weights.expanduser())
    name = name or DEFAULT
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _in_folder(name, folder)
    parsed = hub.parse_id(name)
    if parsed is None:
        raise FileError(f"{FLAG} {name}: no such folder, and no hub id (org/name)")
    repo, revision, _ = parsed
    for copy in hub.snapshots(repo, revision):
        if any((copy / file).is_file() for file in (*_OPEN_CLIP_FILES, *_TRANSFORMERS_FILES)):
            return _in_folder(name, copy)
    raise NetworkError(
        f"{repo} is not in the local cache ({hub.cache_folder()}), and this command fetches nothing: get "
        f"https://huggingface.co/{repo} (`hf download {repo}`), or give another CLIP with {FLAG} FOLDER"
    )


def load_clip(files: ClipFiles, device: torch.device | str) -> Clip:
    """The network, in float32.

    Raises:
        FileError: damaged, or not what its configuration says.
    """
    try:
        if files.architecture is None and files.folder and not (files.folder / OPEN_CLIP_CONFIG).is_file():
            return _transformers(files.folder, device)
        return _open_clip(files, device)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise FileError(f"{files.weights}: cannot be used as CLIP {files.name} ({first})") from error


def _by_architecture(name: str | None, weights: Path) -> ClipFiles:
    import open_clip

    if not weights.is_file():
        raise FileError(f"{weights}: no such file of weights")
    if name is None:
        raise UsageError(f"{WEIGHTS_FLAG}: {FLAG} has to say which architecture it is, such as ViT-g-14")
    if name not in open_clip.list_models():
        raise unknown("architecture of OpenCLIP", name, open_clip.list_models())
    return ClipFiles(name, weights, architecture=name)


def _in_folder(name: str, folder: Path) -> ClipFiles:
    ours = _OPEN_CLIP_FILES if (folder / OPEN_CLIP_CONFIG).is_file() else _TRANSFORMERS_FILES
    for file in ours:
        if (folder / file).is_file():
            return ClipFiles(name, folder / file, folder=folder)
    raise FileError(f"{folder} has no CLIP: none of {', '.join(ours)}")


def _transformers(folder: Path, device: torch.device | str) -> Clip:
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading a file that is on this disk
    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model = model.to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    longest = model.config.text_config.max_position_embeddings

    def see(inputs: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output)

    def read(texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        cut = [len(ids) > longest for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
        encoded = tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(device)
        pooled = model.text_model(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
        ).pooler_output
        return model.text_projection(pooled), cut

    return Clip(model, _preprocessing(folder), see, read)


def _preprocessing(folder: Path) -> Callable[[Image.Image], Tensor]:
    """What ``preprocessor_config.json`` says, with Pillow's filters as CLIP was trained with.

    transformers has come to resize with torch, whose pixels differ.
    """
    path = folder / "preprocessor_config.json"
    try:
        says: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}; CLIP's folder has to have it") from error
    size, crop = says["size"], says["crop_size"]
    shortest = size if isinstance(size, int) else size["shortest_edge"]
    side = crop if isinstance(crop, int) else crop["height"]
    mean, std = (torch.tensor(says[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    resample = Image.Resampling(says.get("resample", Image.Resampling.BICUBIC))

    def prepared(image: Image.Image) -> Tensor:
        scale = shortest / min(image.size)
        width, height = (max(shortest, int(length * scale)) for length in image.size)
        image = image.resize((width, height), resample)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = np.array(image.crop((left, top, left + side, top + side)))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std

    return prepared


def _open_clip(files: ClipFiles, device: torch.device | str) -> Clip:
    import open_clip

    if files.architecture is not None:
        model, _, preprocess = open_clip.create_model_and_transforms(
            files.architecture, pretrained=str(files.weights), device=device, precision="fp32"
        )
        tokenizer = open_clip.get_tokenizer(files.architecture)
    else:
        where = f"local-dir:{files.folder}"
        model, _, preprocess = open_clip.create_model_and_transforms(where, device=device, precision="fp32")
        tokenizer = open_clip.get_tokenizer(where)
    model = model.eval()

    def read(texts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        # one place more than there is room for shows which texts are too long
        ids = tokenizer(list(texts), context_length=model.context_length + 1)
        cut = (ids[:, -1] != 0).tolist()
        return model.encode_text(tokenizer(list(texts)).to(device)), cut

    return Clip(model, preprocess, model.encode_image, read)

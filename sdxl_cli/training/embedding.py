"""Textual inversion (arXiv 2208.01618): new vectors for a new word, while the whole model stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sdxl_cli.checkpoint.embedding import MAX_VECTORS
from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.write import config_note, modelspec, save_tensors
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.chunks import Chunk, chunks, reference
from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer
from sdxl_cli.generation.prompt_syntax import parse
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.text import ClipLEmbedder, Insert
from sdxl_cli.training.config import EmbeddingConfig, UNetTrainConfig
from sdxl_cli.training.lora_notes import dataset_notes
from sdxl_cli.training.place import SAVE_DTYPES
from sdxl_cli.training.unet_request import UNetRequest, base_of
from sdxl_cli.training.unet_task import UNetTask

SENTENCES: dict[str, tuple[str, ...]] = {
    "object": (
        "{}",
        "a photo of {}",
        "a picture of {}",
        "a close-up of {}",
        "a good photo of {}",
        "a bright photo of {}",
        "a cropped photo of {}",
        "a rendering of {}",
    ),
    "style": (
        "in the style of {}",
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "a rendering in the style of {}",
        "{}",
    ),
}
"""What is said of every picture, one of them at a time, in the place of its own caption."""

NAME = "learned"
"""Where the vectors are in the model while they are trained."""


class Learned(nn.Module):
    """The vectors of a word: ``clip_l`` [n, width of CLIP-L] and ``clip_g`` [n, width of bigG]."""

    def __init__(self, clip_l: Tensor, clip_g: Tensor) -> None:
        super().__init__()
        self.clip_l, self.clip_g = nn.Parameter(clip_l), nn.Parameter(clip_g)


def check_word(config: EmbeddingConfig) -> None:
    """Refuse what cannot stand in a prompt.

    Raises:
        UsageError: says what is wrong with the word, the number of vectors or the first word.
    """
    if not config.word or re.search(r"[\s()\[\]:|\\/,]", config.word):
        raise UsageError(
            f"--word {config.word!r} cannot stand in a prompt; give one word without brackets or colons"
        )
    if not 1 <= config.vectors <= MAX_VECTORS:
        raise UsageError(f"--vectors {config.vectors}: 1 to {MAX_VECTORS} can stand in a prompt")


def with_word(manifest: Manifest, config: EmbeddingConfig) -> Manifest:
    """The manifest with captions that have the word: sentences, or the pictures' own.

    Raises:
        UsageError: a picture's own caption does not have it, or has it where it is not read.
    """
    if config.captions != "own":
        said = tuple(sentence.format(config.word) for sentence in SENTENCES[config.captions])
        if unread := [sentence for sentence in said if not _has_word(sentence, config)]:
            raise UsageError(f"--vectors {config.vectors} leave no room in {unread[0]!r}; give fewer")
        return replace(manifest, rows=tuple(replace(row, captions=said) for row in manifest.rows))
    pattern = reference([config.word], bare=True)
    assert pattern
    silent = [
        row.path for row in manifest.kept if not row.captions or not all(map(pattern.search, row.captions))
    ]
    if silent:
        raise UsageError(
            f"{len(silent)} of {len(manifest.kept)} pictures have a caption without the word {config.word!r}, "
            f"{silent[0]} is the first; write it into them, or give --captions object or style"
        )
    unread = [
        row.path for row in manifest.kept if not all(_has_word(caption, config) for caption in row.captions)
    ]
    if unread:
        raise UsageError(
            f"{len(unread)} of {len(manifest.kept)} pictures have a caption with {config.word!r} after the 75 tokens "
            f"that are read, {unread[0]} is the first; write it earlier, or give --captions object or style"
        )
    return manifest


@torch.no_grad()
def first_vectors(model: SDXL, config: EmbeddingConfig) -> Learned:
    """Where the vectors begin: at the tokens of ``config.initial``, over and over; or at random among all tokens.

    Raises:
        UsageError: the first word is none that the model knows.
    """
    ids = Tokenizer.default().encode(config.initial)
    known = model.known_token_ids
    if config.initial and (not ids or (known is not None and not known.issuperset(ids))):
        raise UsageError(f"--initial-word {config.initial!r} is not known to the model; give another word")
    halves = []
    for embedder in model.conditioner.embedders:
        home = "transformer.text_model.embeddings" if isinstance(embedder, ClipLEmbedder) else "model"
        table = embedder.get_submodule(home).get_parameter("token_embedding.weight").detach()
        if ids:
            chosen = table[
                torch.tensor([ids[i % len(ids)] for i in range(config.vectors)], device=table.device)
            ]
        else:
            rows = table if known is None else table[torch.tensor(sorted(known), device=table.device)]
            noise = torch.randn(config.vectors, table.shape[1]).to(table)
            chosen = rows.mean(0) + noise * rows.std(0)
        halves.append(chosen.float().clone())
    return Learned(*halves)


def learn_embedding(request: UNetRequest, model: SDXL, manifest: Manifest) -> EmbeddingExport:
    """Give a model the vectors that a request asks for, and freeze everything else.

    Raises:
        UsageError: the model is a refiner, or does not know the first word.
    """
    if model.config.clip_l is None:
        raise UsageError(
            "an embedding has vectors for both text encoders, a refiner has one; train it with the base"
        )
    config = request.config.embedding
    model.requires_grad_(False)
    learned = first_vectors(model, config)
    model.add_module(NAME, learned)
    base = base_of(request)
    console().note(f"embedding {config.word} for {base.describe()}: {config.vectors} vectors")
    return EmbeddingExport(model, base, request.config, dataset_notes(manifest))


@dataclass
class EmbeddingTask(UNetTask):
    """Training on captions with the word, which is read as ``sdxl generate`` reads it."""

    def _encoded(self, captions: Sequence[str]) -> TextFeatures:
        config, learned = self.config.embedding, self.module.get_submodule(NAME)
        assert isinstance(learned, Learned)
        read = [_read(caption, config) for caption in captions]
        ids_l, ids_g = (
            torch.tensor([chunk.row(padding) for chunk in read], device=self.device)
            for padding in (PAD_CLIP_L, PAD_BIG_G)
        )
        inserts_l, inserts_g = (
            [
                Insert(row, position, half[vector.index])
                for row, chunk in enumerate(read)
                for position, vector in chunk.vectors()
            ]
            for half in (learned.clip_l, learned.clip_g)
        )
        features, pooled = self.module.conditioner.towers(
            ids_l, ids_g, inserts_l=inserts_l, inserts_g=inserts_g
        )
        return TextFeatures(torch.cat(features, dim=-1), pooled)


def _read(caption: str, config: EmbeddingConfig) -> Chunk:
    """What the encoders are given for a caption; of long ones, the first 75 tokens."""
    return chunks(parse(caption, "raw"), "raw", Tokenizer.default(), {config.word: config.vectors})[0]


def _has_word(caption: str, config: EmbeddingConfig) -> bool:
    """Whether the vectors are among what the encoders are given."""
    return next(_read(caption, config).vectors(), None) is not None


@dataclass(frozen=True, slots=True)
class EmbeddingExport:
    """Writes the vectors as ``sdxl generate --embedding``, A1111, ComfyUI and diffusers read them."""

    model: SDXL
    base: ModelFiles
    config: UNetTrainConfig
    notes: Mapping[str, str]
    """Metadata about the pictures."""

    @property
    def stem(self) -> str:
        """The word."""
        return self.config.embedding.word

    def write(self, path: Path, trained: Mapping[str, Tensor], step: int) -> None:
        """See :class:`~sdxl_cli.training.export.Export`."""
        notes = modelspec(path, self.model.config, self.stem) | config_note(self.model.config)
        notes["modelspec.architecture"] += "/textual-inversion"
        notes |= {"modelspec.trigger_phrase": self.stem, "ss_steps": str(step), **self.notes}
        notes["ss_new_sd_model_hash"] = self.base.sha256
        tensors = {half: trained[f"{NAME}.{half}"].detach() for half in ("clip_l", "clip_g")}
        save_tensors(path, tensors, notes, dtype=SAVE_DTYPES[self.config.save_dtype])

    def arguments(self, path: Path) -> Sequence[str]:
        """See :class:`~sdxl_cli.training.export.Export`."""
        name = "bundled" if self.base.is_bundled else str(self.base.path)
        return "--model", name, "--embedding", f"{path}:{self.stem}"

    def asked(
        self, request: GenerateRequest, path: Path, trained: Mapping[str, Tensor], step: int
    ) -> GenerateRequest:
        """See :class:`~sdxl_cli.training.export.Export`."""
        if not path.exists():
            self.write(path, trained, step)
        return replace(request, embedding=(f"{path}:{self.stem}",))

"""``sdxl train-unet``, from files to a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import Role, locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.console import get as console
from sdxl_cli.data.cache import LatentCache, weights_hash
from sdxl_cli.data.encoding import fill_latents
from sdxl_cli.data.loader import BatchLoader
from sdxl_cli.data.manifest import Manifest, read_manifest
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer
from sdxl_cli.model import text, unet
from sdxl_cli.model.config import CONFIGS, ModelConfig, Part
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.folder import prepare
from sdxl_cli.training.loop import Run
from sdxl_cli.training.unet_task import UNetTask
from sdxl_cli.training.vocabulary import compact, expand

RESULT = "model.safetensors"
SAVE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetRequest:
    """What ``sdxl train-unet`` was asked for."""

    data: Path
    """A manifest of ``sdxl bucket-dataset``."""
    output: Path
    config: UNetTrainConfig
    init: str | None = None
    """A model to start from."""
    vae: str | None = None
    """The autoencoder, when there is no ``init`` or another one is wanted."""
    text_from: str | None = None
    """A model whose text encoders are used, frozen; for a refiner beside a base."""
    cache: Path | None = None
    """Folder of cached latents; default: in ``output``."""
    resume: bool = False


@dataclass(frozen=True, slots=True)
class UNetResult:
    """What came out."""

    path: Path
    steps: int
    loss: float


def train_unet(request: UNetRequest) -> UNetResult:
    """Encode the pictures once, train, average and write the whole model.

    Raises:
        UsageError, FileError: the request does not fit together.
        NumericError, Interrupted: see :class:`~sdxl_cli.training.loop.Run`.
    """
    config = request.config
    manifest = read_manifest(request.data)
    require_captions(manifest)
    prepare(request.output, config, resume=request.resume)
    torch.manual_seed(config.loop.seed)
    vae = _vae(request)
    model = _model(request, vae)
    ids = _compacted(model, manifest) if _learns_words(request, model) else None
    model.to(memory_format=torch.channels_last).train()
    cache = fill_cache(manifest, vae, request.cache or request.output / "latents")
    loader = BatchLoader(manifest, config.loop.batch_size, seed=config.loop.seed, cache=cache)
    task = UNetTask(model, loader, _Tokens(Tokenizer.default(), config.caption_tokens), config)
    run = Run(task, config.loop, request.output, _record(model, vae, config, ids))
    if request.resume:
        run.resume()
    run.train()
    path = request.output / RESULT
    _export(path, model, run.averaged(), vae, ids, config)
    return UNetResult(path, run.progress.step, run.progress.loss)


def _record(model: SDXL, vae: Autoencoder, config: UNetTrainConfig, ids: Tensor | None) -> dict[str, object]:
    """What a run must be to go on with a state."""
    return {
        "task": "unet",
        **asdict(model.config),
        "vae_weights": weights_hash(vae.state_dict()),
        "prediction": config.prediction,
        "zero_terminal_snr": config.zero_terminal_snr,
        "token_ids": None if ids is None else ids.tolist(),
    }


def require_captions(manifest: Manifest) -> None:
    """Refuse a data set with pictures that have no caption: training on empty text is never meant.

    Raises:
        UsageError: names the first of them.
    """
    bare = [row.path for row in manifest.kept if not row.captions]
    if bare:
        raise UsageError(
            f"{len(bare)} of {len(manifest.kept)} pictures have no caption, {bare[0]} is the first; "
            "add captions, or make the manifest with --require-captions to leave them out"
        )


def fill_cache(manifest: Manifest, vae: Autoencoder, folder: Path) -> LatentCache:
    """Encode every crop that is not in the cache yet."""
    cache = LatentCache(folder, weights_hash(vae.state_dict()), manifest.config.hygiene)
    missing = cache.missing(manifest.kept)
    with console().bar("encoding", total=len(missing)) as bar:
        for added in fill_latents(cache, manifest, vae):
            bar.advance(added)
    return cache


def _vae(request: UNetRequest) -> Autoencoder:
    files = _files(request.vae, "vae") if request.vae else _files(request.init, "model")
    if files is None:
        raise UsageError("give --vae FILE: without --init there is no autoencoder to encode pictures with")
    return load_vae(files, dtype=torch.float32)


def _files(spec: str | None, role: Role) -> ModelFiles | None:
    return None if spec is None else locate(spec, role)


def _model(request: UNetRequest, vae: Autoencoder) -> SDXL:
    """U-Net and text encoders, with gradients on what is trained; its configuration has ``vae``'s in it."""
    config = request.config
    if request.init:
        model = _load(request.init, ("unet", "text"))
    elif request.text_from or config.train_text_encoders:
        model = SDXL(named(config.model), ("unet", "text"))
        unet.initialize(model.unet, model.config.big_g.embed_dim)
        for embedder in model.conditioner.embedders:
            text.initialize(embedder)
    else:
        raise UsageError(
            "the text encoders would be random and frozen; give --init or --text-from, "
            "or set train_text_encoders = true"
        )
    if vae.config.z_channels != model.config.unet.in_channels:
        raise UsageError(
            f"the autoencoder has {vae.config.z_channels} latent channels, the U-Net reads "
            f"{model.config.unet.in_channels}; give another --vae"
        )
    model.config = replace(model.config, vae=vae.config)
    if request.text_from:
        _copy_text(model, request.text_from)
    model.unet.requires_grad_(True)
    model.conditioner.requires_grad_(config.train_text_encoders)
    return model


def _load(spec: str, parts: Collection[Part]) -> SDXL:
    return load_model(locate(spec, "model"), parts, dtype=torch.float32, vae_dtype=torch.float32)


def _learns_words(request: UNetRequest, model: SDXL) -> bool:
    """Whether the token tables are to have the captions' words only: not when they were trained on all."""
    built = not request.init and not request.text_from
    return request.config.train_text_encoders and (built or model.known_token_ids is not None)


def named(name: str) -> ModelConfig:
    """A configuration by its name.

    Raises:
        UsageError: none has that name.
    """
    if name not in CONFIGS:
        raise unknown("model", name, CONFIGS)
    return CONFIGS[name]


def _copy_text(model: SDXL, spec: str) -> None:
    """Take the text encoders of another model: the last one, bigG, is what a refiner shares with its base.

    Raises:
        UsageError: they are of another size, or there are too few of them.
    """
    source = _load(spec, ["text"])
    mine, theirs = model.config, source.config
    if mine.big_g != theirs.big_g or mine.clip_l not in (None, theirs.clip_l):
        raise UsageError(
            f"--text-from {spec} has not the text encoders that the model reads; give another one"
        )
    pairs = zip(reversed(model.conditioner.embedders), reversed(source.conditioner.embedders), strict=False)
    for target, embedder in pairs:
        target.load_state_dict(embedder.state_dict())
    model.known_token_ids = source.known_token_ids


def _compacted(model: SDXL, manifest: Manifest) -> Tensor:
    """Cut the token tables down to what the captions use; a model already cut down keeps what it knows."""
    tokenizer = Tokenizer.default()
    captions = {caption for row in manifest.kept for caption in row.captions}
    used = set(model.known_token_ids or ())
    for caption in captions:
        used |= {*tokenizer.row(caption, PAD_CLIP_L), *tokenizer.row(caption, PAD_BIG_G)}
    ids = torch.tensor(sorted(used), dtype=torch.long)
    compact(model, ids)
    return ids


class _Tokens:
    """Tokenizes captions, each once, to ``length`` tokens."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [self._one(caption) for caption in captions]
        ids_l, ids_g = (torch.stack(ids) for ids in zip(*rows, strict=True))
        return ids_l, ids_g

    def _one(self, caption: str) -> tuple[Tensor, Tensor]:
        if caption not in self.seen:
            ids_l, ids_g = (self.tokenizer.row(caption, padding) for padding in (PAD_CLIP_L, PAD_BIG_G))
            if PAD_CLIP_L not in ids_l[: self.length]:  # the end of the text, which CLIP-L also pads with
                raise UsageError(
                    f"caption_tokens = {self.length} would cut {caption[:60]!r}; the longest caption needs more"
                )
            self.seen[caption] = torch.tensor(ids_l[: self.length]), torch.tensor(ids_g[: self.length])
        return self.seen[caption]


def _export(
    path: Path,
    model: SDXL,
    trained: dict[str, Tensor],
    vae: Autoencoder,
    ids: Tensor | None,
    config: UNetTrainConfig,
) -> None:
    state = {name: value.detach() for name, value in model.state_dict().items()} | trained
    if ids is not None:
        state = expand(state, ids, model.config.big_g.vocab_size)
    state |= {f"first_stage_model.{name}": value for name, value in vae.state_dict().items()}
    known = None if model.known_token_ids is None else sorted(model.known_token_ids)
    dtype = SAVE_DTYPES[config.save_dtype]
    made = replace(model.config, native_size=config.native_size or model.config.native_size)
    save_model(
        path,
        state,
        made,
        dtype=dtype,
        prediction=config.prediction,
        zero_terminal_snr=config.zero_terminal_snr,
        keep_token_ids=known,
    )

"""``sdxl train-unet``, from files to a file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model, load_vae
from sdxl_cli.console import get as console
from sdxl_cli.data.cache import LatentCache, TextCache, weights_hash
from sdxl_cli.data.encoding import fill_latents
from sdxl_cli.data.loader import BatchLoader
from sdxl_cli.data.manifest import Manifest, read_manifest
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer
from sdxl_cli.model import text, unet
from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import Part
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.adapters import add_adapters
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.embedding import EmbeddingTask, check_word, learn_embedding, with_word
from sdxl_cli.training.export import Export, ModelExport, SaveModels, file_name
from sdxl_cli.training.loop import Run, Watcher
from sdxl_cli.training.lora_run import learn_lora
from sdxl_cli.training.measuring import LargestBatch, Measured, NoBatches, measure
from sdxl_cli.training.parts import choose_trained, trained_parts, with_part_rates
from sdxl_cli.training.place import hold, training_device
from sdxl_cli.training.plan import Plan, plan, settle
from sdxl_cli.training.recompute import recompute
from sdxl_cli.training.samples import Samples, Wanted, sample_plans
from sdxl_cli.training.session import ALL, Session, Share, session
from sdxl_cli.training.text_cache import DTYPES, cached_text
from sdxl_cli.training.unet_request import (
    UNetRequest,
    as_the_model_predicts,
    base_of,
    named,
    require_captions,
    require_inputs,
    require_same_prediction,
    tell_of_missing_scores,
)
from sdxl_cli.training.unet_task import UNetTask
from sdxl_cli.training.validation import Validation
from sdxl_cli.training.vocabulary import compact
from sdxl_cli.training.world import ALONE, World


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
    data = require_inputs(request)
    request = as_the_model_predicts(request)
    config = request.config
    manifest = _manifest(data, config)
    plans = sample_plans(request.sample_lines, config)
    with session(request.output, config, resume=request.resume, shards=not config.builds_on) as here:
        torch.manual_seed(config.loop.seed)
        vae = _vae(request).to(here.device)
        task, ids = _task(request, vae, manifest, here.home)
        folder = request.cache or request.output / "latents"
        cache = fill_cache(manifest, vae, folder, here.world)
        with here.world.lead_first():
            text = _text_cache(request, task, manifest, folder)
        dealing = here.dealing(config.loop)
        task.batches = loader = BatchLoader(
            manifest, config.loop.batch_size, seed=config.loop.seed, cache=cache, text=text, **dealing
        )
        # only now, as whatever has read its weights knew the model by its own names
        built_on = _build_on(request, task.module, manifest, loader.sampler.batches_per_epoch, here.share)
        export = built_on or ModelExport(task.module, vae, ids, config)
        frozen = _frozen_weights(request, task.module)  # before they are kept in another precision
        watchers = _watchers(request, task, vae, export, plans, text, here)
        if not plans:  # pictures are encoded, and none are made: the room is the U-Net's
            vae.to("cpu")
        largest = LargestBatch.of(manifest, config.loop.batch_size, task.module.config.vae)
        _settled(task, largest, here.device, text_stays=bool(plans) or text is None)
        if not here.sharded:
            task.module.to(here.device)
            if not plans and text is not None:
                task.module.conditioner.to("cpu")
        record = _record(request, task.module, vae, ids) | {"frozen_weights": frozen}
        loop = with_part_rates(config.loop, task.module.config)
        run = Run(task, loop, request.output, record, watchers, here)
        if here.state:
            run.resume()
        run.train()
        path = request.output / file_name(export)
        if (shipped := run.shipped()) is not None:
            export.write(path, shipped, run.progress.step)
        return UNetResult(path, run.progress.step, run.progress.loss)


def try_unet(request: UNetRequest) -> Measured:
    """What ``--dry-run`` measures: two steps on the largest size, with noise for pictures; nothing is written.

    Raises:
        UsageError, FileError, NumericError: as :func:`train_unet`.
    """
    data = require_inputs(request)
    request = as_the_model_predicts(request)
    config = request.config
    manifest = _manifest(data, config)
    device = training_device(config.loop)
    torch.manual_seed(config.loop.seed)
    vae = _vae(request)
    task, _ = _task(request, vae, manifest, device)
    _build_on(request, task.module, manifest, 1)
    largest = LargestBatch.of(manifest, config.loop.batch_size, vae.config)
    _settled(task, largest, device, text_stays=True)
    task.module.to(device)
    task.batches = largest
    height, width = largest.size
    return measure(task, with_part_rates(config.loop, task.module.config), f"{width}x{height}")


def _manifest(path: Path, config: UNetTrainConfig) -> Manifest:
    """What is trained on, with the captions that are trained on."""
    manifest = read_manifest(path)
    if config.embedding.word:
        check_word(config.embedding)
        return with_word(manifest, config.embedding)
    if not config.allow_missing_captions:
        require_captions(manifest)
    return manifest


def _build_on(
    request: UNetRequest, model: SDXL, manifest: Manifest, batches_per_epoch: int, share: Share = ALL
) -> Export | None:
    """Freeze the model and put in what is trained beside it; None where its own weights are."""
    if request.config.embedding.word:
        return learn_embedding(request, model, manifest)
    if request.config.lora.rank:
        return learn_lora(request, model, manifest, batches_per_epoch, share)
    return None


def _task(
    request: UNetRequest, vae: Autoencoder, manifest: Manifest, device: torch.device
) -> tuple[UNetTask, Tensor | None]:
    """The model on its device, still without batches; and the token ids that it is cut down to."""
    model = _model(request, vae)
    tell_of_missing_scores(manifest, model.config)
    ids = _compacted(model, manifest) if _learns_words(request, model) else None
    model.conditioner.to(device)  # the U-Net follows in the precision that it is kept in
    model.to(memory_format=torch.channels_last).train()
    return _untold(model, request.config), ids


def _untold(model: SDXL, config: UNetTrainConfig) -> UNetTask:
    """The task of training a model, still without batches."""
    tokens = _Tokens(Tokenizer.default(), config.caption_tokens)
    kind = EmbeddingTask if config.embedding.word else UNetTask
    return kind(model, NoBatches(), tokens, config)


def _settled(task: UNetTask, largest: LargestBatch, device: torch.device, text_stays: bool) -> None:
    """Give the model its precision, and keep as much of every pass as there is room for on its device to be."""
    hold(task.module, task.config, device)
    recompute(task.module.unet, settle(replace(task, batches=largest), device, text_stays))


def plan_unet(request: UNetRequest) -> Plan:
    """What ``--plan`` counts: bytes of a step with each ``--memory``, without any weights being read or made.

    The size is the largest of the data, or the model's own without any.

    Raises:
        UsageError, FileError: the request does not fit together.
    """
    config = request.config
    if config.embedding.word:
        raise UsageError("--plan counts the training of U-Nets and LoRAs; leave it out for an embedding")
    device = training_device(config.loop)
    sizes = base_of(request).config if request.init else named(config.model)
    with blank():
        model = SDXL(sizes, ("unet", "text"))
    parts = trained_parts(config, sizes)
    if config.lora.rank:
        add_adapters(model, config.lora, parts)
    else:
        choose_trained(model, parts)
    hold(model, config, device)
    task = _untold(model.to(memory_format=torch.channels_last).train(), config)
    side, count = config.native_size or sizes.native_size, config.loop.batch_size
    if request.data:
        batch = LargestBatch.of(read_manifest(request.data), count, sizes.vae)
    else:
        batch = LargestBatch((side, side), count, sizes.vae)
    height, width = batch.size
    encodes = config.train_text_encoders or config.cache_text != "fill" or bool(request.sample_lines)
    return plan(replace(task, batches=batch), device, f"{width}x{height}", encodes)


def _watchers(
    request: UNetRequest,
    task: UNetTask,
    vae: Autoencoder,
    export: Export,
    plans: Sequence[Wanted],
    text: TextCache | None,
    here: Session,
) -> list[Watcher]:
    """Those that the request asks for, in the order of their work."""
    config, found = request.config, list[Watcher]()
    if config.save_model_every:
        found.append(SaveModels(export, request.output, config.save_model_every))
    if request.validation:
        manifest = _manifest(request.validation, config)
        cache = fill_cache(manifest, vae, request.cache or request.output / "latents", here.world)
        size, began_with = config.loop.batch_size, here.share.began_with
        # one process looks at the batches that all train on together, in parts that fit
        batches = BatchLoader(
            manifest,
            size,
            cache=cache,
            text=text,
            together=size * began_with,
            parts=began_with,
            remainder="short",
        )
        found.append(Validation(task, batches, config))
    if plans:
        found.append(Samples(task.module, vae, plans, config, request.output, export))
    return found


def _record(request: UNetRequest, model: SDXL, vae: Autoencoder, ids: Tensor | None) -> dict[str, object]:
    """What a run must be to go on with a state."""
    config = request.config
    return {
        "lora": asdict(replace(config.lora, layout="kohya")) if config.lora.rank else {},
        "embedding": asdict(config.embedding) if config.embedding.word else {},
        "base": base_of(request).sha256 if config.builds_on else "",
        "task": "unet",
        **asdict(model.config),
        "vae_weights": weights_hash(vae.state_dict()),
        "prediction": config.prediction,
        "zero_terminal_snr": config.zero_terminal_snr,
        "objective": config.objective,
        "weight_dtype": config.weight_dtype,
        "token_ids": None if ids is None else ids.tolist(),
    }


def _frozen_weights(request: UNetRequest, model: SDXL) -> str:
    """A hash of what is not trained, as the state has no copy to go on from; the record has that of a base."""
    if request.config.builds_on and not request.text_from:
        return ""
    return weights_hash({name: p for name, p in model.named_parameters() if not p.requires_grad})


def _text_cache(request: UNetRequest, task: UNetTask, manifest: Manifest, folder: Path) -> TextCache | None:
    """Features of the captions of all manifests, where they are used; the task then knows those of the empty text."""
    manifests = [manifest, *([read_manifest(request.validation)] if request.validation else [])]
    tokens = _Tokens(Tokenizer.default(), 77)
    cache = cached_text(folder, task.module.conditioner, manifests, request.config, tokens)
    if cache is not None:
        task.empty_text = cache.read([""])
        if request.config.caption_tokens < 77:  # says which captions are longer
            task.tokenize([caption for one in manifests for row in one.kept for caption in row.captions])
    return cache


def fill_cache(manifest: Manifest, vae: Autoencoder, folder: Path, world: World = ALONE) -> LatentCache:
    """Encode every crop that is not in the cache yet; each process its share of them.

    A cache that has all of them is used in whatever precision it is.
    """
    digest, hygiene = weights_hash(vae.state_dict()), manifest.config.hygiene
    caches = [LatentCache(folder, digest, hygiene, dtype=dtype) for dtype in DTYPES]
    cache = next((one for one in caches if not one.missing(manifest.kept)), caches[0])
    missing = cache.missing(manifest.kept)
    world.barrier()  # before others write, or they miss what this one counts on
    mine = missing[world.rank :: world.size]
    with console().bar("encoding", total=len(mine)) as bar:
        for added in fill_latents(cache, manifest, vae, rows=mine):
            bar.advance(added)
    world.barrier()
    return cache if world.size == 1 else LatentCache(folder, digest, hygiene, dtype=cache.dtype)


def _vae(request: UNetRequest) -> Autoencoder:
    files = locate(request.vae, "vae") if request.vae else base_of(request)
    return load_vae(files, dtype=torch.float32)


def _model(request: UNetRequest, vae: Autoencoder) -> SDXL:
    """U-Net and text encoders, with gradients on what is trained; its configuration has ``vae``'s in it."""
    config = request.config
    if request.init or config.builds_on:
        files = base_of(request)
        require_same_prediction(files, config)
        model = _load(files, ("unet", "text"))
    else:
        model = SDXL(named(config.model), ("unet", "text"))
        unet.initialize(model.unet, model.config.big_g.embed_dim)
        for embedder in model.conditioner.embedders:
            text.initialize(embedder)
    if vae.config.z_channels != model.config.unet.in_channels:
        raise UsageError(
            f"the autoencoder has {vae.config.z_channels} latent channels, the U-Net reads "
            f"{model.config.unet.in_channels}; give another --vae"
        )
    model.config = replace(model.config, vae=vae.config)
    if request.text_from:
        _copy_text(model, request.text_from)
    choose_trained(model, trained_parts(config, model.config))
    return model


def _load(files: ModelFiles, parts: Collection[Part]) -> SDXL:
    return load_model(files, parts, dtype=torch.float32, vae_dtype=torch.float32)


def _learns_words(request: UNetRequest, model: SDXL) -> bool:
    """Whether the token tables are to have the captions' words only: not when they were trained on all."""
    built = not request.init and not request.text_from
    if request.config.builds_on:  # changes layers or has vectors of its own: the tables stay
        return False
    return request.config.train_text_encoders and (built or model.known_token_ids is not None)


def _copy_text(model: SDXL, spec: str) -> None:
    """Take the text encoders of another model: the last one, bigG, is what a refiner shares with its base.

    Raises:
        UsageError: they are of another size, or there are too few of them.
    """
    source = _load(locate(spec, "model"), ["text"])
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
    captions = {"", *(caption for row in manifest.kept for caption in row.captions)}
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

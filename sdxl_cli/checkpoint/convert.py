"""Models from one layout and precision to another, tensor by tensor: the memory needed is that of the largest one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdxl_cli import console as consoles
from sdxl_cli.checkpoint.atomic import atomic_folder
from sdxl_cli.checkpoint.convert_source import (
    Conversion,
    Findings,
    Source,
    full_tables,
    left_out,
    open_source,
    single_file,
)
from sdxl_cli.checkpoint.diffusers_config import (
    PADDING,
    Json,
    index_json,
    scheduler_json,
    to_text,
    tokenizer_files,
    tower_json,
    unet_json,
    vae_json,
)
from sdxl_cli.checkpoint.identify import CLIP_L, UNET, VAE, big_g_prefix
from sdxl_cli.checkpoint.layouts import (
    Plan,
    big_g_to_diffusers,
    clip_l_to_diffusers,
    unet_to_diffusers,
    vae_to_diffusers,
)
from sdxl_cli.checkpoint.stream import Pending, require_room, shards, write_pending
from sdxl_cli.checkpoint.tensor_file import changed
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ALL_PARTS, ModelConfig


@dataclass(frozen=True)
class Vocabulary:
    """CLIP's byte-pair encoding, which the tokenizers of a folder are written from."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Converted:
    """What came out."""

    path: Path
    files: tuple[Path, ...]
    """Files of tensors."""
    size: int
    """Bytes of them."""
    tensors: int
    not_finite: tuple[str, ...]
    """Tensors with NaN or infinity, as in the source."""
    dropped: tuple[str, ...]
    """Large tensors of no part of SDXL, for which a folder has no place."""
    has_tokenizers: bool


@dataclass(frozen=True)
class _Network:
    """A folder of the pipeline that has tensors."""

    name: str
    stem: str
    settings: Json
    tensors: dict[str, Pending]


def convert(job: Conversion, vocabulary: Vocabulary) -> Converted:
    """Write the model in another layout or precision.

    Raises:
        FileError: the target exists, the source is damaged, or diffusers has no words for such a network.
        NumericError: a number is too large for the new dtype.
        SdxlError: the disk has not enough room.
    """
    if job.target.exists():
        raise FileError(f"{job.target} exists already; choose another name or remove it")
    console, findings = consoles.get(), Findings()
    advance: list[Callable[[int], None]] = []
    source = open_source(job, findings, lambda size: advance[0](size))
    with console.bar(
        f"writing {job.target.name}", sum(tensor.size for tensor in source.pending.values())
    ) as bar:
        advance.append(bar.advance)
        if job.layout == "single":
            files, has_tokenizers = _write_file(job, source), False
        else:
            files, has_tokenizers = _write_folder(job, source, findings, vocabulary)
    return Converted(
        path=job.target,
        files=files,
        size=sum(path.stat().st_size for path in files),
        tensors=len(source.pending),
        not_finite=tuple(findings.not_finite),
        dropped=tuple(findings.dropped),
        has_tokenizers=has_tokenizers,
    )


def _write_file(job: Conversion, source: Source) -> tuple[Path, ...]:
    tensors, metadata = single_file(job, source)
    write_pending(job.target, tensors, metadata, overwrite=False)
    return (job.target,)


def _write_folder(
    job: Conversion, source: Source, findings: Findings, vocabulary: Vocabulary
) -> tuple[tuple[Path, ...], bool]:
    networks, used = _networks(job, full_tables(source, job.source.config))
    notes = source.metadata | left_out(job, source, used, findings)
    texts = {} if job.parts == ("vae",) else _texts(job, networks, vocabulary)
    require_room(job.target, sum(t.size for network in networks for t in network.tensors.values()))
    written: list[Path] = []
    with atomic_folder(job.target) as folder:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        for network in networks:
            home = folder if job.parts == ("vae",) else folder / network.name
            home.mkdir(exist_ok=True)
            (home / "config.json").write_text(to_text(network.settings), "utf-8")
            paths = _write_network(home, network, job, {} if written else notes)
            written.extend(job.target / path.relative_to(folder) for path in paths)
    return tuple(written), any("vocab.json" in name for name in texts)


def _write_network(
    home: Path, network: _Network, job: Conversion, notes: Mapping[str, str]
) -> Iterator[Path]:
    """The files of one network, and the index of them when there are several; named as diffusers names them."""
    variant = f".{job.variant}" if job.variant else ""
    parts = list(shards(network.tensors, job.max_shard_size))
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        count = f"-{number:05}-of-{len(parts):05}" if len(parts) > 1 else ""
        path = home / f"{network.stem}{variant}{count}.safetensors"
        where |= dict.fromkeys(part, path.name)
        # transformers reads no file that does not name the framework
        write_pending(path, part, {**(notes if number == 1 else {}), "format": "pt"})
        yield path
    if len(parts) > 1:
        size = sum(tensor.size for tensor in network.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (home / f"{network.stem}.safetensors.index{variant}.json").write_text(to_text(index), "utf-8")


def _networks(job: Conversion, source: Source) -> tuple[list[_Network], set[str]]:
    """The networks of the folder, and the single file's names that are in one of them."""
    config = job.source.config
    big_g = big_g_prefix(config)
    kinds: list[tuple[str, str, str, Callable[[list[str]], Plan], Callable[[], Json]]] = [
        (
            "unet",
            "diffusion_pytorch_model",
            UNET,
            lambda keys: unet_to_diffusers(keys, config.unet),
            lambda: unet_json(config),
        ),
        (
            "vae",
            "diffusion_pytorch_model",
            VAE,
            lambda keys: vae_to_diffusers(keys, config.vae),
            lambda: vae_json(config.vae, config.native_size),
        ),
        ("text_encoder", "model", CLIP_L, clip_l_to_diffusers, lambda: _clip_l_json(config)),
        (
            "text_encoder_2",
            "model",
            big_g,
            big_g_to_diffusers,
            lambda: tower_json(config.big_g, "CLIPTextModelWithProjection"),
        ),
    ]
    networks, used = [], set()
    for name, stem, prefix, plan_of, settings in kinds:
        keys = [key.removeprefix(prefix) for key in source.pending if key.startswith(prefix)]
        if keys:
            plan = plan_of(keys)
            tensors = {new: _changed(new, prefix, plan, source.pending) for new in plan}
            used |= {prefix + key for made in plan.values() for key in made.keys}
            networks.append(_Network(name, stem, settings(), tensors))
    return networks, used


def _changed(name: str, prefix: str, plan: Plan, pending: Mapping[str, Pending]) -> Pending:
    """A tensor of the folder, made of those of the single file when it is wanted."""
    source = plan[name]
    made_of = [pending[prefix + key] for key in source.keys]
    shape = source.shape({key: tensor.shape for key, tensor in zip(source.keys, made_of, strict=True)})
    return Pending(
        made_of[0].dtype,
        shape,
        lambda: changed(source, [tensor.make() for tensor in made_of]).reshape(shape),
    )


def _clip_l_json(config: ModelConfig) -> Json:
    if config.clip_l is None:
        raise FileError("a refiner has no CLIP-L text encoder, and this file has its tensors; it is damaged")
    return tower_json(config.clip_l, "CLIPTextModel")


def _texts(job: Conversion, networks: Sequence[_Network], vocabulary: Vocabulary) -> dict[str, str]:
    """What a pipeline has beside its networks: tokenizers, and, when it is whole, the scheduler and the index."""
    config, files = job.source.config, job.source
    towers = [network.name for network in networks if network.name.startswith("text_encoder")]
    sizes = {config.big_g.vocab_size, *([config.clip_l.vocab_size] if config.clip_l else [])}
    has_tokenizers = bool(towers) and sizes == {len(vocabulary.ids)}
    texts: dict[str, str] = {}
    for tower in towers if has_tokenizers else ():
        name = tower.replace("text_encoder", "tokenizer")
        written = tokenizer_files(
            vocabulary.ids, vocabulary.merges, PADDING[name], config.big_g.context_length
        )
        texts |= {f"{name}/{file}": text for file, text in written.items()}
    if set(job.parts) == set(ALL_PARTS):
        scheduler = scheduler_json(files.prediction, files.identity.zero_terminal_snr)
        texts["scheduler/scheduler_config.json"] = to_text(scheduler)
        texts["model_index.json"] = to_text(index_json(files.identity.kind, has_tokenizers))
    return texts

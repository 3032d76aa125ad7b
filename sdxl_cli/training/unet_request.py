"""What ``sdxl train-unet`` is asked for, and what must be there before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.lora import is_lora_file
from sdxl_cli.console import get as console
from sdxl_cli.data.manifest import Manifest
from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.model.config import CONFIGS, ModelConfig
from sdxl_cli.training.config import UNetTrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetRequest:
    """What ``sdxl train-unet`` was asked for."""

    data: Path | None
    """A manifest of ``sdxl bucket-dataset``."""
    output: Path
    config: UNetTrainConfig
    init: str | None = None
    """A model to start from, or that a LoRA is for; None: that of a LoRA is what generation takes by itself."""
    lora: str | None = None
    """A LoRA to go on from."""
    vae: str | None = None
    """The autoencoder, when there is no ``init`` or another one is wanted."""
    text_from: str | None = None
    """A model whose text encoders are used, frozen; for a refiner beside a base."""
    cache: Path | None = None
    """Folder of cached latents; default: in ``output``."""
    resume: bool = False
    validation: Path | None = None
    """A manifest of held-out pictures, whose loss is measured now and then."""
    sample_lines: tuple[Line, ...] = ()
    """Prompts of pictures that are made now and then."""


def named(name: str) -> ModelConfig:
    """A configuration by its name.

    Raises:
        UsageError: none has that name.
    """
    if name not in CONFIGS:
        raise unknown("model", name, CONFIGS)
    return CONFIGS[name]


def starting_points(
    model: str | None, init: str | None, config: UNetTrainConfig
) -> tuple[str | None, str | None]:
    """What ``--model`` and ``--init`` mean: the model to begin with, and a LoRA to go on from.

    Raises:
        UsageError: they do not go together, or a LoRA is to be the start of something else.
    """
    path = Path(init).expanduser() if init else None
    is_lora = path is not None and is_lora_file(path)
    if is_lora and not config.lora.rank:
        raise UsageError(f"--init {init} is a LoRA; give --preset lora to go on with it, or a model to train")
    if model and init and not is_lora:
        raise UsageError("--model and --init both name a model to begin with; give one of them")
    return (model, init) if is_lora else (model or init, None)


def base_of(request: UNetRequest) -> ModelFiles:
    """The model that training begins with.

    Raises:
        FileError, UsageError, NetworkError: see :func:`~sdxl_cli.checkpoint.locate.locate`.
    """
    return locate(request.init, "model")


def require_inputs(request: UNetRequest) -> Path:
    """The manifest, when there is all that the stage needs.

    Raises:
        UsageError: names everything that is missing, so that one look is enough.
    """
    config, missing = request.config, []
    if request.data is None:
        missing.append("--data FILE, a manifest that bucket-dataset wrote")
    # the model that a LoRA or an embedding is for may be the one that generation takes by itself
    has_start = bool(request.init or config.builds_on)
    if config.starts_from == "weights" and not has_start:
        missing.append(f"--init FILE, the {config.model} model that this stage goes on from")
    elif not has_start:
        if not request.vae:
            missing.append("--vae FILE, the autoencoder that encodes the pictures")
        if not (request.text_from or config.train_text_encoders):
            missing.append("--text-from FILE, a model with trained text encoders")
    if missing:
        raise UsageError(f"training {config.model} needs {' and '.join(missing)}")
    assert request.data is not None
    return request.data


def as_the_model_predicts(request: UNetRequest) -> UNetRequest:
    """The request of a LoRA or an embedding, told what the model that it is for predicts, where it says nothing else.

    That model stays as it is, and so does what it says; a stage that trains the model must be told.
    """
    config = request.config
    said = Formulation(config.prediction, config.zero_terminal_snr)
    if not config.builds_on or config.allow_other_prediction or said != Formulation():
        return request
    files = base_of(request)
    theirs = replace(config, prediction=files.prediction, zero_terminal_snr=files.identity.zero_terminal_snr)
    return replace(request, config=theirs)


def require_same_prediction(files: ModelFiles, config: UNetTrainConfig) -> None:
    """Refuse to go on from a model that was taught to say something else: its result would be noise for long.

    Raises:
        UsageError: says what the model predicts.
    """
    theirs = Formulation(files.prediction, files.identity.zero_terminal_snr)
    ours = Formulation(config.prediction, config.zero_terminal_snr)
    if theirs != ours and not config.allow_other_prediction:
        sets = f"--set prediction={theirs.prediction} --set zero_terminal_snr={str(theirs.zero_terminal_snr).lower()}"
        raise UsageError(
            f"--init {files.name} predicts {theirs}, the configuration says {ours}; give {sets}, "
            "or --set allow_other_prediction=true to teach it anew"
        )


def require_captions(manifest: Manifest) -> None:
    """Refuse a data set with pictures that have no caption: training on empty text is never meant.

    Raises:
        UsageError: names the first of them.
    """
    bare = [row.path for row in manifest.kept if not row.captions]
    if bare:
        raise UsageError(
            f"{len(bare)} of {len(manifest.kept)} pictures have no caption, {bare[0]} is the first; "
            "add captions, leave them out with bucket-dataset --require-captions, or give --allow-missing-captions"
        )


def tell_of_missing_scores(manifest: Manifest, model: ModelConfig) -> None:
    """Say when a model that is told aesthetic scores is trained on pictures without any."""
    bare = sum(row.aesthetic_score is None for row in manifest.kept)
    if model.is_refiner and bare:
        console().warn(
            f"{bare} of {len(manifest.kept)} pictures have no aesthetic_score and are trained as of 6.0; "
            "a model learns nothing about quality from one number"
        )

"""What a training run is told, as frozen dataclasses that presets and ``--set`` fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.generation.request import LARGEST_SEED

DropoutMode = Literal["joint", "independent", "empty"]
TEXT_OUTPUTS = ("clip_l", "big_g", "pooled")
SCALARS = ("original_size", "crop_top_left", "target_size", "aesthetic_score")
PRODIGY_LEAST = 0.01
"""A learning_rate below it was meant for another optimizer: with it, Prodigy would hardly move."""
OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy"]
Schedule = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    name: OptimizerName = "adamw"
    """adamw: torch's fused step; adafactor: torch's, whose second moments are a row and a column, and whose rate is
    relative to each weight's root mean square, so that it is not for LoRAs and embeddings; adamw8bit and
    prodigy need a package each, ``pip install 'sdxl-cli[adamw8bit]'`` and ``'sdxl-cli[prodigy]'``."""
    learning_rate: float = 1e-4
    """The highest of the run. prodigy finds its own: its usual value is 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Not for adafactor."""
    eps: float = 1e-8
    """Not for adafactor."""
    rates: dict[str, float] = field(default_factory=dict)
    """Highest rates of parts, instead of ``learning_rate``: of what ``train-unet`` trains ``unet``, ``clip_l`` and
    ``big_g``, else of parameters whose names begin so. 0 leaves a part as it is."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    schedule: Schedule = "constant_with_warmup"
    """How the rate goes on after the warm-up: names and curves of transformers' schedules."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    decay_steps: int = 0
    """With a constant schedule: the last steps of the run, over which the rate falls linearly to 0."""
    cycles: float = 1.0
    """Of ``cosine_with_restarts``: whole cycles from the highest rate to 0."""
    power: float = 1.0
    """Of ``polynomial``, which falls to 1e-7."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.name == "prodigy" and self.learning_rate < PRODIGY_LEAST:
            raise UsageError(
                f"prodigy multiplies the rate that it finds by learning_rate, which is {self.learning_rate}; give 1"
            )
        for name, rate in self.rates.items():
            if rate < 0:
                raise UsageError(
                    f"rates.{name} is {rate}; it must be above 0, or 0 for a part that is not trained"
                )
        if self.schedule == "constant" and self.warmup_steps:
            raise UsageError('schedule "constant" has no warmup_steps; use "constant_with_warmup"')
        if self.decay_steps and not self.schedule.startswith("constant"):
            raise UsageError(f'decay_steps goes with a constant schedule; "{self.schedule}" falls by itself')
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise UsageError(f"betas has {beta}; each must be 0 to below 1")
        if not self.eps > 0:
            raise UsageError(f"eps is {self.eps}; it must be above 0")
        for name in ("weight_decay", "warmup_steps", "decay_steps", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be 0 or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The part of a run that does not depend on what is trained."""

    max_steps: int = 1000
    batch_size: int = 16
    """Images that go through the network together, all of one bucket."""
    accumulate: int = 1
    """Batches whose gradients make up a step; every image counts alike."""
    total_batch_size: int = 0
    """Images per step; when given, ``accumulate`` becomes as many batches as make them up."""
    seed: int = 0
    ema_decay: float = 0.9999
    """Decay of the averaged weights, with the original's warm-up; 0 averages nothing."""
    ema_every: int = 1
    """Steps between updates of the average; its memory stays as long as with an update at every step."""
    ema_device: Literal["same", "cpu"] = "same"
    """Where the average is kept; the CPU saves an accelerator 4 bytes per weight."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What networks compute in: with bf16 sums, norms and the loss stay in fp32, and so do weights and moments; auto
    is bf16 on CUDA devices that have it, else fp32."""
    distributed: Literal["auto", "off", "ddp", "fsdp", "hsdp"] = "auto"
    """How the processes that torchrun starts share the work: ddp: each has the whole model; fsdp: each has a part of
    every weight, moment and average; hsdp: fsdp among ``shard_size`` processes, ddp between such groups. auto is ddp,
    or nothing with one process."""
    shard_size: int = 0
    """With hsdp: processes that share a model; 0 takes those of a machine."""
    fused_backward: bool = False
    """Change each weight inside the backward pass, as soon as its gradient is there: no gradients are stored. Needs
    whole steps of one batch and max_grad_norm = 0."""
    save_every: int = 1000
    """Steps between saved states."""
    keep_states: int = 2
    """States that are kept, the newest ones; with 2 a damaged one costs ``save_every`` steps."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    log_to: tuple[str, ...] = ()
    """Where the lines also go: tensorboard and wandb, which need packages of their own."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "accumulate",
            "ema_every",
            "save_every",
            "keep_states",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise UsageError(f"seed is {self.seed}; it must be 0 to {LARGEST_SEED}")
        if self.shard_size and self.distributed != "hsdp":
            raise UsageError('shard_size goes with distributed = "hsdp"')
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; it must be below 1, or 0 for off")
        if self.total_batch_size and self.accumulate > 1:
            raise UsageError("total_batch_size says what accumulate is to be; give one of them")

        if self.fused_backward and self.batches_per_step() > 1:
            raise UsageError(
                "fused_backward changes weights after every batch, and a step is to have "
                f"{self.batches_per_step()}; give --accumulate 1"
            )

    def batches_per_step(self, processes: int = 1) -> int:
        """How many batches each of so many processes puts into a step.

        Raises:
            UsageError: no number of batches makes up ``total_batch_size``.
        """
        if not self.total_batch_size:
            return self.accumulate
        count, rest = divmod(self.total_batch_size, self.batch_size * processes)
        if rest or not count:
            raise UsageError(
                f"total_batch_size {self.total_batch_size} is no multiple of batch_size {self.batch_size}"
                + (f" times {processes} processes" if processes > 1 else "")
            )
        return count


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Small changes beside frozen weights that are trained instead of them; see docs/lora.md."""

    rank: int = 0
    """Of each change; 0 trains the weights themselves."""
    alpha: float = 0.0
    """A change counts alpha / rank, so that rates hold for any rank; 0 takes the rank."""
    conv_rank: int = 0
    conv_alpha: float = 0.0
    """Of convolutions of more than one pixel; 0 takes those of the other layers."""
    dropout: float = 0.0
    """Chance of each input of a change to be left out of a step."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (arXiv 2402.09353)."""
    targets: tuple[str, ...] = ("attention", "feedforward", "projections")
    """Layers with a change: attention, feedforward, projections, convolutions, embeddings, ends; the end of a layer's
    path, such as ``attn2.to_k``; or a pattern, such as ``unet.middle_block.*``."""
    layout: Literal["kohya", "diffusers"] = "kohya"
    """Whose names the tensors of the file have."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.conv_rank < 0:
            raise UsageError("lora.rank and lora.conv_rank must be 0 or above")
        if self.alpha < 0 or self.conv_alpha < 0:
            raise UsageError("lora.alpha and lora.conv_alpha must be above 0, or 0 for as much as the rank")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"lora.dropout is {self.dropout}; it is a chance, 0 to below 1")
        if not self.targets:
            raise UsageError("lora.targets is empty; name at least one, such as attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Textual inversion (arXiv 2208.01618): vectors of a new word that are trained instead of weights."""

    word: str = ""
    """What stands for them in captions and prompts; none trains weights."""
    vectors: int = 1
    """How many there are, and so how many tokens of a prompt the word takes."""
    initial: str = ""
    """A word, or several, whose tokens they begin as; none begins at random."""
    captions: Literal["object", "style", "own"] = "object"
    """What is said of every picture: sentences about an object or a style of that name, or the picture's caption,
    which has to have the word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetTrainConfig:
    """``sdxl train-unet``."""

    model: str = "tiny"
    """Which configuration is built when training starts from nothing."""
    starts_from: Literal["nothing", "weights"] = "nothing"
    """weights: this stage goes on from an earlier one, and must be given it."""
    objective: Literal["discrete", "edm"] = "discrete"
    """discrete: the 1000 noise levels of SDXL; edm: continuous levels and the preconditioning of arXiv 2206.00364,
    which the paper names as future work. Its network predicts v."""
    prediction: Prediction = "eps"
    """What the U-Net is to say: the noise, the velocity (arXiv 2202.00512), or the clean latent."""
    zero_terminal_snr: bool = False
    """Move the noise levels so that the last is pure noise (arXiv 2305.08891, Algorithm 1); for v and x0."""
    allow_other_prediction: bool = False
    """Teach a model that predicts one thing another."""
    noise_offset: float = 0.0
    """Offset noise: this times one normal number per sample, added to the noise of every pixel."""
    min_snr_gamma: float = 0.0
    """Caps the loss weight at this signal-to-noise ratio (arXiv 2303.09556); 0 weighs all levels alike."""
    debiased: bool = False
    """Weigh the eps loss by 1 / sqrt(SNR) (arXiv 2310.08442)."""
    level_weights: tuple[float, ...] = ()
    """Loss weights of equal parts of the 1000 levels, from the least noise on; empty weighs them alike."""
    timestep_min: int = 0
    timestep_max: int = 999
    """Noise levels are drawn from these indices, both ends included."""
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = "uniform"
    """How: logit_normal and mode are those of Stable Diffusion 3 (arXiv 2403.03206, section 3.1)."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    """Of logit_normal; a mean above 0 draws more noise."""
    mode_scale: float = 1.29
    """Of mode, -1 … 1.75; above 0 draws the middle more often."""
    edm_mean: float = -0.5
    edm_std: float = 1.2
    """Of ln sigma with objective edm. The EDM paper has -1.2 and 1.2 for data of deviation 0.5; latents have 1."""
    text_dropout: float = 0.1
    """Chance that a sample is trained without its text, for classifier-free guidance."""
    text_dropout_mode: DropoutMode = "independent"
    """independent: each encoder's features and the pooled text become zeros on their own, as in the original;
    joint: all together; empty: the caption becomes the empty text, which is what a refiner is guided away from."""
    dropout: dict[str, float] = field(default_factory=dict)
    """Chances of single conditions to become zeros, as the original's ``ucg_rate``: clip_l, big_g and pooled instead
    of ``text_dropout`` when independent; original_size, crop_top_left, target_size and aesthetic_score."""
    train_text_encoders: bool = False
    """Train the text encoders along."""
    cache_text: Literal["auto", "fill", "off"] = "auto"
    """Features of captions, while the text encoders are not trained. auto: those that cache-dataset left in the cache
    folder, when none is missing; fill: encode first what is missing; off: encode at every step."""
    caption_tokens: int = 77
    """Tokens that the text encoders read of each caption, start and end included. Short captions are mostly padding,
    which costs time and dilutes attention; what is trained with less must see the whole 77 at the end."""
    allow_missing_captions: bool = False
    """Train on pictures without a caption, as with the empty text."""
    memory: Literal["auto", "none", "ff", "blocks", "all"] = "auto"
    """What is computed again in the backward pass instead of being kept: nothing, the feed-forward networks, the
    transformer blocks, these and the residual blocks. auto: the least that fits the device's free memory."""
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16: weights are stored so, too, at half the memory; updates are computed in fp32 and rounded up or down with a
    chance in proportion to the distance, so that small ones are not lost."""
    native_size: int = 0
    """Side in pixels of the pictures trained on, which generation with the result takes for its default; 0 leaves
    what the model says."""
    sample_every: int = 500
    """Steps between sample pictures, of the prompts of ``--sample-prompts``; the last step has some in any case."""
    validate_every: int = 500
    """Steps between measurements on ``--validation``; likewise."""
    validate_levels: int = 4
    """Noise levels at which each of its pictures is measured."""
    save_model_every: int = 0
    """Steps between model files that are kept; 0 writes the last one only."""
    save_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the model file; the state keeps fp32."""
    frozen_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """What weights that are not trained are kept in; auto: what is computed in."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.weight_dtype == "bf16" and self.builds_on:
            raise UsageError(
                'weight_dtype = "bf16" is of weights that are trained; those of a LoRA or an embedding are few and '
                'stay fp32, and frozen_dtype = "bf16" holds the model beside them'
            )
        if self.weight_dtype == "bf16" and self.loop.dtype == "fp32":
            raise UsageError('weight_dtype = "bf16" computes in bf16, too; give --dtype bf16 or leave it out')
        if not 0 <= self.timestep_min <= self.timestep_max <= 999:
            raise UsageError(f"timesteps {self.timestep_min} … {self.timestep_max} are not within 0 … 999")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise UsageError(
                'zero_terminal_snr needs prediction = "v" or "x0": the noise of pure noise teaches nothing'
            )
        if not 3 <= self.caption_tokens <= 77:
            raise UsageError(f"caption_tokens is {self.caption_tokens}; CLIP reads from 3 to 77 tokens")
        if self.min_snr_gamma < 0:
            raise UsageError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive, or 0 for off")
        if self.debiased and (self.prediction != "eps" or self.min_snr_gamma):
            raise UsageError(
                'debiased weighs the loss of prediction = "eps" on its own, without min_snr_gamma'
            )
        if any(weight < 0 for weight in self.level_weights) or (
            self.level_weights and not any(self.level_weights)
        ):
            raise UsageError("level_weights must be 0 or above, and not all 0")
        for name in ("sample_every", "validate_every", "validate_levels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (self.logit_std > 0 and self.edm_std > 0):
            raise UsageError("logit_std and edm_std must be above 0")
        if self.embedding.word and (self.lora.rank or self.train_text_encoders):
            raise UsageError("embedding.word trains vectors alone, without lora.rank and train_text_encoders")
        if self.builds_on and self.loop.optimizer.name == "adafactor":
            raise UsageError(
                "adafactor multiplies its rate by each weight's size, and a LoRA begins at 0 and a word near it: they "
                "would hardly learn; give --optimizer adamw, adamw8bit or prodigy"
            )
        if self.embedding.word and self.text_dropout and self.text_dropout_mode == "empty":
            raise UsageError(
                'text_dropout_mode = "empty" takes the word out of captions, which is all that is trained; '
                "give --set text_dropout=0"
            )
        self._check_edm()
        self._check_dropout()

    @property
    def builds_on(self) -> bool:
        """Whether what is trained is for a model that stays as it is."""
        return bool(self.lora.rank or self.embedding.word)

    def _check_edm(self) -> None:
        if self.objective != "edm":
            return
        if self.prediction != "v" or self.zero_terminal_snr:
            raise UsageError('objective = "edm" needs prediction = "v", and zero_terminal_snr = false')
        if (self.timestep_min, self.timestep_max, self.timestep_sampling) != (0, 999, "uniform"):
            raise UsageError('objective = "edm" draws sigma by edm_mean and edm_std; leave timestep_… out')

    def _check_dropout(self) -> None:
        for name, chance in {"text_dropout": self.text_dropout, **self.dropout}.items():
            if not 0 <= chance <= 1:
                raise UsageError(f"{name} is {chance}; it is a chance, 0 … 1")
        for name in self.dropout:
            if name not in (*TEXT_OUTPUTS, *SCALARS):
                raise unknown("condition in dropout", name, (*TEXT_OUTPUTS, *SCALARS))
            if name in TEXT_OUTPUTS and self.text_dropout_mode != "independent":
                raise UsageError(f'dropout.{name} needs text_dropout_mode = "independent"')

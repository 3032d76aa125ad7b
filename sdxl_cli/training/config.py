"""What a training run is told, as frozen dataclasses that presets and ``--set`` fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdxl_cli.errors import UsageError

DropoutMode = Literal["joint", "independent", "empty"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    warmup_steps: int = 0
    """Linear warm-up from 0."""
    decay_steps: int = 0
    """The last steps of the run, over which the rate falls linearly to 0; 0 keeps it constant."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """The part of a run that does not depend on what is trained."""

    max_steps: int = 1000
    batch_size: int = 16
    """Images per step, all of one bucket."""
    seed: int = 0
    ema_decay: float = 0.9999
    """Decay of the averaged weights, with the original's warm-up; 0 averages nothing."""
    save_every: int = 1000
    """Steps between saved states."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; it must be below 1, or 0 for off")


@dataclass(frozen=True, kw_only=True, slots=True)
class VAELossConfig:
    """Weights of the autoencoder's loss terms, all means over the batch."""

    l1: float = 1.0
    l2: float = 1.0
    lowpass: float = 0.0
    """L1 between averages over blocks of 8 and 32 pixels: keeps the hue of flat areas."""
    kl: float = 1e-6
    """Times the KL divergence in nats per latent value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VAETrainConfig:
    """``sdxl train-vae``."""

    model: str = "tiny"
    """Which configuration's autoencoder is built when training starts from nothing."""
    levels: int = 0
    """Build only the first levels of that configuration, to grow the rest later; 0 builds all."""
    normalize_latents: bool = True
    """At the end, give every latent channel mean 0 and, times the scale factor, deviation 1. An autoencoder whose
    training goes on from a file keeps its latents: there may be U-Nets that know them."""
    crop_sizes: tuple[int, ...] = (256,)
    """Each step trains on random crops of one of these sides, in pixels, drawn in proportion to
    ``crop_weights``."""
    crop_weights: tuple[float, ...] = (1.0,)
    pixels_per_step: int = 0
    """With several crop sizes: as many crops as make up this many pixels, at least one; 0 takes
    ``loop.batch_size`` crops whatever their size."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if len(self.crop_sizes) != len(self.crop_weights) or not self.crop_sizes:
            raise UsageError("crop_sizes and crop_weights must be lists of the same length, at least 1")
        if odd := [side for side in self.crop_sizes if side < 8 or side % 8]:
            raise UsageError(f"crop_sizes has {odd[0]}; sides must be multiples of 8")


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetTrainConfig:
    """``sdxl train-unet``."""

    model: str = "tiny"
    """Which configuration is built when training starts from nothing."""
    prediction: Literal["eps", "v", "x0"] = "eps"
    """What the U-Net is to say: the noise, the velocity (arXiv 2202.00512), or the clean latent."""
    zero_terminal_snr: bool = False
    """Move the noise levels so that the last is pure noise (arXiv 2305.08891, Algorithm 1); for v and x0."""
    noise_offset: float = 0.0
    """Offset noise: this times one normal number per sample, added to the noise of every pixel."""
    min_snr_gamma: float = 0.0
    """Caps the loss weight at this signal-to-noise ratio (arXiv 2303.09556); 0 weighs all levels alike."""
    timestep_min: int = 0
    timestep_max: int = 999
    """Noise levels are drawn uniformly from these indices, both ends included."""
    text_dropout: float = 0.1
    """Chance that a sample is trained without its text, for classifier-free guidance."""
    text_dropout_mode: DropoutMode = "independent"
    """independent: each encoder's features and the pooled text become zeros on their own, as in the original;
    joint: all together; empty: the caption becomes the empty text, which is what a refiner is guided away from."""
    train_text_encoders: bool = False
    """Train the text encoders along; for models built from nothing."""
    caption_tokens: int = 77
    """Tokens that the text encoders read of each caption, start and end included. Short captions are mostly padding,
    which costs time and dilutes attention; what is trained with less must see the whole 77 at the end."""
    native_size: int = 0
    """Side in pixels of the pictures trained on, which generation with the result takes for its default; 0 leaves
    what the model says."""
    save_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the model file; the state keeps fp32."""
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_min <= self.timestep_max <= 999:
            raise UsageError(f"timesteps {self.timestep_min} … {self.timestep_max} are not within 0 … 999")
        if self.zero_terminal_snr and self.prediction == "eps":
            raise UsageError(
                'zero_terminal_snr needs prediction = "v" or "x0": the noise of pure noise teaches nothing'
            )
        if not 0 <= self.text_dropout <= 1:
            raise UsageError(f"text_dropout is {self.text_dropout}; it is a chance, 0 … 1")
        if not 3 <= self.caption_tokens <= 77:
            raise UsageError(f"caption_tokens is {self.caption_tokens}; CLIP reads from 3 to 77 tokens")
        if self.min_snr_gamma < 0:
            raise UsageError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive, or 0 for off")

"""What ``sdxl train-vae`` is told, as frozen dataclasses that presets and ``--set`` fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class VAELossConfig:
    """Weights of the autoencoder's loss terms, all means over the batch."""

    l1: float = 1.0
    l2: float = 1.0
    lowpass: float = 0.0
    """L1 between averages over blocks of 8 and 32 pixels: keeps the hue of flat areas."""
    perceptual: Literal["none", "vgg"] = "none"
    """vgg: LPIPS on VGG16 (arXiv 1801.03924), whose weights must be on this machine."""
    perceptual_weight: float = 1.0
    learn_logvar: bool = False
    """Learn the scale of the reconstruction error, exp(logvar): the error is divided by it, and it costs logvar."""
    logvar: float = 0.0
    """Where that begins."""
    kl: float = 1e-6
    """Times the KL divergence in nats per latent value."""
    reduction: Literal["mean", "sum"] = "mean"
    """mean: everything per value; sum: the original's, errors are summed over the values of a picture and the
    divergence over those of its latent."""

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "lowpass", "perceptual_weight", "kl"):
            if getattr(self, name) < 0:
                raise UsageError(f"loss.{name} is {getattr(self, name)}; it must be 0 or above")
        if not (self.l1 or self.l2):
            raise UsageError("loss.l1 and loss.l2 are both 0; nothing would hold the colours")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The discriminator that an autoencoder is trained against (PatchGAN, as in VQGAN and latent diffusion)."""

    weight: float = 0.0
    """Of the adversarial loss, on top of the adaptive weight; 0 trains without a discriminator."""
    factor: float = 1.0
    """Times both networks' adversarial losses."""
    start: int = 0
    """The first step, counted from 0, in which the discriminator learns and the autoencoder hears of it."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """The discriminator's."""
    layers: int = 3
    """How often it halves a picture's sides: 3 judges patches of 70x70 pixels."""
    channels: int = 64
    """Of its first layer."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Its own."""

    def __post_init__(self) -> None:
        for name in ("weight", "factor", "start"):
            if getattr(self, name) < 0:
                raise UsageError(f"adversarial.{name} is {getattr(self, name)}; it must be 0 or above")
        for name in ("layers", "channels"):
            if getattr(self, name) < 1:
                raise UsageError(f"adversarial.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class VAETrainConfig:
    """``sdxl train-vae``."""

    model: str = "tiny"
    """Which configuration's autoencoder is built when training starts from nothing."""
    starts_from: Literal["nothing", "weights"] = "nothing"
    """weights: an autoencoder must be given to go on from, and its sizes are the model's."""
    levels: int = 0
    """Build only the first levels of that configuration, to grow the rest later; 0 builds all."""
    decoder_only: bool = False
    """Leave the encoder as it is: every U-Net that knows its latents goes on understanding them."""
    normalize_latents: bool = True
    """At the end, give every latent channel mean 0 and, times the scale factor, deviation 1; else the scale factor is
    measured, as in the original. An autoencoder whose training goes on from a file keeps its latents and its factor:
    there may be U-Nets that know them."""
    crop_sizes: tuple[int, ...] = (256,)
    """Each step trains on random crops of one of these sides, in pixels, drawn in proportion to
    ``crop_weights``."""
    crop_weights: tuple[float, ...] = (1.0,)
    pixels_per_step: int = 0
    """With several crop sizes: as many crops as make up this many pixels, at least one; 0 takes
    ``loop.batch_size`` crops whatever their size."""
    sample_images: int = 8
    """Pictures whose reconstructions are drawn during training; 0 draws none."""
    sample_every: int = 1000
    """Steps between those drawings; the last step has one in any case."""
    validate_every: int = 1000
    """Steps between measurements on ``--validation``; likewise."""
    save_model_every: int = 0
    """Steps between autoencoder files that are kept; 0 writes the last one only."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if len(self.crop_sizes) != len(self.crop_weights) or not self.crop_sizes:
            raise UsageError("crop_sizes and crop_weights must be lists of the same length, at least 1")
        if odd := [side for side in self.crop_sizes if side < 8 or side % 8]:
            raise UsageError(f"crop_sizes has {odd[0]}; sides must be multiples of 8")
        for name in ("sample_every", "validate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        least = {
            "perceptual loss": 16 if self.loss.perceptual != "none" else 0,
            "discriminator": 3 * 2**self.adversarial.layers if self.adversarial.weight else 0,
        }
        for what, side in least.items():
            if min(self.crop_sizes) < side:
                raise UsageError(
                    f"crop_sizes has {min(self.crop_sizes)}; the {what} needs {side} pixels on a side"
                )

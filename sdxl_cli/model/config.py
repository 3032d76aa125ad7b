"""The sizes of every network, as values. ``BASE`` and ``REFINER`` are the released models."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sdxl_cli.errors import FileError

Activation = Literal["quick_gelu", "gelu"]
Scalar = Literal["original_size", "crop_top_left", "target_size", "aesthetic_score"]

Part = Literal["unet", "vae", "text"]
ALL_PARTS: tuple[Part, ...] = ("unet", "vae", "text")

PREFIXES: dict[Part, str] = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "conditioner.",
}
"""Where each part's parameters are in the single file."""

SCALAR_COUNT: dict[Scalar, int] = {
    "original_size": 2,
    "crop_top_left": 2,
    "target_size": 2,
    "aesthetic_score": 1,
}
"""How many numbers each micro-condition has: sizes are (height, width), crops (top, left)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UNetConfig:
    """The denoising U-Net (paper section 2.1, Table 1)."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    """Width of the first level, in channels."""
    channel_mult: tuple[int, ...] = (1, 2, 4)
    """Width of each level, in multiples of ``model_channels``."""
    num_res_blocks: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    """Transformer blocks after each residual block of a level; 0 is no attention."""
    transformer_depth_middle: int = 10
    num_head_channels: int = 64
    context_dim: int = 2048
    """Width of the text features that cross-attention reads."""
    adm_in_channels: int = 2816
    """Width of the pooled text and micro-conditioning vector added to the time embedding."""
    norm_groups: int = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class VAEConfig:
    """The KL-f8 autoencoder (section 2.4). Downsampling factor is ``2 ** (len(channel_mult) - 1)``."""

    in_channels: int = 3
    z_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    norm_groups: int = 32
    scale_factor: float = 0.13025
    """Latents are the posterior sample times this, so that their variance is about 1."""

    @property
    def downsampling(self) -> int:
        """Pixels per latent, per side."""
        return int(2 ** (len(self.channel_mult) - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTowerConfig:
    """One CLIP text encoder."""

    width: int
    layers: int
    heads: int
    activation: Activation
    embed_dim: int
    """Width of the projected pooled feature; CLIP-L's is not used by SDXL."""
    vocab_size: int = 49408
    context_length: int = 77


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A whole model: which networks it has and which conditions it takes, in order."""

    unet: UNetConfig
    vae: VAEConfig = field(default_factory=VAEConfig)
    clip_l: TextTowerConfig | None
    """CLIP ViT-L text tower; the refiner has none."""
    big_g: TextTowerConfig
    """OpenCLIP ViT-bigG text tower (through open_clip)."""
    scalars: tuple[Scalar, ...]
    """Micro-conditions, in the order of the conditioning vector."""
    scalar_dim: int = 256
    """Sinusoidal features per number of a micro-condition."""
    native_size: int = 1024
    """Side, in pixels, of the square image whose area the model was trained on."""

    def __post_init__(self) -> None:
        context = self.big_g.width + (self.clip_l.width if self.clip_l else 0)
        vector = self.big_g.embed_dim + self.scalar_dim * sum(SCALAR_COUNT[s] for s in self.scalars)
        if context != self.unet.context_dim:
            raise FileError(
                f"model config: text features are {context} wide, context_dim is {self.unet.context_dim}"
            )
        if vector != self.unet.adm_in_channels:
            raise FileError(
                f"model config: the conditioning vector is {vector} wide, "
                f"adm_in_channels is {self.unet.adm_in_channels}"
            )

    @property
    def is_refiner(self) -> bool:
        """Whether this model takes an aesthetic score, as the released refiner does."""
        return "aesthetic_score" in self.scalars

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON in a checkpoint's metadata (``sdxl.config``)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; lists become tuples.

        Raises:
            FileError: a key is unknown or missing.
        """
        try:
            towers = {
                name: TextTowerConfig(**values[name]) if values[name] else None
                for name in ("clip_l", "big_g")
            }
            rest = {
                key: value for key, value in values.items() if key not in ("unet", "vae", "clip_l", "big_g")
            }
            return cls(
                unet=UNetConfig(**_tuples(values["unet"])),
                vae=VAEConfig(**_tuples(values["vae"])),
                **towers,  # type: ignore[arg-type]
                **_tuples(rest),
            )
        except (KeyError, TypeError) as error:
            raise FileError(f"model config: {error}") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


CLIP_L = TextTowerConfig(width=768, layers=12, heads=12, activation="quick_gelu", embed_dim=768)
BIG_G = TextTowerConfig(width=1280, layers=32, heads=20, activation="gelu", embed_dim=1280)

BASE = ModelConfig(
    unet=UNetConfig(),
    clip_l=CLIP_L,
    big_g=BIG_G,
    scalars=("original_size", "crop_top_left", "target_size"),
)
"""sd_xl_base_1.0 (sgm configs/inference/sd_xl_base.yaml)."""

REFINER = ModelConfig(
    unet=UNetConfig(
        model_channels=384,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 4, 4, 0),
        transformer_depth_middle=4,
        context_dim=1280,
        adm_in_channels=2560,
    ),
    clip_l=None,
    big_g=BIG_G,
    scalars=("original_size", "crop_top_left", "aesthetic_score"),
)
"""sd_xl_refiner_1.0 (sgm configs/inference/sd_xl_refiner.yaml)."""

_TINY_VAE = VAEConfig(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=1)
_TINY_BIG_G = TextTowerConfig(width=96, layers=3, heads=6, activation="gelu", embed_dim=96)

TINY = ModelConfig(
    unet=UNetConfig(
        model_channels=48,
        channel_mult=(1, 2, 3),
        num_res_blocks=1,
        # SDXL has none at the top; here the top is 8 latents wide in the first stage, and words hardly got in below
        transformer_depth=(1, 1, 1),
        transformer_depth_middle=1,
        num_head_channels=16,
        context_dim=160,
        adm_in_channels=96 + 6 * 256,
        norm_groups=8,
    ),
    vae=_TINY_VAE,
    clip_l=TextTowerConfig(width=64, layers=3, heads=4, activation="quick_gelu", embed_dim=64),
    big_g=_TINY_BIG_G,
    scalars=("original_size", "crop_top_left", "target_size"),
    native_size=256,
)
"""The bundled model: SDXL's structure at a size that answers in seconds on a laptop."""

TINY_REFINER = ModelConfig(
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        transformer_depth=(0, 1, 1),
        transformer_depth_middle=1,
        num_head_channels=32,
        context_dim=96,
        adm_in_channels=96 + 5 * 256,
        norm_groups=8,
    ),
    vae=_TINY_VAE,
    clip_l=None,
    big_g=_TINY_BIG_G,
    scalars=("original_size", "crop_top_left", "aesthetic_score"),
    native_size=256,
)
"""The bundled refiner."""

CONFIGS: dict[str, ModelConfig] = {
    "base": BASE,
    "refiner": REFINER,
    "tiny": TINY,
    "tiny-refiner": TINY_REFINER,
}

"""A whole model under one roof, with the parameter names of the released single file."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from sdxl_cli.model.conditioning import Conditioner
from sdxl_cli.model.config import ALL_PARTS, ModelConfig, Part
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder


class SDXL(nn.Module):
    """U-Net, autoencoder and text encoders; parts left out cost nothing."""

    def __init__(self, config: ModelConfig, parts: Collection[Part] = ALL_PARTS) -> None:
        super().__init__()
        self.config = config
        self.known_token_ids: frozenset[int] | None = None
        """Token ids the text encoders have embeddings for; None: all of them."""
        self.model = nn.Module()
        if "unet" in parts:
            self.model.diffusion_model = UNet(config.unet)
        if "vae" in parts:
            self.first_stage_model = Autoencoder(config.vae)
        if "text" in parts:
            self.conditioner = Conditioner(config)

    @property
    def unet(self) -> UNet:
        """The denoising network."""
        return self.model.diffusion_model  # type: ignore[return-value]

    @property
    def vae(self) -> Autoencoder:
        """The autoencoder."""
        return self.first_stage_model

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts this object has."""
        names = {name for name, _ in self.named_children()} | {n for n, _ in self.model.named_children()}
        homes = {"unet": "diffusion_model", "vae": "first_stage_model", "text": "conditioner"}
        return tuple(part for part in ALL_PARTS if homes[part] in names)

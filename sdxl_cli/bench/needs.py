"""What a row will take of memory, from shapes alone."""

from __future__ import annotations

import torch

from sdxl_cli.bench.cases import CASES
from sdxl_cli.bench.setting import CaseName, Setting
from sdxl_cli.bench.weights import weight_bytes
from sdxl_cli.generation.memory import decoding_bytes
from sdxl_cli.model.config import Part
from sdxl_cli.model.live_bytes import LiveBytes
from sdxl_cli.model.sdxl import SDXL

_UNET: tuple[Part, ...] = ("unet",)
STATES = 4
"""What training in fp32 keeps of each weight: itself, its gradient, two moments of AdamW."""


def needed_bytes(name: CaseName, setting: Setting) -> int:
    """Weights that are loaded for it, and the most of anything else at once.

    Counted on the meta device, in the precision of the run; what kernels use inside themselves is not in it.
    """
    weights, config = setting.weights, setting.files.config
    if name == "train":
        held = weight_bytes(config, torch.float32, torch.float32)["unet"]
        return STATES * held + _unet_bytes(setting, trains=True)
    sizes = weight_bytes(config, weights.dtype, weights.vae_dtype)
    held = sum(sizes.values()) if weights.stays else max(sizes[part] for part in CASES[name].parts)
    on_cpu = weights.device.type == "cpu"
    work = {
        "text": 0,
        "unet": _unet_bytes(setting) if "unet" in CASES[name].parts else 0,
        "vae": decoding_bytes(config, setting.size, weights.vae_dtype, strips=on_cpu),
    }
    return held + max(work[part] for part in CASES[name].parts)


def _unet_bytes(setting: Setting, *, trains: bool = False) -> int:
    """The most that an evaluation has at once; of training, what the backward pass will need."""
    config, dtype = setting.files.config, setting.weights.dtype
    batch, _, height, width = setting.latent_shape
    rows = batch if trains else 2 * batch
    with torch.inference_mode(False), torch.set_grad_enabled(trains), torch.device("meta"):
        unet = SDXL(config, _UNET).unet.to(dtype).requires_grad_(trains)
        x = torch.empty(rows, config.unet.in_channels, height, width, dtype=dtype)
        context = torch.empty(rows, 77, config.unet.context_dim, dtype=dtype)
        vector = torch.empty(rows, config.unet.adm_in_channels, dtype=dtype)
        with LiveBytes() as seen:
            unet(x, torch.empty(rows, dtype=torch.long), context, vector)
    return seen.peak

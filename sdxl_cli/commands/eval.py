"""``sdxl eval``: numbers about autoencoders, models and sets of pictures."""

from __future__ import annotations

from sdxl_cli.commands import _eval_generation, _eval_images, _eval_reconstruction, _eval_statistics

PANEL = "Inspect"

SUBCOMMANDS = {
    "reconstruction": _eval_reconstruction.command,
    "generation": _eval_generation.command,
    "images": _eval_images.command,
    "statistics": _eval_statistics.command,
}


def command() -> None:
    """Measure quality as the paper does: PSNR, SSIM, LPIPS, FID, KID, IS, CLIP score."""

"""SDXL: generate, refine, train and inspect Stable Diffusion XL (arXiv 2307.01952)."""

__version__ = "0.1.0"

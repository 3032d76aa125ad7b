"""A diffusers folder of random weights, which both sides read, so that they do the same work from the same pages.

python benchmarks/random_folder.py FOLDER --model base --dtype fp32

The released size takes 13.9 GB in fp32 (U-Net 10.3, text encoders 3.3, autoencoder 0.3); tensors are made and written
one by one. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sdxl_cli.bench.weights import random_tensor
from sdxl_cli.checkpoint import diffusers_config as texts
from sdxl_cli.checkpoint.identify import CLIP_L, UNET, VAE, big_g_prefix
from sdxl_cli.checkpoint.layouts import (
    Plan,
    big_g_to_diffusers,
    clip_l_to_diffusers,
    unet_to_diffusers,
    vae_to_diffusers,
)
from sdxl_cli.checkpoint.stream import Pending, write_pending
from sdxl_cli.generation.device import DTYPES
from sdxl_cli.generation.prompt import CONTEXT_LENGTH, Tokenizer
from sdxl_cli.model.config import CONFIGS, ModelConfig
from sdxl_cli.model.sdxl import SDXL

PARTS = {"unet": ("unet",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
"""Parts of a model, and the folders they are in."""


def write_folder(folder: Path, config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> None:
    """All that a pipeline has. Numbers are drawn on ``device``: other devices draw others."""
    _write_texts(folder, config)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in SDXL(config).state_dict().items()}
    for network in _networks(config):
        home = folder / network.name
        home.mkdir(parents=True, exist_ok=True)
        (home / "config.json").write_text(texts.to_text(network.settings), "utf-8")
        path = home / f"{network.stem}.safetensors"
        if path.exists():
            continue
        print(f"writing {path}", file=sys.stderr, flush=True)
        inside = {
            name.removeprefix(network.prefix): shape
            for name, shape in shapes.items()
            if name.startswith(network.prefix)
        }
        plan = network.plan(list(inside))
        pending = {
            name: _pending(f"{network.name}.{name}", source.shape(inside), dtype, device)
            for name, source in plan.items()
        }
        write_pending(path, pending, {"format": "pt"})


def _pending(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Pending:
    return Pending(dtype, shape, lambda: random_tensor(name, shape, dtype, torch.device(device)).cpu())


@dataclass(frozen=True, slots=True)
class _Network:
    name: str
    """Of its folder."""
    stem: str
    settings: texts.Json
    prefix: str
    """Of its tensors in a single file."""
    plan: Callable[[list[str]], Plan]


def _networks(config: ModelConfig) -> list[_Network]:
    assert config.clip_l is not None
    weights = "diffusion_pytorch_model"
    return [
        _Network(
            "unet", weights, texts.unet_json(config), UNET, partial(unet_to_diffusers, config=config.unet)
        ),
        _Network(
            "vae",
            weights,
            texts.vae_json(config.vae, config.native_size),
            VAE,
            partial(vae_to_diffusers, config=config.vae),
        ),
        _Network(
            "text_encoder",
            "model",
            texts.tower_json(config.clip_l, "CLIPTextModel"),
            CLIP_L,
            clip_l_to_diffusers,
        ),
        _Network(
            "text_encoder_2",
            "model",
            texts.tower_json(config.big_g, "CLIPTextModelWithProjection"),
            big_g_prefix(config),
            big_g_to_diffusers,
        ),
    ]


def _write_texts(folder: Path, config: ModelConfig) -> None:
    tokenizer = Tokenizer.default()
    written = {
        "model_index.json": texts.to_text(texts.index_json("base", True)),
        "scheduler/scheduler_config.json": texts.to_text(texts.scheduler_json("eps", False)),
    }
    for name, pad in texts.PADDING.items():
        files = texts.tokenizer_files(tokenizer.vocabulary, tokenizer.merges, pad, CONTEXT_LENGTH)
        written |= {f"{name}/{file}": text for file, text in files.items()}
    for name, text in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("base", "tiny"), default="base")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    args = parser.parse_args()
    write_folder(args.folder, CONFIGS[args.model], DTYPES[args.dtype])


if __name__ == "__main__":
    main()

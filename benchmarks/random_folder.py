"""A diffusers folder of random weights, which both sides read, so that they do the same work from the same pages.

python benchmarks/random_folder.py FOLDER --model base --dtype fp32

The released size takes 13.9 GB in fp32 (U-Net 10.3, text encoders 3.3, autoencoder 0.3); tensors are made and written
one by one. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdxl_cli.bench.weights import random_tensor
from sdxl_cli.checkpoint import diffusers_config as texts
from sdxl_cli.checkpoint.stream import Pending, write_pending
from sdxl_cli.generation.device import DTYPES
from sdxl_cli.generation.prompt import CONTEXT_LENGTH, Tokenizer
from sdxl_cli.model.config import CONFIGS, ModelConfig

PARTS = {"unet": ("unet",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
"""Parts of a model, and the folders they are in."""


def write_folder(folder: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """All that a pipeline has."""
    _write_texts(folder, config)
    for names in PARTS.values():
        for name in names:
            settings, stem, network = _network(name, config)
            home = folder / name
            home.mkdir(parents=True, exist_ok=True)
            (home / "config.json").write_text(texts.to_text(settings), "utf-8")
            path = home / f"{stem}.safetensors"
            if path.exists():
                continue
            print(f"writing {path}", file=sys.stderr, flush=True)
            pending = {
                key: _pending(name, key, tensor, dtype) for key, tensor in network.state_dict().items()
            }
            write_pending(path, pending, {"format": "pt"})


def _pending(part: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> Pending:
    shape = tuple(tensor.shape)
    if not tensor.is_floating_point():
        return Pending(tensor.dtype, shape, partial(torch.zeros, shape, dtype=tensor.dtype))
    return Pending(dtype, shape, partial(random_tensor, f"{part}.{name}", shape, dtype, torch.device("cpu")))


def _network(name: str, config: ModelConfig) -> tuple[dict[str, Any], str, torch.nn.Module]:
    """Its settings, how its file is called, and the network without numbers."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if name == "unet":
            settings = texts.unet_json(config)
            return settings, "diffusion_pytorch_model", UNet2DConditionModel.from_config(settings)
        if name == "vae":
            settings = texts.vae_json(config.vae, config.native_size)
            return settings, "diffusion_pytorch_model", AutoencoderKL.from_config(settings)
        tower = config.clip_l if name == "text_encoder" else config.big_g
        assert tower is not None
        kind = CLIPTextModel if name == "text_encoder" else CLIPTextModelWithProjection
        settings = texts.tower_json(tower, kind.__name__)
        return settings, "model", kind(CLIPTextConfig.from_dict(settings))


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

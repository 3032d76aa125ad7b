"""Small and random networks in the files that the published ones come in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.metrics.inception import Inception


def random_inception(seed: int = 0) -> Inception:
    """The architecture with random weights whose activations neither die nor explode."""
    torch.manual_seed(seed)
    model = Inception()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.1, 0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model


def write_clip(path: Path) -> Path:
    """A small CLIP as transformers saves it."""
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=16,
        text_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407,
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "image_size": 32, "patch_size": 8,
        },
    )  # fmt: skip
    model = CLIPModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    ours = Tokenizer.default()
    (path / "vocab.json").write_text(json.dumps(ours.vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in ours.merges)])
    (path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    CLIPTokenizer.from_pretrained(path, pad_token="<|endoftext|>", model_max_length=77).save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        path
    )
    return path

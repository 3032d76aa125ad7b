"""Optimizers by name. A new one is one function and its entry in the table."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import OptimizerConfig

NO_DECAY_DIMS = 1
"""Biases and norms, which have one dimension, are not decayed."""

Groups = list[dict[str, Any]]
Build = Callable[[Groups, OptimizerConfig], torch.optim.Optimizer]


RATE_SCALE = "rate_scale"
"""Entry of every group: its rate, in units of the run's."""


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, for these parameters by name.

    Raises:
        UsageError: it needs a package that is not installed, a device that is not there, or one rate for all.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = config.weight_decay if parameter.ndim > NO_DECAY_DIMS else 0.0
        rate = next((own for start, own in config.rates.items() if name.startswith(start)), None)
        scale = 1.0 if rate is None else rate / config.learning_rate
        found.setdefault((decay, scale), []).append(parameter)
    groups: Groups = [
        {"params": found[key], "weight_decay": key[0], RATE_SCALE: key[1]}
        for key in sorted(found, reverse=True)
    ]
    return BUILDERS[config.name](groups, config)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the run's rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_SCALE, 1.0)


def _adamw(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    # the meta device, where steps are counted, has no fused one; foreach would hold copies of everything at once
    fused = not any(p.is_meta for group in groups for p in group["params"])
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=fused, foreach=False
    )


class CountedAdamW8bit(torch.optim.Optimizer):
    """Stands for it on the meta device, where it cannot run: it keeps as much, and changes nothing.

    Both moments have a byte per value, and an fp32 scale for every 256.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make room for the moments of what has a gradient."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            size = 2 * (p.numel() + 4 * math.ceil(p.numel() / 256))
            self.state[p].setdefault("moments", torch.empty(size, dtype=torch.uint8, device=p.device))


def _adamw8bit(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    if any(p.is_meta for group in groups for p in group["params"]):
        return CountedAdamW8bit(groups, {})
    if any(p.device.type != "cuda" for group in groups for p in group["params"]):
        raise UsageError("optimizer adamw8bit runs on CUDA devices only; use adamw, or give --device cuda")
    package = _package("bitsandbytes", "adamw8bit")
    return package.optim.AdamW8bit(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)


def _adafactor(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=config.learning_rate)


def _prodigy(groups: Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    if len({group[RATE_SCALE] for group in groups}) > 1:
        raise UsageError("prodigy finds one rate for all weights; leave the rates of single ones out")
    package = _package("prodigyopt", "prodigy")
    # bias correction and a guarded warm-up: the settings its authors give for diffusion models
    with contextlib.redirect_stdout(io.StringIO()):  # it says on stdout that it decays weights
        return package.Prodigy(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            use_bias_correction=True,
            safeguard_warmup=True,
        )


def _package(name: str, extra: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(
            f"optimizer {extra} needs {name}, which is not installed: pip install 'sdxl-cli[{extra}]'"
        ) from error


BUILDERS: dict[str, Build] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
}

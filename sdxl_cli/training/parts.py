"""The parts of a model by the names that people use: which are trained, and how fast."""

from __future__ import annotations

from dataclasses import replace

from sdxl_cli.errors import UsageError, unknown
from sdxl_cli.model.config import PREFIXES, ModelConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import LoopConfig, OptimizerConfig, UNetTrainConfig


def part_prefixes(model: ModelConfig) -> dict[str, str]:
    """``unet``, ``clip_l`` (of a base) and ``big_g`` -> how names of their parameters begin."""
    towers = ["clip_l", "big_g"] if model.clip_l else ["big_g"]
    text = {name: f"{PREFIXES['text']}embedders.{index}." for index, name in enumerate(towers)}
    return {"unet": PREFIXES["unet"], **text}


def with_part_rates(loop: LoopConfig, model: ModelConfig) -> LoopConfig:
    """The same, with the rates of parts under the beginnings of their parameters' names.

    Raises:
        UsageError: the model has no part of a name.
    """
    prefixes = part_prefixes(model)
    for name in loop.optimizer.rates:
        if name not in prefixes:
            raise unknown("part in loop.optimizer.rates", name, prefixes)
    rates = {prefixes[name]: rate for name, rate in loop.optimizer.rates.items()}
    return replace(loop, optimizer=replace(loop.optimizer, rates=rates))


def trained_parts(config: UNetTrainConfig, model: ModelConfig) -> list[str]:
    """Names of the parts that a configuration trains; none where it trains a word.

    Raises:
        UsageError: none is left, or they have rates that the optimizer cannot give them.
    """
    if config.embedding.word:
        return []
    rates = config.loop.optimizer.rates
    wanted = [name for name in part_prefixes(model) if name == "unet" or config.train_text_encoders]
    left = [name for name in wanted if rates.get(name) != 0]
    if not left:
        raise UsageError("loop.optimizer.rates is 0 for every part; there is nothing to train")
    _require_one_rate(config.loop.optimizer, left)
    return left


def _require_one_rate(optimizer: OptimizerConfig, parts: list[str]) -> None:
    """Refuse rates of single parts where the optimizer finds one for all."""
    rates = {name: optimizer.rates.get(name, optimizer.learning_rate) for name in parts}
    if optimizer.name != "prodigy" or len(set(rates.values())) == 1:
        return
    others = [name for name, rate in rates.items() if rate != optimizer.learning_rate]
    sets = " ".join(f"--set loop.optimizer.rates.{name}={optimizer.learning_rate:g}" for name in others)
    raise UsageError(
        f"prodigy finds one rate for all parts, and rates has others for {' and '.join(others)}; give {sets}"
    )


def choose_trained(model: SDXL, parts: list[str]) -> None:
    """Let these parts have gradients, and no others."""
    prefixes = part_prefixes(model.config)
    chosen = tuple(prefixes[name] for name in parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(chosen))

"""Learning-rate schedules: the six that trainers have by these names, as factors of the highest rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from sdxl_cli.training.config import OptimizerConfig

POLYNOMIAL_END = 1e-7
"""Where ``polynomial`` ends (transformers' default)."""

Curve = Callable[[OptimizerConfig, float], float]
"""A configuration and how much of the run after the warm-up is over, 0 … 1 -> factor of the highest rate."""


def _constant(config: OptimizerConfig, done: float) -> float:
    return 1.0


def _linear(config: OptimizerConfig, done: float) -> float:
    return 1.0 - done


def _cosine(config: OptimizerConfig, done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _cosine_with_restarts(config: OptimizerConfig, done: float) -> float:
    if done >= 1.0:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * ((config.cycles * done) % 1.0)))


def _polynomial(config: OptimizerConfig, done: float) -> float:
    end = POLYNOMIAL_END / config.learning_rate
    return (1.0 - end) * (1.0 - done) ** config.power + end


CURVES: dict[str, Curve] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
}


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """The rate of step 0 … max_steps - 1.

    The curves are those of transformers' ``get_scheduler``, but the warm-up is one step ahead of it: a first step
    at rate 0 would do nothing.
    """
    rate = config.learning_rate
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    else:
        done = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        rate *= CURVES[config.schedule](config, done)
    if config.decay_steps and step >= max_steps - config.decay_steps:
        rate *= (max_steps - step) / config.decay_steps
    return rate

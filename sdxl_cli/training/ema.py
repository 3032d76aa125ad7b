"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """shadow -= (1 - d) (shadow - p) with d = min(decay, (1 + n) / (10 + n)), n from 1 (facts: sgm ema.py)."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the shadow towards the parameters, after every optimizer step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.shadow)
        shadows, targets = [self.shadow[n] for n in names], [parameters[n].detach() for n in names]
        torch._foreach_lerp_(shadows, targets, 1 - decay)

"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdxl_cli.model.unet import FeedForward, ResBlock, TransformerBlock

Recompute = Literal["none", "ff", "blocks", "all"]

RECOMPUTED: dict[Recompute, tuple[type[nn.Module], ...]] = {
    "none": (),
    "ff": (FeedForward,),
    "blocks": (TransformerBlock,),
    "all": (ResBlock, TransformerBlock),
}
"""Modules of which only the input is kept, from the fastest to the smallest.

Of a step at 1024 pixels, with three passes' worth of arithmetic, feed-forward networks add 0.42 of a pass, transformer
blocks 0.75, all of them 0.95.
"""


Context = Callable[[], AbstractContextManager[Any]]


def recompute(network: nn.Module, mode: Recompute, again: Context = nullcontext) -> None:
    """Keep less of every pass with gradients; what was set before is replaced.

    Losses, gradients and random numbers stay the same to the bit. Passes without gradients, parameter names and
    ``state_dict`` are as before.

    Args:
        network: a U-Net, or what has one inside; changed in place.
        mode: a key of :data:`RECOMPUTED`.
        again: what to compute again in, besides torch's own autocast, which comes back by itself.
    """
    for module in network.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, RECOMPUTED[mode]):
            # on the instance: hooks of others, DDP's and FSDP's among them, stay around it
            module.__dict__["forward"] = _again(module.forward, again)


def _again(forward: Callable[..., Any], again: Context) -> Callable[..., Any]:
    def kept(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    return kept

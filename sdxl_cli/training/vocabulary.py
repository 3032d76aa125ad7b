"""Training text encoders on the tokens that captions have, and on no others."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdxl_cli.checkpoint.vocabulary import expanded, pruned
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.text import TOKEN_STD, ClipLEmbedder


class CompactEmbedding(nn.Module):
    """A token table with rows for some tokens, and one row that all others share."""

    def __init__(self, table: Tensor, ids: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(pruned(table, ids))
        rows = torch.full((len(table),), len(ids), dtype=torch.long)
        rows[ids] = torch.arange(len(ids))
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of the full vocabulary [...] -> [..., width]."""
        return F.embedding(self.get_buffer("rows")[ids], self.weight)


def _homes(model: SDXL) -> Iterable[nn.Module]:
    """The modules that have a ``token_embedding``."""
    for embedder in model.conditioner.embedders:
        clip_l = isinstance(embedder, ClipLEmbedder)
        yield embedder.get_submodule("transformer.text_model.embeddings" if clip_l else "model")


def compact(model: SDXL, ids: Tensor) -> None:
    """Let the model's text encoders have rows for these tokens only; changed in place.

    Words that a model with few words did not know all share one row in it; they start anew, each from its own.

    Args:
        model: with full token tables.
        ids: sorted token ids [n].
    """
    for home in _homes(model):
        table = home.get_parameter("token_embedding.weight").detach()
        home.token_embedding = CompactEmbedding(table, ids)
        if model.known_token_ids is not None:
            new = [row for row, token in enumerate(ids.tolist()) if token not in model.known_token_ids]
            fresh = torch.randn(len(new), table.shape[1]) * TOKEN_STD
            home.token_embedding.weight.data[new] = fresh.to(table)
    model.known_token_ids = frozenset(ids.tolist())


def expand(state: dict[str, Tensor], ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """A compact model's state dict with full token tables again."""
    return {
        name: expanded(value, ids, vocab_size) if name.endswith("token_embedding.weight") else value
        for name, value in state.items()
    }

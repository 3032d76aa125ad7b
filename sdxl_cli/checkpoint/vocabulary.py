"""Text encoders that keep embeddings for the tokens of their training captions only.

A table of 49408 rows is most of a tiny model's bytes. Its file keeps the rows of some token ids, listed in the tensor
``sdxl.token_ids`` [n]; row i of a table of n + 1 rows is that of the i-th id, and the last row stands for every
other token. Reading gives the full table back, so that models and tokenizers stay standard.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdxl_cli.checkpoint.identify import CLIP_L, TOKEN_IDS, big_g_prefix
from sdxl_cli.checkpoint.tensor_file import Tensors
from sdxl_cli.errors import FileError
from sdxl_cli.model.config import ModelConfig


def tables(config: ModelConfig) -> dict[str, int]:
    """The token tables of a model: name -> rows of the full vocabulary."""
    rows = {f"{big_g_prefix(config)}token_embedding.weight": config.big_g.vocab_size}
    if config.clip_l:
        rows[f"{CLIP_L}text_model.embeddings.token_embedding.weight"] = config.clip_l.vocab_size
    return rows


def pruned(table: Tensor, ids: Tensor) -> Tensor:
    """Keep the rows of some tokens [n], and one for all others: [V, D] -> [n + 1, D].

    The last row is what the others share, if they share one, else the mean of the kept rows.
    """
    ids = ids.to(table.device)
    others = torch.ones(len(table), dtype=torch.bool, device=table.device)
    others[ids] = False
    kept, rest = table[ids], table[others]
    shared = len(rest) > 0 and bool((rest == rest[0]).all())
    last = rest[0] if shared else kept.float().mean(dim=0).to(table.dtype)
    return torch.cat([kept, last[None]])


def expanded(table: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """The inverse of :func:`pruned`: [n + 1, D] -> [V, D]."""
    full = table[-1].expand(vocab_size, -1).clone()
    full[ids] = table[:-1]
    return full


def token_ids(ids: Sequence[int], vocab_size: int) -> Tensor:
    """Check and sort the ids to keep.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
    unique = sorted(set(ids))
    if not unique or unique[0] < 0 or unique[-1] >= vocab_size:
        raise ValueError(f"token ids must be within 0 … {vocab_size - 1}")
    return torch.tensor(unique, dtype=torch.int64)


class Expanded:
    """The tensors of a file, its token tables in full."""

    def __init__(self, tensors: Tensors, config: ModelConfig) -> None:
        """``tensors`` may be pruned or not.

        Raises:
            FileError: the list of ids does not fit the tables.
        """
        self._tensors = tensors
        self.ids = tensors.read(TOKEN_IDS) if TOKEN_IDS in tensors.shapes else None
        self._rows = {} if self.ids is None else tables(config)
        self.shapes = {name: shape for name, shape in tensors.shapes.items() if name != TOKEN_IDS}
        self.dtypes = {name: tensors.dtypes[name] for name in self.shapes}
        self.metadata = dict(tensors.metadata)
        for name, rows in self._rows.items():
            if self.ids is not None and name in self.shapes:
                _check(name, self.ids, self.shapes[name], rows)
                self.shapes[name] = (rows, *self.shapes[name][1:])

    @property
    def known_token_ids(self) -> frozenset[int] | None:
        """The tokens with an embedding of their own; None when all have one."""
        return None if self.ids is None else frozenset(self.ids.tolist())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See :meth:`Tensors.read`."""
        tensor = self._tensors.read(name, dtype)
        if self.ids is None or name not in self._rows:
            return tensor
        return expanded(tensor, self.ids, self._rows[name])


def _check(name: str, ids: Tensor, shape: tuple[int, ...], rows: int) -> None:
    inside = ids.ndim == 1 and len(ids) > 0 and int(ids.min()) >= 0 and int(ids.max()) < rows
    if not inside or shape[0] != len(ids) + 1:
        raise FileError(
            f"{TOKEN_IDS} {list(ids.shape)} does not fit {name} {list(shape)}; the file is damaged"
        )

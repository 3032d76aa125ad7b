"""What the tensors of a LoRA make of a weight: one function per algorithm.

The formulas are those of LyCORIS (arXiv 2309.14859) as its package computes them, of LoRA (arXiv 2106.09685) and of
DoRA (arXiv 2402.09353). ``strength`` is the scale the user asks for; 0 leaves the weight, 1 is what was trained, and in
between the change grows in proportion (in each of its factors for BOFT), as in ComfyUI and A1111.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

Parts = Mapping[str, Tensor]
Numbers = Mapping[str, float]
Change = Callable[[Parts, Numbers, Tensor, float], Tensor]
"""(tensors by role, numbers by role, weight [O, I, ...], strength) -> what to add to the weight, of its shape."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to write a change of a weight."""

    name: str
    needs: tuple[frozenset[str], ...]
    """The roles it is recognised by: one of these sets has to be there."""
    reads: frozenset[str]
    """All roles it understands."""
    change: Change
    rank_from: tuple[str, ...] = ()
    """The first of these roles that is there has the rank as its first side."""

    def fits(self, roles: frozenset[str]) -> bool:
        """Whether tensors of these roles are of this algorithm."""
        return any(needed <= roles for needed in self.needs)


NUMBERS = frozenset({"alpha", "scalar", "on_input"})
"""Roles of which only the number is of interest."""

_SCALES = {"alpha", "scalar"}
_MAGNITUDES = {"dora_scale", "magnitude"}


def algorithm_of(roles: frozenset[str]) -> Algorithm | None:
    """The algorithm whose tensors these are, for a layer's weight; None when they change no weight."""
    return next((algorithm for algorithm in ALGORITHMS if algorithm.fits(roles)), None)


def bias_role(roles: frozenset[str]) -> str | None:
    """The role of the tensor that is added to a layer's bias."""
    return next((role for role in ("diff_b", "b_norm", "up_bias") if role in roles), None)


def bias_change(parts: Parts, numbers: Numbers, bias: Tensor, strength: float) -> Tensor:
    """What to add to a bias [O]; see :data:`Change`."""
    role = bias_role(frozenset(parts))
    assert role is not None
    # PEFT scales the bias of its second matrix with that matrix; it writes its rank beside it
    scale = numbers["alpha"] / numbers["rank"] if role == "up_bias" and "alpha" in numbers else 1.0
    return _as(parts[role] * (strength * scale), bias)


def _as(change: Tensor, weight: Tensor) -> Tensor:
    """The change in the shape of the weight; 1x1 convolutions and linear layers stand for each other.

    Raises:
        ValueError: it belongs to another weight.
    """
    if change.shape[0] != weight.shape[0] or change.numel() != weight.numel():
        raise ValueError(f"{list(change.shape)} for a weight {list(weight.shape)}")
    return change.reshape(weight.shape)


def _additive(product: Callable[[Parts, float], Tensor], rank_from: tuple[str, ...]) -> Change:
    """Changes of the form alpha/rank · product, with DoRA's magnitude where there is one.

    ``product`` gets the factor along, to put it on its smallest tensor.
    """

    def change(parts: Parts, numbers: Numbers, weight: Tensor, strength: float) -> Tensor:
        scale = numbers.get("scalar", 1.0)
        if "alpha" in numbers and (rank := rank_of(parts, rank_from)):
            scale *= numbers["alpha"] / rank
        if parts.keys() & _MAGNITUDES:
            merged = weight + _as(product(parts, scale), weight)
            return (_with_magnitude(merged, parts) - weight) * strength
        return _as(product(parts, scale * strength), weight)

    return change


def rank_of(parts: Mapping[str, Tensor], rank_from: tuple[str, ...]) -> int | None:
    """The rank, or None for a change in full."""
    return next((int(parts[role].shape[0]) for role in rank_from if role in parts), None)


def _with_magnitude(weight: Tensor, parts: Parts) -> Tensor:
    """DoRA: the direction of ``weight`` with the stored magnitudes, per output channel or per input channel.

    PEFT's are per output channel, LyCORIS's of either kind; the shape tells which ([O, 1, ...] or [1, I, ...]).
    """
    stored = parts["magnitude"] if "magnitude" in parts else parts["dora_scale"]
    by_output = "magnitude" in parts or stored.ndim < 2 or stored.shape[0] == stored.numel()
    axis = 0 if by_output else 1
    if stored.numel() != weight.shape[axis]:
        raise ValueError(f"magnitudes {list(stored.shape)} for a weight {list(weight.shape)}")
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (stored.reshape(norm.shape) / norm)


def _low_rank(parts: Parts, factor: float) -> Tensor:
    """up · down, or for a convolution in Tucker form up · mid · down."""
    up, down = parts["up"].flatten(1) * factor, parts["down"]
    if "mid" in parts:
        return torch.einsum("m n ..., o m, n i -> o i ...", parts["mid"], up, down.flatten(1))
    return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _hadamard(parts: Parts, factor: float) -> Tensor:
    """LoHa: the element-wise product of two low-rank matrices."""
    return _hadamard_half(parts, 1, factor) * _hadamard_half(parts, 2, 1.0)


def _hadamard_half(parts: Parts, half: int, factor: float) -> Tensor:
    a, b = parts[f"hada_w{half}_a"] * factor, parts[f"hada_w{half}_b"]
    if f"hada_t{half}" in parts:
        return torch.einsum("m n ..., m o, n i -> o i ...", parts[f"hada_t{half}"], a, b)
    return a @ b.flatten(1)


def _kronecker(parts: Parts, factor: float) -> Tensor:
    """LoKr: the Kronecker product of two matrices, each in full or in low rank."""
    first = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        second = torch.einsum(
            "m n ..., m o, n i -> o i ...", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]
        )
    else:
        second = (parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1)).reshape(
            -1, *parts["lokr_w2_b"].shape[1:]
        )
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)) * factor
    return torch.kron(first, second.contiguous())


def _difference(parts: Parts, numbers: Numbers, weight: Tensor, strength: float) -> Tensor:
    return _as(parts["diff"] if "diff" in parts else parts["w_norm"], weight) * strength


def _general(parts: Parts, numbers: Numbers, weight: Tensor, strength: float) -> Tensor:
    """GLoRA: W·a1·a2 + b1·b2 (a1 and a2 act on the input channels)."""
    a1, a2 = parts["a1"].flatten(1), parts["a2"].flatten(1)
    delta = torch.einsum("o i ..., i r, r j -> o j ...", weight, a1, a2)
    b1, b2 = parts["b1"].flatten(1), parts["b2"]
    if "bm" in parts:
        added = torch.einsum("m n ..., o m, n i -> o i ...", parts["bm"], b1, b2.flatten(1))
    else:
        added = b1 @ b2.flatten(1)
    scale = numbers["alpha"] / b2.shape[0] if "alpha" in numbers else 1.0
    return (delta + _as(added, weight)) * (scale * numbers.get("scalar", 1.0) * strength)


def _ia3(parts: Parts, numbers: Numbers, weight: Tensor, strength: float) -> Tensor:
    """IA3: a factor for every input or output channel."""
    axis = 1 if numbers["on_input"] else 0
    factors = parts["weight"].flatten()
    if len(factors) != weight.shape[axis]:
        raise ValueError(f"{len(factors)} factors for a weight {list(weight.shape)}")
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factors.reshape(shape) * strength


def _orthogonal(parts: Parts, numbers: Numbers, weight: Tensor, strength: float) -> Tensor:
    """OFT (arXiv 2306.07280): blocks of output channels are rotated. [K, b, b] is OFT, [m, K, b, b] BOFT."""
    blocks = parts["oft_blocks"]
    rotations = _cayley(blocks, numbers.get("alpha", 0.0) * weight.shape[0])
    rows = weight.flatten(1)
    if blocks.ndim == 3:
        count, size = blocks.shape[:2]
        turned = rearrange(rows, "(k n) r -> k n r", k=count, n=size)
        # LyCORIS multiplies with the transposed rotation
        turned = torch.einsum("k n m, k n r -> k m r", rotations, turned).flatten(0, 1)
        return (_rescaled(turned, parts) - rows).reshape(weight.shape) * strength
    turned = rows
    count, size = blocks.shape[1:3]
    eye = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
    for stage, rotation in enumerate(rotations):
        # butterfly: stage s mixes channels that are 2^s · b/2 apart (arXiv 2311.06243)
        span = 2**stage * (size // 2)
        mixed = rearrange(turned, "(c two span) r -> (c span two) r", two=2, span=span)
        mixed = rearrange(mixed, "(k n) r -> k n r", k=count, n=size)
        mixed = torch.einsum("k i j, k j r -> k i r", rotation * strength + eye * (1 - strength), mixed)
        turned = rearrange(mixed.flatten(0, 1), "(c span two) r -> (c two span) r", two=2, span=span)
    return (_rescaled(turned, parts) - rows).reshape(weight.shape)


def _cayley(blocks: Tensor, limit: float) -> Tensor:
    """Rotations (I + Q)(I - Q)^-1 of the skew-symmetric parts Q, whose norm is limited when ``limit`` is not 0."""
    skew = blocks - blocks.transpose(-1, -2)
    if limit > 0:
        skew = skew * (limit / (skew.norm() + 1e-8)).clamp(max=1)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    rotations: Tensor = torch.linalg.solve(eye - skew, eye + skew, left=False)
    return rotations


def _rescaled(rows: Tensor, parts: Parts) -> Tensor:
    return rows * parts["rescale"].reshape(-1, 1) if "rescale" in parts else rows


_LORA_RANK = ("down",)
_LOHA_RANK = ("hada_w1_b",)
_LOKR_RANK = ("lokr_w1_b", "lokr_w2_b")


def _sets(*groups: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(group) for group in groups)


ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm(
        "LoRA",
        _sets(("up", "down")),
        frozenset({"up", "down", "mid", *_SCALES, *_MAGNITUDES}),
        _additive(_low_rank, _LORA_RANK),
        _LORA_RANK,
    ),
    Algorithm(
        "LoHa",
        _sets(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        frozenset(
            {f"hada_{p}" for p in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")} | _SCALES | _MAGNITUDES
        ),
        _additive(_hadamard, _LOHA_RANK),
        _LOHA_RANK,
    ),
    Algorithm(
        "LoKr",
        _sets(
            ("lokr_w1", "lokr_w2"),
            ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
            ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
        ),
        frozenset(
            {f"lokr_{p}" for p in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")} | _SCALES | _MAGNITUDES
        ),
        _additive(_kronecker, _LOKR_RANK),
        _LOKR_RANK,
    ),
    Algorithm("full", _sets(("diff",)), frozenset({"diff", *_SCALES}), _difference),
    Algorithm("norm", _sets(("w_norm",)), frozenset({"w_norm", *_SCALES}), _difference),
    Algorithm(
        "GLoRA",
        _sets(("a1", "a2", "b1", "b2")),
        frozenset({"a1", "a2", "b1", "b2", "bm", *_SCALES}),
        _general,
        ("b2",),
    ),
    Algorithm("OFT", _sets(("oft_blocks",)), frozenset({"oft_blocks", "rescale", "alpha"}), _orthogonal),
    Algorithm("IA3", _sets(("weight", "on_input")), frozenset({"weight", "on_input"}), _ia3),
)
"""Tried in this order."""

"""How much work something is, whatever the machine: multiplications, operations, waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

aten: Any = torch.ops.aten
WAITS = ("_local_scalar_dense", "equal", "nonzero", "_unique2", "masked_select")
"""Operations whose result the host has to wait for."""
_NOTHING = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "slice", "select",
    "split", "split_with_sizes", "chunk", "unsqueeze", "squeeze", "detach", "alias", "unbind", "as_strided", "unfold",
    "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh",
)  # fmt: skip
"""Operations that compute nothing: another look at the same numbers, or room for some."""


@dataclass(frozen=True, slots=True)
class Work:
    """What was counted."""

    flops: int
    """Twice the multiplications of matrix products, convolutions and attention, as they were carried out."""
    ops: int
    """Operations that compute or copy: on a GPU about as many kernels."""
    waits: int
    """Operations whose result the host waited for."""
    kinds: dict[str, int]
    """The number of each kind of operation that computes or copies."""


def count(work: Callable[[], object]) -> Work:
    """Run ``work`` once and count; it takes longer than without."""
    seen = _Operations()
    flops = FlopCounterMode(display=False, custom_mapping=_uncounted())
    with seen, flops:
        work()
    kinds = {name: number for name, number in seen.kinds.items() if name not in _NOTHING}
    waits = sum(kinds.get(name, 0) for name in WAITS)
    return Work(flops.get_total_flops(), sum(kinds.values()), waits, kinds)


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # a copy to the host is a wait by another name
        if name in ("_to_copy", "copy_") and _comes_home(args, made):
            name = "_local_scalar_dense"
        self.kinds[name] += 1
        return made


def _comes_home(args: tuple[Any, ...], made: Any) -> bool:
    sources = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return bool(sources) and made.device.type == "cpu" and any(t.device.type == "cuda" for t in sources)


def _uncounted() -> dict[Any, Any]:
    """Formulas for what torch's counter does not know: older ones lack attention on CPUs, all lack packed layers."""
    found: dict[Any, Any] = {}
    attention = aten._scaled_dot_product_flash_attention_for_cpu
    if attention not in flop_registry:
        found[attention] = _attention
    packed: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packed is not None:
        found[packed] = _packed_linear
    return found


def _attention(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _packed_linear(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """[..., C] -> [..., D]; a packed weight does not show its shape."""
    return 2 * int(torch.Size(out_shape).numel()) * int(x[-1])

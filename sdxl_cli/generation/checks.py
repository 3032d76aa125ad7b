"""NaN and infinity stop a run where they appear; nothing is patched up or painted black."""

from __future__ import annotations

import torch
from torch import Tensor

from sdxl_cli.errors import NumericError


def require_finite(values: Tensor, stage: str, dtype: torch.dtype, flag: str) -> None:
    """Stop when a network gave NaN or infinity.

    Args:
        values: what it gave.
        stage: who gave it, and when: ``"the UNet, step 3 of 30 (t=899)"``.
        dtype: the network's precision.
        flag: what chooses that precision on the command line.

    Raises:
        NumericError: a value is not finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    if dtype == torch.float32:
        advice = "its weights are damaged or do not belong together; try the original file"
    else:
        advice = f"try {flag} fp32" if dtype == torch.bfloat16 else f"fp16 overflows: try {flag} bf16 or fp32"
    raise NumericError(f"{stage}: gave NaN or infinity in {str(dtype).removeprefix('torch.')}; {advice}")


class FiniteWatch:
    """Looks at what a network gives at every step, without making an accelerator wait.

    On the CPU a bad step stops the run at once. On an accelerator the answers stay there until :meth:`settle` reads
    them all, and the first bad one is named.
    """

    def __init__(self, dtype: torch.dtype, flag: str) -> None:
        """Arguments as for :func:`require_finite`."""
        self._dtype, self._flag = dtype, flag
        self._seen: list[tuple[str, Tensor]] = []

    def see(self, values: Tensor, stage: str) -> None:
        """Look at the values of a stage.

        Raises:
            NumericError: they are on the CPU, and one is not finite.
        """
        if values.device.type == "cpu":
            require_finite(values, stage, self._dtype, self._flag)
        else:
            self._seen.append((stage, torch.isfinite(values).all()))

    def settle(self) -> None:
        """Read what an accelerator found.

        Raises:
            NumericError: a value of a stage was not finite; the text names the first such stage.
        """
        if not self._seen:
            return
        for (stage, _), fine in zip(
            self._seen, torch.stack([f for _, f in self._seen]).tolist(), strict=True
        ):
            if not fine:
                require_finite(torch.tensor(float("nan")), stage, self._dtype, self._flag)
        self._seen.clear()

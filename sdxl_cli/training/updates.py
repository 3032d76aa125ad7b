"""From gradients to weights: all at once, or each as soon as its gradient is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdxl_cli.errors import UsageError
from sdxl_cli.training.config import LoopConfig, OptimizerConfig
from sdxl_cli.training.optimizers import set_rate
from sdxl_cli.training.rounding import round_into

WHOLE_ONLY = {"prodigy": "finds its rate from all gradients together"}
"""Optimizers that cannot take one parameter at a time, and why."""


class Updates:
    """The step after the backward pass."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.parameters, self.optimizer = list(parameters), optimizer

    def begin(self, index: int, rate: float) -> None:
        """Before the first backward pass of step ``index``, whose learning rate is ``rate``."""
        self.drop()
        set_rate(self.optimizer, rate)

    def norm(self, limit: float) -> Tensor:
        """The length of the whole gradient, which is scaled down to ``limit``; 0 leaves it."""
        if limit:
            return torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def apply(self) -> None:
        """Change the weights."""
        self.optimizer.step()

    def drop(self) -> None:
        """Forget gradients, for room."""
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Leave the parameters as if this had never been."""


class OneByOne(Updates, ABC):
    """Steps of single parameters, which are fp32 to the optimizer whatever they are."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int
    ) -> None:
        super().__init__(parameters, optimizer)
        self.seed, self.index = seed, 0
        self.places = {p: place for place, p in enumerate(self.parameters)}
        self.groups = {p: group for group in optimizer.param_groups for p in group["params"]}
        self.generators: dict[torch.device, torch.Generator] = {}
        self.hooks = [
            p.register_post_accumulate_grad_hook(self.arrived)  # type: ignore[no-untyped-call]
            for p in self.parameters
        ]

    def begin(self, index: int, rate: float) -> None:
        """See :class:`Updates`."""
        super().begin(index, rate)
        self.index = index

    @abstractmethod
    def arrived(self, parameter: Tensor) -> None:
        """The gradient of a backward pass is whole."""

    def close(self) -> None:
        """See :class:`Updates`."""
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def step(self, parameter: Tensor, gradient: Tensor) -> None:
        """Change one weight by its gradient; nothing of the gradient is kept."""
        low = parameter.data
        parameter.data = low.float() if low.dtype == torch.bfloat16 else low
        parameter.grad = gradient.to(parameter.dtype)
        everything = self.optimizer.param_groups
        try:
            self.optimizer.param_groups = [{**self.groups[parameter], "params": [parameter]}]
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = everything
            parameter.grad = None
        if parameter.dtype != low.dtype:
            round_into(low, parameter.data, self._chances(parameter))
            parameter.data = low

    def _chances(self, parameter: Tensor) -> torch.Generator | None:
        """A stream of each step and parameter: the order in which gradients arrive does not matter."""
        device = parameter.device
        if device.type == "meta":
            return None
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        place = self.places[parameter]  # type: ignore[index]
        return self.generators[device].manual_seed((self.seed * 1_000_003 + self.index) * 100_003 + place)


class FusedUpdates(OneByOne):
    """Each weight is changed as soon as its gradient is there, inside the backward pass; gradients are never all there.

    Equal to :class:`Updates` to the bit, as long as nothing needs the whole gradient.
    """

    squares: Tensor | None = None

    def begin(self, index: int, rate: float) -> None:
        """See :class:`Updates`."""
        super().begin(index, rate)
        self.squares = None

    @torch.no_grad()
    def arrived(self, parameter: Tensor) -> None:
        """See :class:`OneByOne`."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        square = torch.linalg.vector_norm(gradient, dtype=torch.float32).square()
        self.squares = square if self.squares is None else self.squares + square
        self.step(parameter, gradient)

    def norm(self, limit: float) -> Tensor:
        """The length of the whole gradient, for the log."""
        assert not limit, "the configuration refuses it"
        return torch.zeros(()) if self.squares is None else self.squares.sqrt()

    def apply(self) -> None:
        """All is done."""


class RoundedUpdates(OneByOne):
    """The step after the backward pass for bf16 weights: their gradients are added up in fp32."""

    def drop(self) -> None:
        """See :class:`Updates`."""
        self.sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def arrived(self, parameter: Tensor) -> None:
        """See :class:`OneByOne`."""
        gradient = parameter.grad
        assert gradient is not None
        parameter.grad = None
        if parameter in self.sums:
            self.sums[parameter] += gradient
        else:
            self.sums[parameter] = gradient.float()

    @torch.no_grad()
    def norm(self, limit: float) -> Tensor:
        """As that of :class:`Updates`."""
        sums = list(self.sums.values())
        norm = torch.nn.utils.get_total_norm(sums)
        if limit:
            torch._foreach_mul_(sums, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def apply(self) -> None:
        """Change the weights one by one."""
        for parameter in list(self.sums):
            self.step(parameter, self.sums.pop(parameter))


def build_updates(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: OptimizerConfig,
    loop: LoopConfig,
    *,
    alone: bool = True,
) -> Updates:
    """What the configuration and the parameters' precision ask for.

    Args:
        parameters: of the optimizer.
        optimizer: changes them.
        config: the optimizer's.
        loop: the run's.
        alone: whether no other process has a part in the gradients.

    Raises:
        UsageError: the optimizer, or several processes, cannot do that.
    """
    low = any(p.dtype == torch.bfloat16 for p in parameters)
    if not (low or loop.fused_backward):
        return Updates(parameters, optimizer)
    what = "fused_backward" if loop.fused_backward else "weights in bf16"
    if not alone:
        raise UsageError(
            f"{what}: each process would change weights by its own gradients; train without torchrun, "
            "or with --distributed fsdp and neither"
        )
    if why := WHOLE_ONLY.get(config.name):
        raise UsageError(
            f"{what}: weights change one by one, and {config.name} {why}; use adamw or adafactor"
        )
    if loop.fused_backward and config.max_grad_norm:
        raise UsageError(
            "fused_backward changes weights before the whole gradient is there, whose length max_grad_norm limits; "
            "give --max-grad-norm 0"
        )
    return (FusedUpdates if loop.fused_backward else RoundedUpdates)(parameters, optimizer, loop.seed)

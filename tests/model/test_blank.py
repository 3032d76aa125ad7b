"""Networks without values: what is left out, and what is not."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from torch import Tensor, nn

from sdxl_cli.model.blank import blank
from sdxl_cli.model.config import TINY
from sdxl_cli.model.sdxl import SDXL

COMPILER = {"torch._dynamo", "torch._inductor", "sympy", "torch.fx.experimental.symbolic_shapes"}


def test_a_blank_model_has_the_names_shapes_and_types_of_a_real_one() -> None:
    def outline(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

    with blank():
        model = SDXL(TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert outline(model) == outline(SDXL(TINY))


def test_tensors_with_values_are_filled_as_ever() -> None:
    with blank():
        filled = nn.init.constant_(torch.empty(3, device="cpu"), 2.0)
        mask = torch.full((2, 2), 1.0, device="cpu").triu_(1)
    assert torch.equal(filled, torch.full((3,), 2.0))
    assert torch.equal(mask, torch.tensor([[0.0, 1.0], [0.0, 0.0]]))


def test_afterwards_modules_get_values_again() -> None:
    def weight() -> Tensor:
        torch.manual_seed(0)
        return nn.Linear(3, 3).weight

    before = weight()
    with blank():
        nn.Linear(3, 3)
    assert torch.equal(weight(), before)
    assert not weight().is_meta


def test_a_whole_model_is_built_without_the_compiler() -> None:
    code = (
        "import json, sys\n"
        "from sdxl_cli.model.blank import blank\n"
        "from sdxl_cli.model.config import BASE\n"
        "from sdxl_cli.model.sdxl import SDXL\n"
        "with blank():\n"
        "    SDXL(BASE)\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not COMPILER & set(json.loads(done.stdout))

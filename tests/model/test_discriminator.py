"""The patch discriminator against the original's sizes and names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdxl_cli.model.discriminator import PatchDiscriminator, initialize, least_side

# NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3, use_actnorm=False) of taming-transformers
CONVOLUTIONS = {
    "main.0": (64, 3),
    "main.2": (128, 64),
    "main.5": (256, 128),
    "main.8": (512, 256),
    "main.11": (1, 512),
}
NORMS = {"main.3": 128, "main.6": 256, "main.9": 512}
COUNT = 2_765_633


def original_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (width, before) in CONVOLUTIONS.items():
        shapes[f"{name}.weight"] = (width, before, 4, 4)
    for name in ("main.0", "main.11"):
        shapes[f"{name}.bias"] = (CONVOLUTIONS[name][0],)
    for name, width in NORMS.items():
        shapes |= {f"{name}.{kind}": (width,) for kind in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


def by_hand(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The formula, layer by layer, with norms over the batch."""
    x = F.leaky_relu(F.conv2d(x, state["main.0.weight"], state["main.0.bias"], 2, 1), 0.2)
    for conv, stride in (("2", 2), ("5", 2), ("8", 1)):
        x = F.conv2d(x, state[f"main.{conv}.weight"], None, stride, 1)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        norm = f"main.{int(conv) + 1}"
        weight, bias = (state[f"{norm}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        x = F.leaky_relu((x - mean) / (var + 1e-5).sqrt() * weight + bias, 0.2)
    return F.conv2d(x, state["main.11.weight"], state["main.11.bias"], 1, 1)


def test_names_shapes_and_count_are_the_originals() -> None:
    with torch.device("meta"):
        made = PatchDiscriminator()
    assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == original_shapes()
    assert sum(p.numel() for p in made.parameters()) == COUNT


def test_its_answer_is_the_formula() -> None:
    torch.manual_seed(0)
    made = PatchDiscriminator(channels=8)
    initialize(made)
    state = {name: value.clone() for name, value in made.state_dict().items()}
    images = torch.rand(2, 3, 40, 48) * 2 - 1
    torch.testing.assert_close(made(images), by_hand(state, images), rtol=1e-4, atol=1e-6)


def test_every_number_judges_70_pixels() -> None:
    made = PatchDiscriminator(channels=4).eval()  # with norms over the batch, all pixels have a say
    image = torch.randn(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)).requires_grad_()
    made(image)[0, 0, 9, 9].backward()
    assert image.grad is not None
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_least_side_gives_one_logit_and_a_pixel_less_none(layers: int) -> None:
    made = PatchDiscriminator(channels=4, layers=layers).eval()
    side = least_side(layers)
    assert made(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        made(torch.zeros(1, 3, side - 1, side - 1))


def test_starting_weights_have_the_originals_deviations() -> None:
    torch.manual_seed(0)
    made = PatchDiscriminator()
    biases = [
        module.bias.clone()
        for module in made.modules()
        if isinstance(module, nn.Conv2d) and module.bias is not None
    ]
    initialize(made)
    state = made.state_dict()
    for name in CONVOLUTIONS:
        assert float(state[f"{name}.weight"].std()) == pytest.approx(0.02, rel=0.05)
    for name in NORMS:
        assert float(state[f"{name}.weight"].mean()) == pytest.approx(1.0, abs=0.01)
        assert float(state[f"{name}.weight"].std()) == pytest.approx(0.02, rel=0.25)
        assert not state[f"{name}.bias"].any()
    assert all(torch.equal(b, state[f"main.{i}.bias"]) for b, i in zip(biases, (0, 11), strict=True))

"""What a step of the released size costs, in counts that no machine changes. Shapes only: nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sdxl_kernels import strips
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.guidance import Guidance, Guided
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.model import vae_strips
from sdxl_cli.model.attention import KeysValues
from sdxl_cli.model.config import BASE
from sdxl_cli.model.unet import Prepared, TransformerBlock, UNet
from sdxl_cli.model.vae import Autoencoder

META = torch.device("meta")
TERA = 10**12
TOKENS = 77


class Operations(TorchDispatchMode):
    """Counts what is handed to a device, which is what eager execution and a recording have to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet:
    with META:
        return UNet(BASE.unet).requires_grad_(False)


def inputs(unet: UNet, rows: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = unet.config
    context = torch.empty(rows, TOKENS, config.context_dim, device=META)
    return (
        torch.empty(1, 4, 128, 128, device=META),
        torch.empty(rows, dtype=torch.long, device=META),
        context,
        torch.empty(rows, config.adm_in_channels, device=META),
    )


def prepared(unet: UNet, bare: int) -> Prepared:
    """As ``prepare`` does, which looks at values and so cannot be asked without them."""
    _, _, context, vector = inputs(unet)
    blocks = [module for module in unet.modules() if isinstance(module, TransformerBlock)]
    pairs: dict[Any, KeysValues] = {block: block.attn2.read(context[bare:]) for block in blocks}
    return Prepared(unet.label_emb(vector), pairs)


def shifts(unet: UNet, timesteps: Tensor, what: Prepared) -> Tensor:
    return unet.shifts(timesteps[None], what)[0]


def test_arithmetic_of_a_guided_step(unet: UNet) -> None:
    """At 1024². Written out in full a step takes 13.52 TFLOP; the original's text of zeros lets 4 % go."""
    x, t, context, vector = inputs(unet)
    with FlopCounterMode(display=False) as full:
        unet(torch.cat([x, x]), t, context, vector)
    counts = []
    for bare in (0, 1):
        what = prepared(unet, bare)
        with FlopCounterMode(display=False) as seen:
            unet.step(x, shifts(unet, t, what), what)
        counts.append(seen.get_total_flops() / TERA)
    assert full.get_total_flops() / TERA == pytest.approx(13.25, abs=0.02), "13.52 less what doubling costs"
    assert counts == [pytest.approx(13.11, abs=0.02), pytest.approx(12.62, abs=0.02)]


def test_operations_of_a_guided_step(unet: UNet) -> None:
    """Written out by others it takes 2,340, of which 159 are divisions by 1 and 507 copies."""
    x, t, _, _ = inputs(unet)
    what = prepared(unet, 1)
    shift = shifts(unet, t, what)
    with Operations() as operations:
        unet.step(x, shift, what)
    seen = operations.seen
    print(sum(seen.values()), seen.most_common())
    del seen["dropout"]  # hands on what it is given
    assert sum(seen.values()) < 1735
    assert not {"div", "sin", "cos", "exp", "silu", "mul"} & seen.keys(), "nothing is made of the timestep"
    assert seen["copy_"] < 160


def test_arithmetic_of_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1024²; written out in full it takes 10.47 TFLOP."""
    with META:
        vae, latent = Autoencoder(BASE.vae).requires_grad_(False), torch.empty(1, 4, 128, 128)
    with FlopCounterMode(display=False) as seen:
        vae.decode(latent)
    assert seen.get_total_flops() / TERA == pytest.approx(8.92, abs=0.02)
    monkeypatch.setattr(strips, "STATISTICS", 1 << 24)  # fewer operations to count
    with FlopCounterMode(display=False) as fast:
        vae_strips.decode(vae, latent, winograd=True)
    assert fast.get_total_flops() < 0.5 * seen.get_total_flops()


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_step_waits_for_the_device(name: str) -> None:
    """On a device without numbers, whoever asks for one is an error."""

    def network(x: Tensor, index: int, crossattn: Tensor, vector: Tensor) -> Tensor:
        return torch.cat([x] * (len(vector) // len(x)))

    guided = Guided(
        denoiser=Denoiser(network, NoiseSchedule()),
        crossattn=(torch.empty(1, TOKENS, 8, device=META),) * 2,
        vector=(torch.empty(1, 8, device=META),) * 2,
        guidance=Guidance(5.0, rescale=0.7),
    )
    sigmas = torch.tensor([14.6, 7.0, 3.0, 1.0, 0.3, 0.0])
    x = torch.empty(1, 4, 8, 8, device=META)
    latents = list(SAMPLERS[name].steps(guided, x, sigmas, NoiseStreams([5])))
    assert len(latents) == 5
    assert latents[-1].is_meta

"""What only a CUDA device can show. Run with ``-m gpu``; the numbers are printed with ``-rP``."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sdxl_kernels import cuda_norm
from sdxl_kernels.attention import attention, cuda_backends
from sdxl_kernels.convolution import upsample_conv
from sdxl_kernels.cuda_norm import TOLERANCES, FusedNorm
from sdxl_kernels.graphs import CudaRecorder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.grids import GRIDS
from sdxl_cli.diffusion.guidance import Guidance, Guided
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.generation.encode import Prompts
from sdxl_cli.generation.pipeline import started
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.remember import RecordedSteps, Remembering
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.start import Source
from sdxl_cli.generation.weights import LoadedWeights
from sdxl_cli.model import config as sizes
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.text import ClipLEmbedder, OpenClipEmbedder
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder
from tests.model.peers import BASE, BIG_G, CLIP_L, REFINER, randomize

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

CEILINGS = {torch.float32: 0.002, torch.float16: 0.005, torch.bfloat16: 0.035}
"""Root mean square error in units of the output's deviation: rounding, with room. Single includes TF32."""

Inputs = tuple[Tensor, ...]


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float().cpu() - exact).square().mean().sqrt() / exact.std())


def moved(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(x.to(DEVICE, dtype if x.is_floating_point() else None) for x in inputs)


def unet_inputs(config: ModelConfig, batch: int = 2, size: tuple[int, int] = (16, 12)) -> Inputs:
    return (
        torch.randn(batch, 4, *size),
        torch.tensor([999, 300])[:batch],
        torch.randn(batch, 77, config.unet.context_dim),
        torch.randn(batch, config.unet.adm_in_channels),
    )


def token_ids() -> Tensor:
    ids = torch.randint(1, 118, (2, 77))
    ids[:, 0], ids[0, 9], ids[1, 40] = 118, 119, 119
    return ids


class Encode(nn.Module):
    """An autoencoder, the other way."""

    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).mean


class Decode(Encode):
    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


class Pooled(nn.Module):
    def __init__(self, tower: OpenClipEmbedder) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([part.flatten(1) for part in self.tower(ids)], dim=1)


def spread(network: nn.Module) -> nn.Module:
    """Weights that keep variance about 1: with torch's own an autoencoder's output is nearly constant."""
    return randomize(network, stream=1.0)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "base U-Net": lambda: (UNet(BASE.unet), unet_inputs(BASE)),
    "refiner U-Net": lambda: (UNet(REFINER.unet), unet_inputs(REFINER)),
    "encoder": lambda: (spread(Encode(Autoencoder(BASE.vae))), (torch.rand(2, 3, 64, 96) * 2 - 1,)),
    "decoder": lambda: (spread(Decode(Autoencoder(BASE.vae))), (torch.randn(2, 4, 8, 12),)),
    "CLIP-L": lambda: (spread(ClipLEmbedder(CLIP_L)), (token_ids(),)),
    "bigG": lambda: (spread(Pooled(OpenClipEmbedder(BIG_G))), (token_ids(),)),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_in_every_precision(name: str, dtype: torch.dtype) -> None:
    """Against single precision on the CPU, which is compared with other implementations elsewhere."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]()
    expected = network.eval()(*inputs)
    found = error(copy.deepcopy(network).to(DEVICE, dtype)(*moved(inputs, dtype)), expected)
    print(f"{name}, {dtype}: {found:.2%}")
    assert found < CEILINGS[dtype]


SHAPES = {
    "self-attention at 1024², 640 wide": (2, 10, 4096, 4096, 64),
    "self-attention at 1024², 1280 wide": (2, 20, 1024, 1024, 64),
    "self-attention of an odd size": (2, 10, 3003, 3003, 64),
    "a text": (2, 10, 4096, 77, 64),
    "two chunks of text": (2, 20, 1024, 154, 64),
    "the VAE at 1024²": (1, 1, 16384, 16384, 512),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_first_kernel_offered_takes_the_problem(name: str, dtype: torch.dtype) -> None:
    """And gives the formula's result, without ever holding the scores of a large problem."""
    torch.manual_seed(0)
    batch, heads, queries, keys, width = SHAPES[name]
    q = torch.randn(batch, heads, queries, width, device=DEVICE).to(dtype)
    k, v = (torch.randn(batch, heads, keys, width, device=DEVICE).to(dtype) for _ in range(2))
    first = cuda_backends(q, k, torch.cuda.get_device_capability())[0]
    assert first != SDPBackend.MATH
    with sdpa_kernel([first]):
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attention(q, k, v)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    some = q[:, :, :64].double()
    scores = (some @ k.double().transpose(-1, -2) / width**0.5).softmax(-1)
    found = error(out[:, :, :64].double(), (scores @ v.double()).float().cpu())
    print(f"{name}, {dtype}: {first}, error {found:.2%}, {taken >> 20} MiB")
    assert found < CEILINGS[dtype]
    if queries * keys >= 4096**2:
        scores_of_all = batch * heads * queries * keys * out.element_size()
        assert taken < scores_of_all / 4


def guided(unet: UNet, dtype: torch.dtype, device: torch.device, batch: int = 2) -> Guided:
    torch.manual_seed(1)
    text = [torch.randn(batch, 77, BASE.unet.context_dim).to(device, dtype) for _ in range(2)]
    vectors = [torch.randn(batch, BASE.unet.adm_in_channels).to(device, dtype) for _ in range(2)]
    denoiser = Denoiser(Remembering(unet.to(device, dtype)), NoiseSchedule())
    return Guided(denoiser, (text[0], text[1]), (vectors[0], vectors[1]), Guidance(5.0))


def run(sampler: str, guide: Guided, steps: int, device: torch.device) -> Tensor:
    sigmas = GRIDS["sgm"](NoiseSchedule(), steps)
    x = NoiseStreams([1, 2]).next((4, 16, 12)) * (1 + sigmas[0] ** 2).sqrt()
    *_, end = SAMPLERS[sampler].steps(guide, x.to(device), sigmas, NoiseStreams([1, 2]))
    return end


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the CPU wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_denoising_loop_never_waits_for_the_device(sampler: str) -> None:
    torch.manual_seed(0)
    guide = guided(UNet(BASE.unet).eval(), torch.bfloat16, DEVICE)
    sigmas = GRIDS["sgm"](NoiseSchedule(), 3)
    x = torch.randn(2, 4, 16, 12, device=DEVICE) * float(sigmas[0])
    list(SAMPLERS[sampler].steps(guide, x, sigmas, NoiseStreams([1, 2])))  # libraries are loaded
    with no_waiting():
        path = list(SAMPLERS[sampler].steps(guide, x, sigmas, NoiseStreams([1, 2])))
    assert torch.isfinite(path[-1]).all()


class Strict:
    """A reporter in whose loops waiting is an error, once it is told so."""

    def __init__(self) -> None:
        self.strict = False

    def note(self, text: str) -> None:
        pass

    warn = note

    def progress(self, items: Iterable[Any], description: str, *, total: int | None = None) -> Iterator[Any]:
        with no_waiting() if self.strict else nullcontext():
            yield from items


@torch.inference_mode()
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_whole_run_waits_for_the_device(sampler: str, recorded: bool) -> None:
    """With conditions that change on the way; the second run replays what the first one recorded."""
    torch.manual_seed(0)
    model = SDXL(BASE).eval().requires_grad_(False).to(DEVICE)
    weights = LoadedWeights(model, "random")
    if recorded:
        weights.recorded = RecordedSteps(model.unet)
    request = GenerateRequest(
        prompt="x",
        size="128x96",
        seed=5,
        steps=4,
        sampler=sampler,
        adm_scale="1.5:0.8:0.5",
        cfg_interval="0.2:0.8",
    )
    plan, report = plan_generation(request, BASE), Strict()
    text = [torch.randn(1, *shape, device=DEVICE) for shape in ((77, BASE.unet.context_dim), (40,))]
    features = TextFeatures(text[0], text[1])
    for report.strict in (False, True):
        walk = started(plan, [5, 6], weights, Source(vae=BASE.vae))
        walk.advance(weights, Prompts(features, features.zeros()), plan.steps, report)
    assert torch.isfinite(walk.latents).all()


def test_waiting_would_be_noticed() -> None:
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError), no_waiting():
        value.item()


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_is_the_same_picture_on_both_devices(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    unet = UNet(BASE.unet).eval()
    on_cpu = run(
        sampler, guided(copy.deepcopy(unet), torch.float32, torch.device("cpu")), 6, torch.device("cpu")
    )
    on_gpu = run(sampler, guided(unet, torch.float32, DEVICE), 6, DEVICE)
    found = error(on_gpu, on_cpu)
    print(f"{sampler}: {found:.1e}")
    assert found < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_replayed_graph_computes_what_eager_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = UNet(BASE.unet).eval().to(DEVICE, dtype)
    static, fresh = (moved(unet_inputs(BASE), dtype) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            unet(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = unet(*static)
    for place, value in zip(static, fresh, strict=True):
        place.copy_(value)
    graph.replay()
    eager = unet(*fresh).float().cpu()
    found = error(out, eager)
    print(f"graph, {dtype}: {found:.1e}, the same bits: {torch.equal(out.float().cpu(), eager)}")
    assert found < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("side", [1024, 2048])
def test_the_released_autoencoder_in_bfloat16(side: int) -> None:
    """Its size, with random weights; against single precision on the same device."""
    if torch.cuda.get_device_properties(DEVICE).total_memory < side * 20 << 20:
        pytest.skip(f"needs about {side * 20 >> 10} GiB")
    torch.manual_seed(0)
    vae: Any = spread(Autoencoder(sizes.BASE.vae)).to(DEVICE)
    image = torch.rand(1, 3, side, side, device=DEVICE) * 2 - 1
    z = torch.randn(1, 4, side // 8, side // 8, device=DEVICE)
    mean, decoded = vae.encode(image).mean.cpu(), vae.decode(z).cpu()
    vae = vae.to(torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    errors = (
        error(vae.encode(image.to(torch.bfloat16)).mean, mean),
        error(vae.decode(z.to(torch.bfloat16)), decoded),
    )
    peak = torch.cuda.max_memory_allocated() >> 20
    print(f"VAE bf16 {side}²: mean {errors[0]:.2%}, image {errors[1]:.2%}, peak {peak} MiB")
    assert max(errors) < CEILINGS[torch.bfloat16]


@torch.inference_mode()
def test_recorded_steps_are_the_steps() -> None:
    """Two prompts and two shapes in turns; a recording reads what is copied to it."""
    unet = UNet(BASE.unet)
    randomize(unet)
    unet.to(DEVICE)
    plain, recorded = Remembering(unet), Remembering(unet, RecordedSteps(unet))
    prompts = [moved(unet_inputs(BASE)[2:], torch.float32) for _ in range(2)]
    for _ in range(2):
        for size in ((16, 12), (8, 8)):
            for text, vector in prompts:
                x = torch.randn(1, 4, *size, device=DEVICE)
                expected = plain(x, 500, text, vector)
                assert error(recorded(x, 500, text, vector), expected.cpu()) < 1e-4


@torch.inference_mode()
def test_recordings_of_base_and_refiner_take_turns_in_the_same_memory() -> None:
    """And when both are gone the next one begins anew, with what torch still holds of them or without."""
    for empty in (True, False):
        steps = []
        for config in (BASE, REFINER):
            unet = UNet(config.unet)
            randomize(unet)
            unet.to(DEVICE)
            given = moved(unet_inputs(config)[2:], torch.float32)
            steps.append((Remembering(unet), Remembering(unet, RecordedSteps(unet)), given))
        for _ in range(3):
            for plain, recorded, (text, vector) in steps:
                x = torch.randn(1, 4, 16, 12, device=DEVICE)
                assert error(recorded(x, 500, text, vector), plain(x, 500, text, vector).cpu()) < 1e-4
        del plain, recorded, steps, unet
        gc.collect()
        if empty:
            torch.cuda.empty_cache()


def fused_norm(dtype: torch.dtype) -> FusedNorm:
    found = cuda_norm.ready(torch.device("cuda", torch.cuda.current_device()), dtype)
    assert isinstance(found, FusedNorm), found
    return found


def last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


NORMS = {
    "320 at 128²": (2, 320, 128, 128),
    "960 at 128²": (2, 960, 128, 128),
    "640 at 64²": (2, 640, 64, 64),
    "2560 at 32²": (2, 2560, 32, 32),
    "1280 at 16²": (2, 1280, 16, 16),
    "an odd size": (3, 320, 61, 47),
    "the VAE at 1024²": (1, 128, 1024, 1024),
}


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_the_fused_norm_is_the_formula(name: str, dtype: torch.dtype) -> None:
    """Also where the mean is large, and with the same bits each time."""
    torch.manual_seed(0)
    channels = NORMS[name][1]
    weight, bias = (torch.randn(channels, device=DEVICE).to(dtype) for _ in range(2))
    fused = fused_norm(dtype)
    for mean in (0.0, 30.0):
        x = last(torch.randn(NORMS[name], device=DEVICE) + mean, dtype)
        width = fused.width(x, 32, weight, bias)
        exact = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
        first, second = (fused(x, 32, weight, bias, 1e-5, width=width, silu=True) for _ in range(2))
        assert torch.equal(first, second)
        assert first.is_contiguous(memory_format=torch.channels_last)
        found = float((first - exact).abs().max() / exact.abs().max())
        print(f"{name}, {dtype}, mean {mean}: {found:.1e}")
        assert found < TOLERANCES[dtype] * (1 if mean == 0 else 4)


@torch.inference_mode()
def test_the_fused_norm_of_more_than_two_to_the_31_numbers() -> None:
    if torch.cuda.get_device_properties(DEVICE).total_memory < 24 << 30:
        pytest.skip("needs about 16 GiB")
    shape, layout = (1, 128, 4100, 4100), torch.channels_last
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_()
    weight, bias = torch.ones(128, device=DEVICE).bfloat16(), torch.zeros(128, device=DEVICE).bfloat16()
    made = fused_norm(torch.bfloat16)(x, 32, weight, bias, 1e-5, width=8, silu=False)
    for part in (slice(0, 8), slice(-8, None)):
        # of so many random numbers mean and deviation are known
        assert (made[:, :, part].float() - x[:, :, part].float()).abs().max() < 0.1


@torch.inference_mode()
def test_the_fused_norm_is_recorded_and_runs_on_any_stream() -> None:
    weight, bias = torch.randn(2, 320, device=DEVICE).bfloat16().unbind()
    x, other = (last(torch.randn(2, 320, 33, 31), torch.bfloat16) for _ in range(2))
    fused = fused_norm(torch.bfloat16)

    def work() -> Tensor:
        return fused(x, 32, weight, bias, 1e-5, width=8, silu=True)

    expected = fused(other, 32, weight, bias, 1e-5, width=8, silu=True)
    replay, result = CudaRecorder(DEVICE)(work)
    x.copy_(other)
    replay()
    torch.cuda.synchronize()
    assert torch.equal(result, expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made = work()
    side.synchronize()
    assert torch.equal(made, expected)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["base U-Net", "refiner U-Net", "encoder", "decoder"])
def test_networks_with_channels_last(name: str, dtype: torch.dtype) -> None:
    """No further from single precision than with channels first."""
    torch.manual_seed(0)
    network, inputs = NETWORKS[name]()
    expected = network.eval()(*inputs)
    network.to(DEVICE, dtype)
    first = error(network(*moved(inputs, dtype)), expected)
    part: Any = network.vae if isinstance(network, Encode) else network
    part.lay_channels_last()
    found = error(network(*moved(inputs, dtype)), expected)
    print(f"{name}, {dtype}: channels first {first:.2%}, last {found:.2%}")
    assert found < CEILINGS[dtype]


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_doubling_by_four_small_convolutions(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 320, 33, 31), torch.randn(320, 320, 3, 3) / 54
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1)
    moved_x, moved_weight = (value.to(DEVICE, dtype, memory_format=layout) for value in (x, weight))
    made = upsample_conv(moved_x, moved_weight, None)
    assert made.is_contiguous(memory_format=layout)
    assert error(made, expected) < CEILINGS[dtype]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", CEILINGS, ids=str)
def test_queries_keys_and_values_by_one_product(dtype: torch.dtype) -> None:
    unet = UNet(BASE.unet).eval()
    randomize(unet)
    inputs = unet_inputs(BASE)
    expected = unet(*inputs)
    unet.to(DEVICE, dtype).join_projections()
    found = error(unet(*moved(inputs, dtype)), expected)
    print(f"joined, {dtype}: {found:.2%}")
    assert found < CEILINGS[dtype]

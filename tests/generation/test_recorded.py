"""Steps that are recorded and replayed: which are, when, and that they give what they would give anyhow."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sdxl_kernels import cuda_norm
from sdxl_kernels.graphs import Graphs, unrecorded
from torch import Tensor

from sdxl_cli.bench.counting import count
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.generation.remember import RecordedSteps, Remembering
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.config import CONFIGS
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import Prepared, TransformerBlock, UNet
from tests.model.peers import BASE, randomize, relative


class Tape:
    """Records as a GPU does: a replay works on the memory of the recording, and nothing else."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recordings += 1
        place = torch.full_like(work(), torch.nan)  # nothing is computed while recording

        def replay() -> None:
            place.copy_(work())

        return replay, place


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def unet() -> UNet:
    found = UNet(BASE.unet)
    randomize(found)
    return found.requires_grad_(False)


def conditions(rows: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 7, BASE.unet.context_dim), torch.randn(rows, BASE.unet.adm_in_channels)


def at(unet: UNet, index: int, prepared: Prepared) -> Tensor:
    return unet.shifts(torch.full((1, 2), index), prepared)[0]


def test_a_replayed_step_is_the_step(unet: UNet) -> None:
    tape = Tape()
    plain, recorded = Remembering(unet), Remembering(unet, RecordedSteps(unet, tape))
    prompts = [conditions(), conditions()]
    for text, vector in (*prompts, *reversed(prompts)):
        for index in (999, 500, 3):
            x, t = torch.randn(1, 4, 8, 8), index
            assert torch.equal(recorded(x, t, text, vector), plain(x, t, text, vector))
    assert tape.recordings == 1, "another prompt and another time are no other shape"


def test_shapes_and_texts_of_zeros_have_recordings_of_their_own(unet: UNet) -> None:
    tape = Tape()
    plain, recorded = Remembering(unet), Remembering(unet, RecordedSteps(unet, tape))
    text, vector = conditions()
    bare = text.clone()
    bare[0] = 0.0
    for _ in range(2):
        for size in ((8, 8), (6, 10)):
            for features in (text, bare):
                x, t = torch.randn(1, 4, *size), 7
                assert torch.equal(recorded(x, t, features, vector), plain(x, t, features, vector))
    assert tape.recordings == 4


def test_what_is_counted_is_computed_once_and_not_recorded(unet: UNet) -> None:
    tape = Tape()
    plain, recorded = Remembering(unet), Remembering(unet, RecordedSteps(unet, tape))
    text, vector = conditions()
    x, t = torch.randn(1, 4, 8, 8), 7
    once = count(lambda: plain(x, t, text, vector))
    with unrecorded():
        assert count(lambda: recorded(x, t, text, vector)).flops == once.flops
    assert tape.recordings == 0
    recorded(x, t, text, vector)
    assert tape.recordings == 1


def test_results_stay_as_they_are() -> None:
    graphs = Graphs(lambda changing, kept: changing[0] + kept[0], Tape())
    prompt = object()
    first = graphs([torch.ones(2)], [torch.ones(2)], prompt)
    second = graphs([torch.full((2,), 5.0)], [torch.zeros(2)], prompt)
    third = graphs([torch.full((2,), 5.0)], [torch.zeros(2)], object())
    assert (first[0], second[0], third[0]) == (2.0, 6.0, 5.0), (
        "kept values are read when whose they are changes"
    )


def test_the_one_unused_for_longest_goes() -> None:
    tape = Tape()
    graphs = Graphs(lambda changing, kept: changing[0] * 2, tape, most=2)
    for size in (1, 2, 1, 3, 1):
        assert torch.equal(graphs([torch.ones(size)], [], None), torch.full((size,), 2.0))
    assert tape.recordings == 3
    graphs([torch.ones(2)], [], None)
    assert tape.recordings == 4


def test_a_computer_without_a_gpu_records_nothing(models: dict[str, Path]) -> None:
    weights = FileWeights(
        locate(str(models["base"])), device=torch.device("cpu"), dtype=torch.float32, vae_dtype=torch.float32
    )
    unet = weights.unet()
    assert weights.recorded is None
    assert unet.fast


def test_who_asks_for_no_winograd_gets_none(models: dict[str, Path]) -> None:
    files = locate(str(models["base"]))
    kinds = {"device": torch.device("cpu"), "dtype": torch.float32, "vae_dtype": torch.float32}
    assert not FileWeights(files, winograd=False, **kinds).unet().fast  # type: ignore[arg-type]


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("kinds", "laid"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"device": torch.device("cpu")}, False),
        ({"streams": True}, True),
        ({"compiles": True}, False),
    ],
)
@pytest.mark.parametrize("available", [True, False])
def test_which_networks_have_channels_last(
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    kinds: dict[str, Any],
    laid: bool,
    available: bool,
) -> None:
    """On a GPU in 16 bits, where the group norm leaves them there."""
    monkeypatch.setattr(cuda_norm, "ready", lambda device, dtype: object() if available else "no compiler")
    told = {"device": GPU, "dtype": torch.bfloat16, "vae_dtype": torch.float32, "cuda_graphs": False} | kinds
    network = UNet(BASE.unet)
    FileWeights(locate(str(models["base"])), **told)._set_up(network)
    assert network.channels_last is (laid and available)
    kernel = network.get_parameter("out.2.weight")
    moved = network.channels_last and "streams" not in kinds
    assert kernel.is_contiguous(memory_format=torch.channels_last) is moved, (
        "a file's pages stay where they are"
    )
    blocks = [module for module in network.modules() if isinstance(module, TransformerBlock)]
    at_once = kinds.get("device", GPU) == GPU and not kinds.keys() & {"streams", "compiles"}
    assert {block.attn1.joined is not None for block in blocks} == {at_once}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_autoencoder_has_channels_last_once(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cuda_norm, "ready", lambda device, dtype: object())
    weights = FileWeights(locate(str(models["base"])), device=GPU, dtype=torch.float16, vae_dtype=dtype)
    model = SDXL(BASE, ("vae",))
    monkeypatch.setattr(weights, "_part", lambda part: model)
    assert weights.vae().channels_last is (dtype == torch.bfloat16)
    before = [parameter.data_ptr() for parameter in model.vae.parameters()]
    assert [parameter.data_ptr() for parameter in weights.vae().parameters()] == before


@pytest.mark.parametrize("size", [(16, 24), (20, 18)])
def test_fast_convolutions_change_nothing_but_rounding(unet: UNet, size: tuple[int, int]) -> None:
    text, vector = conditions()
    prepared: Prepared = unet.prepare(text, vector)
    x, shifts = torch.randn(1, 4, *size), at(unet, 700, prepared)
    expected = unet.step(x, shifts, prepared)
    try:
        unet.compute_fast()
        made = unet.step(x, shifts, prepared)
    finally:
        unet.compute_fast(False)
    assert made.is_contiguous()
    assert not torch.equal(made, expected), "another way was taken"
    assert (
        relative(made, expected) < 3e-5
    )  # the largest of all pixels; Winograd rounds about three times as much


@pytest.mark.slow
def test_compiled_blocks_change_nothing_but_rounding(unet: UNet) -> None:
    """Traced whole and run without a code generator, which not every machine has."""
    import torch._dynamo  # seconds, which the other tests need not wait

    torch._dynamo.reset()
    compiled = copy.deepcopy(unet)
    compiled.compile_blocks(backend="eager")
    text, vector = conditions()
    x, prepared = torch.randn(1, 4, 8, 8), [network.prepare(text, vector) for network in (compiled, unet)]
    made = compiled.step(x, at(compiled, 700, prepared[0]), prepared[0])
    assert relative(made, unet.step(x, at(unet, 700, prepared[1]), prepared[1])) < 1e-5
    kinds = torch._dynamo.utils.counters
    assert kinds["stats"]["unique_graphs"] > 0
    assert not kinds["graph_break"]


@pytest.mark.slow
def test_no_kind_of_block_of_the_released_structure_goes_back_to_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has more kinds of blocks, in two sizes of picture, than torch compiles of one method by default."""
    import torch._dynamo

    torch._dynamo.reset()
    settings = torch._dynamo.config
    name = "fail_on_recompile_limit_hit"
    monkeypatch.setattr(settings, name if hasattr(settings, name) else "fail_on_cache_limit_hit", True)
    released = replace(CONFIGS["base"].unet, model_channels=32, num_head_channels=32, context_dim=32)
    unet = UNet(
        replace(released, adm_in_channels=32, transformer_depth=(0, 1, 1), transformer_depth_middle=1)
    )
    unet.requires_grad_(False).compile_blocks(backend="eager")
    prepared = unet.prepare(torch.randn(2, 7, 32), torch.randn(2, 32))
    for size in ((8, 8), (12, 16)):
        unet.step(torch.randn(1, 4, *size), at(unet, 700, prepared), prepared)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 16

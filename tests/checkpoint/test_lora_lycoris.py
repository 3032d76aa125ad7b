"""LoRA files that the lycoris-lora package writes do to our model what the package does to diffusers' networks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lycoris.kohya
import pytest
import torch

from sdxl_cli.checkpoint.lora import WornLora
from sdxl_cli.model.sdxl import SDXL
from tests.checkpoint.lora_peers import (
    BOUND,
    VISIBLE,
    Outputs,
    Theirs,
    fitted,
    our_model,
    our_outputs,
    worn,
)
from tests.model.peers import relative

EVERYTHING = "every layer"
PRESETS = {
    EVERYTHING: {
        "enable_conv": True,
        "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
        "unet_target_name": ["conv_in$", "conv_out$", "time_embedding.linear_1", "add_embedding.linear_2"],
        "text_encoder_target_module": ["CLIPEncoderLayer"],
        "text_encoder_target_name": ["text_projection"],
    }
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "LoCon": {"algo": "locon", "conv_dim": 3, "conv_alpha": 2},
    "LoCon in Tucker form": {"algo": "locon", "conv_dim": 3, "use_tucker": True},
    "LoCon with a scalar": {"algo": "locon", "use_scalar": True},
    "rank-stabilised": {"algo": "locon", "rs_lora": True},
    "LoHa": {"algo": "loha", "conv_dim": 3},
    "LoHa in Tucker form": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr in Tucker form": {"algo": "lokr", "factor": 2, "use_tucker": True},
    "LoKr, both decomposed": {"algo": "lokr", "network_dim": 1, "conv_dim": 1, "decompose_both": True},
    "LoKr in full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "DoRA": {"algo": "locon", "dora_wd": True, "wd_on_output": True},
    "DoRA on the inputs": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "LoHa with DoRA": {"algo": "loha", "dora_wd": True},
    "full, and norms": {"algo": "full", "train_norm": True},
    "GLoRA": {"algo": "glora"},
    "IA3": {"algo": "ia3"},
    "OFT": {"algo": "diag-oft", "network_dim": 4},
    "OFT with limit and rescaling": {
        "algo": "diag-oft",
        "network_dim": 4,
        "constraint": 0.001,
        "rescaled": True,
    },
    "BOFT": {"algo": "boft", "network_dim": 6},
}


@pytest.fixture(scope="module")
def model() -> SDXL:
    return our_model()


@pytest.fixture(scope="module")
def plain(model: SDXL) -> Outputs:
    return our_outputs(model)


def written(name: str, theirs: Theirs, path: Path) -> Any:
    """Adapt their networks by lycoris-lora with random values, and let it write the file."""
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    lycoris.kohya.PRESET.update(PRESETS)
    torch.manual_seed(0)
    options = {"preset": EVERYTHING, "network_dim": 4, "network_alpha": 2.0, **ALGORITHMS[name]}
    network = lycoris.kohya.create_network(
        1.0,
        options.pop("network_dim"),
        options.pop("network_alpha"),
        None,
        [theirs.clip_l, theirs.big_g],
        theirs.unet,
        **options,
    )
    network.apply_to([theirs.clip_l, theirs.big_g], theirs.unet, True, True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "dora_scale" in key or "rescale" in key:
                parameter.mul_(1 + 0.2 * noise)
            elif "scalar" in key:
                parameter.fill_(0.7)
            elif (network.loras and "diff" in key) or options["algo"] == "full":
                parameter.add_(noise * 0.03)
            else:
                parameter.add_(noise * STD.get(options["algo"], 0.2))
            parameter.data = parameter.data.contiguous()
    network.save_weights(str(path), None, {})
    return network


STD = {"lokr": 0.1, "diag-oft": 0.1, "boft": 0.05, "ia3": 0.2, "loha": 0.3, "glora": 0.1}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_change_is_that_of_lycoris(name: str, model: SDXL, plain: Outputs, tmp_path: Path) -> None:
    theirs = Theirs(model)
    path = tmp_path / "lora.safetensors"
    network = written(name, theirs, path)
    found = fitted(path, model)
    assert found.unmatched == ()
    assert found.total == len(network.text_encoder_loras) + len(network.unet_loras)
    for ours, expected, before in zip(
        our_outputs(worn(model, WornLora(found, 1.0, 1.0))), theirs.outputs(), plain, strict=True
    ):
        assert relative(ours, expected) < BOUND
        assert relative(ours, before) > VISIBLE

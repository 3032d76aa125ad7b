"""Sizes that do not halve evenly: the original refuses them, diffusers and ComfyUI take them."""

from __future__ import annotations

import pytest
import torch

from sdxl_cli.checkpoint.layouts import unet_to_diffusers
from sdxl_cli.model.config import UNetConfig
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.unet import UNet

CONFIG = UNetConfig(
    model_channels=16,
    num_res_blocks=1,
    transformer_depth=(0, 1, 1),
    transformer_depth_middle=1,
    num_head_channels=8,
    context_dim=24,
    adm_in_channels=48 + 6 * 32,
    norm_groups=4,
)


@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 11), (5, 6), (1, 3)])
def test_any_size_gives_what_diffusers_gives(size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    ours = UNet(CONFIG).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=1,
        attention_head_dim=[2, 4, 8],
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=CONFIG.adm_in_channels,
        norm_num_groups=4,
    ).eval()
    state = ours.state_dict()
    plan = unet_to_diffusers(state, CONFIG)
    theirs.load_state_dict({name: state[source.keys[0]] for name, source in plan.items()})
    x, context, pooled = torch.randn(2, 4, *size), torch.randn(2, 7, 24), torch.randn(2, 48)
    numbers, t = torch.tensor([[64.0, 96, 0, 8, 64, 96]] * 2), torch.tensor([999, 3])
    with torch.no_grad():
        added = {"text_embeds": pooled, "time_ids": numbers}
        expected = theirs(x, t, context, added_cond_kwargs=added).sample
        y = torch.cat([pooled, sinusoidal(numbers.flatten(), 32).view(2, -1)], dim=1)
        assert torch.allclose(
            ours(x, t, context, y), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
        )

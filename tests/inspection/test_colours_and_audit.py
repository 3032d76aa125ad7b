"""The linear map from latents to colours, and the largest numbers of a network's layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sdxl_cli.generation.preview import LatentColours, fit_colours
from sdxl_cli.inspection.audit import audit_decoder, audit_unet, audit_vae
from sdxl_cli.inspection.colours import ColourFit
from sdxl_cli.model.vae import Autoencoder


def test_a_linear_map_is_found_again_with_all_of_the_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    fit = ColourFit(4)
    for size in ((8, 8), (4, 12)):
        latent = torch.randn(4, *size, generator=generator)
        small = torch.einsum("zhw,zc->chw", latent, weight) + bias[:, None, None]
        fit.add(latent, small.repeat_interleave(8, 1).repeat_interleave(8, 2))
    found = fit.report(LatentColours(torch.zeros(4, 3), bias))
    torch.testing.assert_close(torch.tensor(found.weight), weight)
    torch.testing.assert_close(torch.tensor(found.bias), bias)
    assert (found.positions, found.r2) == (112, pytest.approx(1))
    # a map that says the same everywhere explains nothing, less what it is off the mean by
    assert found.preview_r2 is not None
    assert found.preview_r2 < 0


def test_the_share_of_variance_is_that_of_least_squares_over_everything_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(4, 6, 6, generator=generator) + 3 for _ in range(5)]
    images = [torch.randn(3, 12, 12, generator=generator) for _ in range(5)]
    images = [
        image + 2 * latent[:3].repeat_interleave(2, 1).repeat_interleave(2, 2)
        for image, latent in zip(images, latents, strict=True)
    ]
    fit = ColourFit(4)
    for latent, image in zip(latents, images, strict=True):
        fit.add(latent, image)
    small = torch.cat(
        [torch.nn.functional.avg_pool2d(i[None], 2)[0].flatten(1) for i in images], 1
    ).T.double()
    inputs = torch.cat([latent.flatten(1) for latent in latents], 1).T.double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
    residual = small - inputs @ torch.linalg.lstsq(inputs, small).solution
    total = small - small.mean(0)
    found = fit.report(None)
    assert found.r2 == pytest.approx(1 - float(residual.square().sum() / total.square().sum()), rel=1e-6)
    expected = (1 - residual.square().sum(0) / total.square().sum(0)).tolist()
    assert list(found.r2_rgb) == pytest.approx(expected, rel=1e-6)
    assert found.preview_r2 is None


def test_the_map_of_previews_is_measured_on_these_pictures(vae: Autoencoder) -> None:
    generator = torch.Generator().manual_seed(0)
    fit = ColourFit(4)
    for _ in range(3):
        image = torch.nn.functional.interpolate(
            torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1, (64, 64)
        )[0]
        with torch.no_grad():
            fit.add(vae.to_latent(vae.encode(image[None]).mode())[0], image)
    found = fit.report(fit_colours(vae))
    assert found.preview_r2 is not None
    assert found.preview_r2 < found.r2 <= 1


def test_the_largest_output_of_every_layer_is_what_the_layer_gives(vae: Autoencoder) -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = {layer.name: layer for layer in audit_vae(vae, [("dark", image * 0.1), ("light", image)]).layers}
    with torch.no_grad():
        first = vae.encoder.conv_in(image[None])
        dark = vae.encoder.conv_in(image[None] * 0.1)
    assert found["encoder.conv_in"].largest == max(float(first.abs().max()), float(dark.abs().max()))
    assert found["encoder.conv_in"].kind == "Conv2d"
    with torch.no_grad():
        moments = vae.quant_conv(vae.encoder(image[None]))
    assert found["quant_conv"].largest >= float(moments.abs().max())
    # what a block only hands on from its last layer is not said twice
    assert "decoder.conv_out" in found
    assert "decoder" not in found


def test_a_layer_that_leaves_fp16_is_named(vae: Autoencoder) -> None:
    from copy import deepcopy

    loud = deepcopy(vae)
    loud.decoder.conv_out.bias.data.fill_(70_000.0)
    found = audit_decoder(loud, [("x", torch.randn(4, 4, 4))])
    assert found.overflowing == ("decoder.conv_out",)
    assert found.loudest(1)[0].name == "decoder.conv_out"
    assert "bf16 or fp32" in found.verdict
    loud.decoder.conv_in.bias.data.fill_(math.nan)
    found = audit_decoder(loud, [("x", torch.randn(4, 4, 4))])
    assert "decoder.conv_in" in found.overflowing


def test_where_a_network_was_loudest_is_said() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False))
    network[0].weight.data.fill_(2.0)
    points = [(f"t={t}", torch.full((1, 1), float(t)), 1.0) for t in (1, 30000, 40000, 7)]
    found = audit_unet(network, lambda x, _: network(x), points)
    (layer,) = found.layers
    assert (layer.largest, layer.at, layer.overflows, found.runs) == (80_000.0, "t=40000", True, 4)

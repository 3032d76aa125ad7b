"""The autoencoder's training: growing by a level, normalised latents, crops, learning."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl_cli.errors import UsageError
from sdxl_cli.model.config import VAEConfig
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.growing import grow
from sdxl_cli.training.latents import latent_statistics, normalize_latents
from sdxl_cli.training.vae_task import VAETask, fresh
from tests.training.small import vae_config

F4 = VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=2)
F8 = replace(F4, channel_mult=(1, 2, 2, 2))


def random_vae(config: VAEConfig, seed: int = 0) -> Autoencoder:
    """Weights that differ in every tensor."""
    torch.manual_seed(seed)
    vae = Autoencoder(config)
    for name, parameter in vae.named_parameters():
        noise = torch.randn_like(parameter)
        scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
        parameter.data = noise * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return vae.requires_grad_(False)


def images(count: int, side: int = 64) -> Tensor:
    """Smooth pictures [count, 3, side, side] within -1 … 1."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return F.interpolate(coarse, size=side, mode="bilinear")


@pytest.fixture
def pair() -> tuple[Autoencoder, Autoencoder]:
    small, large = random_vae(F4), random_vae(F8, 1)
    grow(large, small.state_dict(), F4)
    return small, large


def encoder_head(vae: Autoencoder, x: Tensor) -> Tensor:
    """What is in front of the encoder's middle."""
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for stage in encoder.down:
        x = stage(x)
    return x


def encoder_tail(vae: Autoencoder, hidden: Tensor) -> Tensor:
    """From there to the moments [B, 2z, h, w]."""
    encoder = vae.encoder
    return vae.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(hidden)))))


def test_a_grown_encoder_is_the_small_one_with_features_averaged_before_its_middle(
    pair: tuple[Autoencoder, Autoencoder],
) -> None:
    small, large = pair
    image = images(2)
    expected = encoder_tail(small, F.avg_pool2d(encoder_head(small, image), 2))
    moments = large.encode(image)
    torch.testing.assert_close(torch.cat([moments.mean, moments.logvar], 1), expected, rtol=1e-4, atol=1e-4)


def test_a_grown_decoder_is_the_small_one_with_features_doubled_behind_its_middle(
    pair: tuple[Autoencoder, Autoencoder],
) -> None:
    small, large = pair
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoder = small.decoder
    x = decoder.mid(decoder.conv_in(small.post_quant_conv(z)))
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    for stage in reversed(decoder.up):
        x = stage(x)
    expected = decoder.conv_out(F.silu(decoder.norm_out(x)))
    torch.testing.assert_close(large.decode(z), expected, rtol=1e-4, atol=1e-4)


def test_where_the_deepest_features_are_smooth_a_grown_encoder_sees_what_the_small_one_sees(
    pair: tuple[Autoencoder, Autoencoder],
) -> None:
    """Features that repeat in 2x2 blocks lose nothing by averaging: each stands for its block."""
    _, large = pair
    features = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    doubled = F.interpolate(features, scale_factor=2, mode="nearest")
    torch.testing.assert_close(large.encoder.down[2].downsample(doubled), features)
    assert torch.equal(large.encoder.down[3](features), features)
    for stage in (large.decoder.up[3].block, large.decoder.up[3].upsample):
        features = stage[1](stage[0](features)) if stage is large.decoder.up[3].block else stage(features)
    torch.testing.assert_close(features, doubled)


def test_a_grown_autoencoder_can_learn_everywhere(pair: tuple[Autoencoder, Autoencoder]) -> None:
    """Identity blocks must not be stuck at their zeros."""
    _, large = pair
    large.requires_grad_(True)
    output = large.decode(large.encode(images(1)).mode())
    output.square().sum().backward()  # type: ignore[no-untyped-call]
    for name in (
        "encoder.down.3.block.0.conv2",
        "decoder.up.3.block.0.conv2",
        "encoder.down.2.downsample.conv",
    ):
        gradient = large.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize(
    "config",
    [
        replace(F8, channel_mult=(1, 1, 2, 2)),
        replace(F8, channel_mult=(1, 2, 2, 4)),
        replace(F8, channels=16, norm_groups=2),
        replace(F8, num_res_blocks=2),
    ],
)
def test_what_does_not_fit_is_not_grown(config: VAEConfig) -> None:
    with pytest.raises(UsageError, match="grows only by levels"):
        grow(Autoencoder(config), random_vae(F4).state_dict(), F4)


def test_normalising_latents_changes_no_reconstruction() -> None:
    vae = random_vae(F4)
    pictures = list(images(6, 32))
    before = [vae.encode(image[None]) for image in pictures]
    decoded = [vae.decode(moments.mode()) for moments in before]
    found = latent_statistics(vae, pictures)
    normalize_latents(vae, found)
    after = [vae.encode(image[None]) for image in pictures]
    for moments, old, picture in zip(after, before, decoded, strict=True):
        torch.testing.assert_close(vae.decode(moments.mode()), picture, rtol=1e-4, atol=1e-4)
        gain = 1 / (torch.tensor(found.channel_std) * vae.config.scale_factor).view(1, -1, 1, 1)
        shift = torch.tensor(found.channel_mean).view(1, -1, 1, 1)
        torch.testing.assert_close(moments.mean, (old.mean - shift) * gain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.logvar, old.logvar + 2 * gain.log(), rtol=1e-4, atol=1e-4)


def test_normalised_latents_times_the_scale_factor_have_mean_0_and_deviation_1() -> None:
    vae = random_vae(F4)
    pictures = list(images(6, 32))
    normalize_latents(vae, latent_statistics(vae, pictures))
    found = latent_statistics(vae, pictures)
    scale = vae.config.scale_factor
    assert [mean * scale for mean in found.channel_mean] == pytest.approx([0] * 4, abs=1e-4)
    assert [std * scale for std in found.channel_std] == pytest.approx([1] * 4, rel=1e-4)
    assert found.scale_factor == pytest.approx(scale, rel=1e-3)


def test_latent_statistics_are_those_of_all_values_together() -> None:
    vae = random_vae(F4)
    pictures = [*images(2, 32), *images(1, 64)]
    found = latent_statistics(vae, pictures, seed=3)
    generator = torch.Generator().manual_seed(3)
    values = []
    for picture in pictures:
        moments = vae.encode(picture[None])
        values.append(moments.sample(torch.randn(moments.mean.shape, generator=generator))[0].flatten(1))
    together = torch.cat(values, dim=1).double()
    assert found.channel_mean == pytest.approx(together.mean(1).tolist())
    assert found.channel_std == pytest.approx(together.std(1, correction=0).tolist())
    assert found.values == together.numel()
    assert found.mean == pytest.approx(float(together.mean()))
    # latent diffusion's scale_by_std: 1 / z.flatten().std()
    assert found.scale_factor == pytest.approx(1 / float(together.flatten().std()), rel=1e-9)


def test_crops_come_from_everywhere_and_in_the_asked_proportion() -> None:
    task = VAETask(Autoencoder(F4), list(images(3, 64)), vae_config(crop_weights=(0.75, 0.25)))
    sides = []
    for seed in range(200):
        batch = task._draw(0, torch.Generator().manual_seed(seed)).image
        sides.append(batch.shape[-1])
        assert len(batch) == 2048 // batch.shape[-1] ** 2 or len(batch) == 1
    assert 0.65 < sides.count(32) / len(sides) < 0.85


def test_a_step_depends_on_its_generator_alone() -> None:
    vae = fresh(Autoencoder(F4))
    task = VAETask(vae, list(images(3, 64)), vae_config())
    losses = {task.step(4, torch.Generator().manual_seed(8))[0].item() for _ in range(2)}
    torch.manual_seed(123)
    losses.add(task.step(5, torch.Generator().manual_seed(8))[0].item())
    assert len(losses) == 1

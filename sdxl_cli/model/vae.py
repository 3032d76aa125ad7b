"""The KL autoencoder (paper section 2.4). Parameter names are those of the released single file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from sdxl_kernels.attention import attention
from sdxl_kernels.convolution import downsample_conv_asymmetric, upsample_conv
from sdxl_kernels.normalization import group_norm, group_norm_silu
from torch import Tensor, nn

from sdxl_cli.model.config import VAEConfig

EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, slots=True)
class Moments:
    """The posterior: a diagonal Gaussian over unscaled latents."""

    mean: Tensor
    """[B, z, h, w]."""
    logvar: Tensor
    """[B, z, h, w], clamped to -30 … 20."""

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std · noise, for standard normal noise [B, z, h, w]."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def mode(self) -> Tensor:
        """The most likely latent."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats per image [B]."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(dim=1)


class ResnetBlock(nn.Module):
    """GN-SiLU-conv twice, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H, W]."""
        hidden = self.conv1(_norm_silu(self.norm1, x))
        hidden = self.conv2(_norm_silu(self.norm2, hidden))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return skip + hidden if torch.is_grad_enabled() else hidden.add_(skip)


class AttnBlock(nn.Module):
    """Self-attention over all pixels with a single head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        norm = self.norm
        normed = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        q, k, v = (
            rearrange(p(normed), "b c h w -> b 1 (h w) c").contiguous() for p in (self.q, self.k, self.v)
        )
        out = rearrange(attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(out)


class Middle(nn.Module):
    """The lowest resolution: residual, attention, residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        # padded on two sides only: the released VAE was trained so
        return downsample_conv_asymmetric(x, self.conv.weight, self.conv.bias)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_conv(x, self.conv.weight, self.conv.bias)


class Level(nn.Module):
    """The residual blocks of one resolution, and its resampling where it has one."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResnetBlock(width, out_channels, groups) for width in widths)

    def steps(self) -> Iterator[nn.Module]:
        """What is done, in order. Whoever does it one by one keeps nothing but the last result in memory."""
        yield from self.block
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                yield getattr(self, name)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H', W']."""
        for step in self.steps():
            x = step(x)
        return x


def _steps(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    for level in levels:
        assert isinstance(level, Level)
        yield from level.steps()


class Encoder(nn.Module):
    """Image to moments."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, _widths(config)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            stage = Level(before, width, config.num_res_blocks, groups)
            if level < len(widths) - 1:
                stage.downsample = Downsample(width)
            self.down.append(stage)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2z, H/8, W/8]."""
        x = self.conv_in(x)
        for step in _steps(self.down):
            x = step(x)
        return self.conv_out(_norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Latent to image."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, _widths(config)
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        # the released names count levels from full resolution: up.0 runs last
        stages = []
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            stage = Level(before, width, config.num_res_blocks + 1, groups)
            if level:
                stage.upsample = Upsample(width)
            stages.append(stage)
        self.up = nn.ModuleList(stages)
        self.norm_out = nn.GroupNorm(groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """[B, z, h, w] -> [B, 3, 8h, 8w]."""
        x = self.mid(self.conv_in(z))
        for step in _steps(reversed(self.up)):
            x = step(x)
        return self.conv_out(_norm_silu(self.norm_out, x))


class Autoencoder(nn.Module):
    """Images of -1 … 1 to unscaled latents and back."""

    channels_last = False
    """Whether pixels have channels last in memory; see :meth:`lay_channels_last`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        z = config.z_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, image: Tensor) -> Moments:
        """[B, 3, H, W] in -1 … 1, sides multiples of the downsampling factor -> moments [B, z, H/8, W/8]."""
        moments = self.quant_conv(self.encoder(self._laid(image))).contiguous()
        mean, logvar = moments.chunk(2, dim=1)
        return Moments(mean, logvar.clamp(*LOGVAR_RANGE))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents [B, z, h, w] -> images [B, 3, 8h, 8w], about -1 … 1, not clamped."""
        return self.decoder(self.post_quant_conv(self._laid(z))).contiguous()

    def lay_channels_last(self) -> None:
        """As of :class:`sdxl_cli.model.unet.UNet`."""
        self.channels_last = True
        self.to(memory_format=torch.channels_last)

    def _laid(self, x: Tensor) -> Tensor:
        last = self.channels_last and not torch.is_grad_enabled()
        return x.contiguous(memory_format=torch.channels_last) if last else x

    def to_latent(self, z: Tensor) -> Tensor:
        """Scale a posterior sample to the variance the U-Net works in."""
        return z * self.config.scale_factor

    def from_latent(self, latent: Tensor) -> Tensor:
        """The inverse of :meth:`to_latent`."""
        return latent / self.config.scale_factor


def _widths(config: VAEConfig) -> list[int]:
    return [config.channels * mult for mult in config.channel_mult]


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

"""The denoising U-Net (paper section 2.1). Parameter names are those of the released single file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from sdxl_kernels import strips
from sdxl_kernels.convolution import downsample_conv, upsample_conv
from sdxl_kernels.feedforward import gated, geglu
from sdxl_kernels.normalization import group_norm, group_norm_silu
from torch import Tensor, nn
from torch.nn.functional import silu

from sdxl_cli.model.attention import Attention, KeysValues
from sdxl_cli.model.config import UNetConfig
from sdxl_cli.model.embedding import sinusoidal
from sdxl_cli.model.prepacked import PrepackedLinear

RES_EPS = 1e-5
TRANSFORMER_EPS = (
    1e-6  # the transformer's entry norm differs from the residual blocks' (sgm attention.py Normalize)
)


@dataclass(frozen=True, slots=True)
class Shift:
    """What the embedding adds in a residual block, computed beforehand; for inference."""

    values: Tensor
    """[k·B, D]."""


class ResBlock(nn.Module):
    """GN-SiLU-conv, plus the time embedding, GN-SiLU-conv, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels, RES_EPS),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels, RES_EPS),
            nn.SiLU(),
            nn.Dropout(0.0),  # keeps the released names: the convolution is out_layers.3
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.fast = False
        """Whether convolutions may be computed by Winograd's algorithm; for inference on a CPU."""
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor | Shift) -> Tensor:
        """[B, C, H, W] and the activated embedding [k·B, E], or what it adds -> [k·B, D, H, W].

        Up to where the embedding comes in, what k rows have in common is computed once.
        """
        shift = emb.values if isinstance(emb, Shift) else self.emb_layers[1](emb)
        if self.fast and not torch.is_grad_enabled():
            return self._channels_last(x, shift)
        hidden = self.in_layers[2](_norm_silu(self.in_layers[0], x))
        hidden = _rows(hidden, len(shift)) + shift[:, :, None, None]
        hidden = self.out_layers[3](_norm_silu(self.out_layers[0], hidden))
        return _rows(self.skip_connection(x), len(shift)) + hidden

    def _channels_last(self, x: Tensor, shift: Tensor) -> Tensor:
        hidden = _fast_conv(self.in_layers, x)
        hidden = _rows(hidden, len(shift)).add_(shift[:, None, None, :])
        hidden = _fast_conv(self.out_layers, rearrange(hidden, "b h w c -> b c h w"))
        return rearrange(hidden, "b h w c -> b c h w").add_(_rows(self.skip_connection(x), len(shift)))


class GEGLU(nn.Module):
    """The gated half of the feed-forward network."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj: nn.Linear | PrepackedLinear = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, inner]."""
        if isinstance(self.proj, PrepackedLinear):
            return gated(self.proj(x))
        return geglu(x, self.proj.weight, self.proj.bias)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Dropout(0.0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.net(x)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What stays the same from step to step; for inference."""

    label: Tensor
    """The embedding of pooled text and micro-conditions [B, E]."""
    keys_values: Mapping[nn.Module, KeysValues]
    """By transformer block. Of the last rows only, when the text of the first ones is all zeros."""


Context = Tensor | Prepared
"""Text features [B, S, ctx], or what was made of them."""
Embedding = Tensor | Mapping[nn.Module, Shift]
"""The activated embedding of timestep and label [B, E], or what it adds in each residual block."""


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each pre-normed and residual."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, head_width)
        self.attn2 = Attention(width, context_width, head_width)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, L, C] and the context of B rows -> [B, L, C]."""
        normed = self.norm1(x)
        x = x + self.attn1.of_itself(normed)
        if isinstance(context, Prepared):
            x = self._told(x, context.keys_values[self])
        else:
            x = x + self.attn2(self.norm2(x), self.attn2.read(context))
        return x + self.ff(self.norm3(x))

    def _told(self, x: Tensor, told: KeysValues) -> Tensor:
        """Cross-attention of the last rows, in place; the text of the first ones is all zeros.

        Zeros have zero keys and values, and the average of zero values is zero: what remains is a bias.
        """
        bare = len(x) - len(told.keys)
        x[:bare] += self.attn2.to_out.get_parameter("0.bias")
        x[bare:] += self.attn2(self.norm2(x[bare:]), told)
        return x


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a residual."""

    def __init__(self, width: int, depth: int, context_width: int, head_width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, context_width, head_width) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, C, H, W] and the context of B rows -> [B, C, H, W]."""
        norm = self.norm
        tokens = group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        tokens = self.proj_in(rearrange(tokens, "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=x.shape[2]) + x


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2], rounded up."""
        return downsample_conv(x, self.op.weight, self.op.bias)


class Upsample(nn.Module):
    """Doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

        self.fast = False
        """As of :class:`ResBlock`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, C, H, W] -> [B, C, *size], where each of ``size`` is twice H or W, or one less."""
        if self.fast and not torch.is_grad_enabled() and size == (2 * x.shape[2], 2 * x.shape[3]):
            assert self.conv.bias is not None
            pixels = rearrange(x, "b c h w -> b h w c").contiguous()
            made = strips.upsample_conv(pixels, self.conv.weight, self.conv.bias, winograd=True)
            return rearrange(made, "b h w c -> b c h w")
        return upsample_conv(x, self.conv.weight, self.conv.bias, size)


class UNet(nn.Module):
    """Predicts the noise (or v) in a latent, given timestep, text features and the conditioning vector."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.fast = self.channels_last = False
        self.config = config
        width, emb = config.model_channels, 4 * config.model_channels
        self.time_embed = _mlp(width, emb)
        self.label_emb = nn.Sequential(_mlp(config.adm_in_channels, emb))
        self.input_blocks, skips = _input_blocks(config)
        deepest = skips[-1]
        self.middle_block = nn.Sequential(
            ResBlock(deepest, deepest, emb, config.norm_groups),
            _transformer(config, deepest, config.transformer_depth_middle),
            ResBlock(deepest, deepest, emb, config.norm_groups),
        )
        self.output_blocks = _output_blocks(config, skips)
        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, width, RES_EPS),
            nn.SiLU(),
            nn.Conv2d(width, config.out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, y: Tensor) -> Tensor:
        """One evaluation of the network.

        Args:
            x: noisy latents, scaled to unit variance [B, in, h, w]; any size, as in diffusers (the
                original takes multiples of 2^(levels - 1) only).
            timesteps: integer noise levels 0 … 999 [B].
            context: text features [B, T, context_dim].
            y: pooled text and micro-conditions [B, adm_in_channels].

        Returns:
            The prediction [B, out, h, w].
        """
        features = sinusoidal(timesteps, self.config.model_channels).to(x.dtype)
        # every residual block activates the embedding first: once is enough
        return self._evaluate(x, silu(self.time_embed(features) + self.label_emb(y)), context)

    def prepare(self, context: Tensor, y: Tensor) -> Prepared:
        """Compute what is the same at every step, once.

        Args:
            context: text features [B, T, context_dim]. When those of the first rows are all zeros (the released
                base's negative prompt), these rows are left out of cross-attention, which is exact.
            y: pooled text and micro-conditions [B, adm_in_channels].
        """
        zeros = (context == 0).flatten(1).all(dim=1).tolist()
        bare = zeros.index(False) if False in zeros else len(zeros)
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return Prepared(self.label_emb(y), {block: block.attn2.read(context[bare:]) for block in blocks})

    def shifts(self, timesteps: Tensor, prepared: Prepared) -> Tensor:
        """Compute what does not depend on the latents, of many steps at once.

        Args:
            timesteps: integer noise levels [n, 1], or of every row its own [n, B].
            prepared: of B rows.

        Returns:
            [n, B, sum of the residual blocks' channels]: what each step adds in each block, in their order.
        """
        label = prepared.label
        features = sinusoidal(timesteps.flatten(), self.config.model_channels).to(label.dtype)
        emb = silu(self.time_embed(features).unflatten(0, timesteps.shape) + label)
        return torch.cat([block.emb_layers[1](emb) for block in self._residual_blocks()], dim=-1)

    def step(self, x: Tensor, shifts: Tensor, prepared: Prepared) -> Tensor:
        """One evaluation, as :meth:`forward`, with what was prepared for k·B rows; inference only.

        Args:
            x: [B, in, h, w]. With k = 2, both sides of guidance read the same latents, and what comes before the
                first condition is computed once.
            shifts: the timestep's of :meth:`shifts`, of k·B rows.
            prepared: of k·B rows: the B latents under the first conditions, then under the next.

        Returns:
            [k·B, out, h, w].
        """
        blocks = self._residual_blocks()
        parts = shifts.split([block.out_layers[3].out_channels for block in blocks], dim=-1)  # type: ignore[no-untyped-call]
        return self._evaluate(x, dict(zip(blocks, map(Shift, parts), strict=True)), prepared)

    def compute_fast(self, fast: bool = True) -> None:
        """Let convolutions be computed with fewer multiplications, channels last in memory; for inference on a CPU."""
        self.fast = fast
        for module in self.modules():
            if isinstance(module, ResBlock | Upsample):
                module.fast = fast

    def lay_channels_last(self) -> None:
        """Keep kernels, and from now on pixels, with channels last in memory; for inference on a GPU.

        Tokens are then the same memory as pixels. Worth it where group norms leave it so: see
        :func:`sdxl_kernels.cuda_norm.ready`.
        """
        self.channels_last = True
        self.to(memory_format=torch.channels_last)

    def join_projections(self) -> None:
        """Let tokens' own attention have one projection, layer by layer; see ``Attention.join``."""
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                module.attn1.join()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch compile the blocks, each kind once per shape, at their first call; ``backend`` is torch's."""
        _allow_kinds(COMPILED_KINDS)
        for module in self.modules():
            if isinstance(module, ResBlock | Attention | FeedForward):
                module.compile(backend=backend)

    def _residual_blocks(self) -> list[ResBlock]:
        groups = (*self.input_blocks, self.middle_block, *self.output_blocks)
        return [layer for group in groups for layer in group.children() if isinstance(layer, ResBlock)]

    def _evaluate(self, x: Tensor, emb: Embedding, context: Context) -> Tensor:
        if (self.fast or self.channels_last) and not torch.is_grad_enabled():
            x = x.contiguous(memory_format=torch.channels_last)  # tokens are then the same memory as pixels
        skips = []
        for block in self.input_blocks:
            x = _run(block, x, emb, context)
            skips.append(x)
        x = _run(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            joined = torch.cat([x, _rows(skips.pop(), len(x))], dim=1)
            height, width = (skips[-1] if skips else x).shape[2:]
            x = _run(block, joined, emb, context, (height, width))
        return self.out[2](_norm_silu(self.out[0], x)).contiguous()


SILU_GAIN = 1.68
"""1 / sqrt(E[silu(x)²]) for standard normal x: weights this much larger keep a layer's variance behind a SiLU."""


@torch.no_grad()
def initialize(unet: UNet, pooled: int) -> None:
    """Starting values for training from nothing.

    Every residual branch, and the output, begins at zero, as in the original (sgm zero_module). The layers that
    bring in timestep, micro-conditions and pooled text keep the variance of what they read, the pooled text counting
    as much as all micro-conditions together: with torch's default, prompts differ by a hundredth of an activation.

    Args:
        unet: changed in place.
        pooled: width of the pooled text, the first part of the conditioning vector.
    """
    for module in unet.modules():
        last = {ResBlock: "out_layers.3", SpatialTransformer: "proj_out", UNet: "out.2"}.get(type(module))
        if last:
            for parameter in module.get_submodule(last).parameters():
                nn.init.zeros_(parameter)
        if isinstance(module, ResBlock):
            _keep_variance(module.emb_layers.get_parameter("1.weight"), SILU_GAIN)
    label = unet.label_emb.get_submodule("0")
    _keep_variance(label.get_parameter("0.weight")[:, :pooled], 1.0)
    _keep_variance(label.get_parameter("0.weight")[:, pooled:], 1.0)
    for mlp in (label, unet.time_embed):
        _keep_variance(mlp.get_parameter("2.weight"), SILU_GAIN)


COMPILED_KINDS = 128
"""Versions of one method that torch may compile: the released U-Net has 12 kinds of residual blocks, for each shape."""


def _allow_kinds(kinds: int) -> None:
    """Raise torch's limit, behind which it goes back to uncompiled code with no more than a warning."""
    import torch._dynamo.config as settings  # the compiler's: seconds, which others need not wait

    name = (
        "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
    )  # before torch 2.7
    setattr(settings, name, max(kinds, getattr(settings, name)))


def _keep_variance(weight: Tensor, gain: float) -> None:
    nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)


def _run(
    block: nn.Module, x: Tensor, emb: Embedding, context: Context, size: tuple[int, int] | None = None
) -> Tensor:
    """``size`` is what the next skip connection has, which an upsampling layer has to meet."""
    for layer in block.children():
        match layer:
            case ResBlock():
                x = layer(x, emb if isinstance(emb, Tensor) else emb[layer])
            case SpatialTransformer():
                x = layer(x, context)
            case Upsample():
                x = layer(x, size)
            case _:
                x = layer(x)
    return x


def _fast_conv(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Norm, SiLU and the last layer, a convolution: [B, C, H, W] -> [B, H, W, D]."""
    norm, conv = layers[0], layers[-1]
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    first = strips.Norm(norm.num_groups, norm.weight, norm.bias, norm.eps)
    # no copy, but for the first: everything else comes channels last already
    pixels = rearrange(x, "b c h w -> b h w c").contiguous()
    return strips.conv3x3(pixels, conv.weight, conv.bias, norm=first, winograd=True)


def _rows(x: Tensor, count: int) -> Tensor:
    """Repeat a batch until it has ``count`` rows; unlike ``repeat``, which would put channels first."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(norm, nn.GroupNorm)
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def _transformer(config: UNetConfig, width: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(width, depth, config.context_dim, config.num_head_channels, config.norm_groups)


def _level(config: UNetConfig, level: int, in_channels: int) -> list[nn.Module]:
    """A residual block of a level, and its transformer where the level has one."""
    width = config.model_channels * config.channel_mult[level]
    layers: list[nn.Module] = [ResBlock(in_channels, width, 4 * config.model_channels, config.norm_groups)]
    if depth := config.transformer_depth[level]:
        layers.append(_transformer(config, width, depth))
    return layers


def _input_blocks(config: UNetConfig) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the width of every block's output, for the skip connections."""
    width = config.model_channels
    blocks = [nn.Sequential(nn.Conv2d(config.in_channels, width, 3, padding=1))]
    skips = [width]
    for level, mult in enumerate(config.channel_mult):
        for _ in range(config.num_res_blocks):
            blocks.append(nn.Sequential(*_level(config, level, skips[-1])))
            skips.append(mult * config.model_channels)
        if level < len(config.channel_mult) - 1:
            blocks.append(nn.Sequential(Downsample(skips[-1])))
            skips.append(skips[-1])
    return nn.ModuleList(blocks), skips


def _output_blocks(config: UNetConfig, skips: Sequence[int]) -> nn.ModuleList:
    """The way up: each block reads the last output and one skip."""
    remaining, width, blocks = list(skips), skips[-1], []
    for level in reversed(range(len(config.channel_mult))):
        for index in range(config.num_res_blocks + 1):
            layers = _level(config, level, width + remaining.pop())
            width = config.model_channels * config.channel_mult[level]
            if level and index == config.num_res_blocks:
                layers.append(Upsample(width))
            blocks.append(nn.Sequential(*layers))
    assert not remaining
    return nn.ModuleList(blocks)

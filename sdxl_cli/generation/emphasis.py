"""What the weights of a prompt do to the features of its tokens: after the text encoders, one encoder at a time."""

from __future__ import annotations

from torch import Tensor

from sdxl_cli.generation.prompt_syntax import Emphasis


def a1111(features: Tensor, weights: Tensor, emphasis: Emphasis) -> Tensor:
    """A1111: every token's features times its weight (modules/sd_emphasis.py of stable-diffusion-webui).

    ``original`` then scales each chunk back to the mean it had, over all of its numbers; ``no-norm`` does not. The
    factor is the quotient of two means that may be near 0, which is why the latter is often preferred for SDXL.

    Args:
        features: of the chunks of one prompt, from one encoder [k, 77, width].
        weights: [k, 77].
        emphasis: which of the two.

    Returns:
        [k, 77, width]; ``features`` themselves where all weights are 1.
    """
    if bool((weights == 1).all()):
        return features
    weighted = features * weights[..., None].to(features)
    if emphasis == "no-norm":
        return weighted
    before, after = (x.mean(dim=(1, 2), keepdim=True) for x in (features, weighted))
    return weighted * (before / after)


def comfy(features: Tensor, weights: Tensor, empty: Tensor) -> Tensor:
    """ComfyUI: away from, or towards, what the empty prompt has at the same position (comfy/sd1_clip.py).

    Args:
        features: of the chunks of one prompt, from one encoder [k, 77, width].
        weights: [k, 77]; 0 gives the empty prompt's features.
        empty: the empty prompt's [1, 77, width].

    Returns:
        [k, 77, width].
    """
    return empty + (features - empty) * weights[..., None].to(features)

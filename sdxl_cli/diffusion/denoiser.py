"""From a network's output (noise, v or the clean latent) to a denoiser D(x; sigma) that predicts the clean latent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sdxl_cli.diffusion.formulation import Prediction
from sdxl_cli.diffusion.schedule import NoiseSchedule

Network = Callable[[Tensor, int, Tensor, Tensor], Tensor]
"""(scaled latents [B, C, h, w], index 0 … 999, crossattn [k·B, T, ctx], vector [k·B, adm]) -> [k·B, C, h, w].

With k = 2, both sides of guidance read the same latents: all of them under the first conditions, then under the next.
"""


def input_scale(sigma: Tensor) -> Tensor:
    """c_in = 1 / sqrt(sigma² + 1): makes the network's input unit variance (facts: sgm denoiser_scaling.py)."""
    return (sigma.square() + 1.0).rsqrt()


def to_denoised(prediction: Prediction, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a network output stands for: D = c_skip · x + c_out · output.

    eps: c_skip 1, c_out -sigma. v: c_skip 1 / (sigma² + 1), c_out -sigma / sqrt(sigma² + 1)
    (facts: sgm EpsScaling and VScaling). x0: it is the output.

    Args:
        prediction: what the network predicts.
        output: network output [B, C, h, w].
        x: noisy latent, not scaled [B, C, h, w].
        sigma: noise level, broadcastable to x.
    """
    if prediction == "x0":
        return output
    if prediction == "eps":
        return x - sigma * output
    return x / (sigma.square() + 1.0) - sigma * input_scale(sigma) * output


class Denoiser:
    """The discrete denoiser: sigma goes to the nearest of the 1000 levels first (sgm DiscreteDenoiser)."""

    def __init__(self, network: Network, schedule: NoiseSchedule, prediction: Prediction = "eps") -> None:
        self.network = network
        self.schedule = schedule
        self.prediction: Prediction = prediction

    def __call__(self, x: Tensor, sigma: float, crossattn: Tensor, vector: Tensor) -> Tensor:
        """D(x; sigma).

        Args:
            x: noisy latents, fp32 [B, C, h, w], x = clean + sigma · noise.
            sigma: noise level.
            crossattn: [B, T, ctx] in the network's dtype.
            vector: [B, adm] in the network's dtype.

        Returns:
            Denoised latents, fp32 [B, C, h, w].
        """
        return self.denoised(self.predict(x, sigma, crossattn, vector), x, sigma)

    def predict(self, x: Tensor, sigma: float, crossattn: Tensor, vector: Tensor) -> Tensor:
        """What the network says, fp32 [k·B, C, h, w]; arguments as above, or conditions of k·B rows."""
        index = self.schedule.index_of(sigma)
        scaled = (x * input_scale(self.schedule.sigmas[index])).to(crossattn.dtype)
        return self.network(scaled, index, crossattn, vector).to(x.dtype)

    def denoised(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean latents [B, C, h, w] that an output at ``x`` stands for."""
        # the level stays on the CPU, as a scalar operand: copied over, every step would wait for the device
        level = self.schedule.sigmas[self.schedule.index_of(sigma)]
        return to_denoised(self.prediction, output, x, level)

"""A training step of both sides, from the same weights and data: ours as ``sdxl train-unet`` makes it, and diffusers'.

Theirs is what train_text_to_image_sdxl.py does from ``for step, batch in enumerate(train_dataloader)`` on, without
accelerate, which adds nothing on one device: fp32 weights, the forward pass under autocast, the gradient's length
limited, AdamW. Features and latents are cached on both sides.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sdxl_cli.bench.weights import random_tensor
from sdxl_cli.checkpoint.diffusers_config import unet_json
from sdxl_cli.checkpoint.layouts import unet_to_diffusers
from sdxl_cli.data.loader import Batch, Latents
from sdxl_cli.model.conditioning import TextFeatures
from sdxl_cli.model.config import ModelConfig
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import LoopConfig, OptimizerConfig, OptimizerName, UNetTrainConfig
from sdxl_cli.training.draws import streams
from sdxl_cli.training.loop import Run
from sdxl_cli.training.place import hold
from sdxl_cli.training.recompute import Recompute, recompute
from sdxl_cli.training.unet_task import UNetTask

NORM = 1.0
STEPS = 1_000_000
"""Of the schedule: the rate stays."""

Weights = dict[str, Tensor]
"""Of the U-Net, by our names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How a side trains."""

    side: Literal["sdxl", "diffusers"] = "sdxl"
    memory: Recompute = "none"
    """Theirs has all or nothing: anything but none is gradient checkpointing."""
    optimizer: OptimizerName = "adamw"
    """Theirs has adamw."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Theirs has fp32."""
    fused_backward: bool = False
    channels_last: bool = False
    """Of theirs; ours always is."""
    fused_step: bool = True
    """Of theirs: AdamW in one kernel, which the script does not ask for; ours always is."""

    def __str__(self) -> str:
        """As in the tables."""
        if self.side == "diffusers":
            said = "no checkpointing" if self.memory == "none" else "gradient checkpointing"
            return said + (", channels last" if self.channels_last else "")
        said = f"recomputes {self.memory}, {self.optimizer}"
        said += ", bf16 weights" if self.weights == "bf16" else ""
        return said + (", in the backward pass" if self.fused_backward else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where, and in what; the same of both sides."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    computes: Literal["fp32", "bf16"] = "fp32"
    rate: float = 1e-4
    ema_decay: float = 0.0


class Data:
    """The same pictures at every step, as latents and features, and the noise of each as our loop draws it."""

    def __init__(self, config: ModelConfig, size: int, count: int) -> None:
        """``size`` is in pixels."""
        generator = torch.Generator().manual_seed(1)
        self.shape, self.count, self.config = (4, size // 8, size // 8), count, config
        self.latent = torch.randn(count, *self.shape, generator=generator)
        self.text = TextFeatures(
            torch.randn(count, 77, config.unet.context_dim, generator=generator),
            torch.randn(count, config.big_g.embed_dim, generator=generator),
        )
        sizes = [(size, size)] * count
        scaled = self.latent / config.vae.scale_factor
        self._batch = Batch(
            images=None,
            latents=Latents(scaled, torch.full_like(scaled, -60.0)),
            captions=[""] * count,
            original_size=sizes,
            crop_top_left=[(0, 0)] * count,
            target_size=sizes,
            aesthetic_score=[6.0] * count,
            ids=[str(number) for number in range(count)],
            weight=torch.ones(count),
            text=self.text,
        )

    def batch(self, step: int) -> Batch:
        """See :class:`~sdxl_cli.training.unet_task.Batches`."""
        return self._batch

    def drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Noise [B, 4, h, w] and its levels [B] of a step."""
        levels, noises = [], []
        for stream in streams(torch.Generator().manual_seed(step), range(self.count)):
            torch.randn(1, *self.shape, generator=stream)  # of the latent, whose variance is nothing here
            levels.append(torch.randint(0, 1000, (1,), generator=stream))
            noises.append(torch.randn(1, *self.shape, generator=stream))
        return torch.cat(noises), torch.cat(levels)


class Trainee(Protocol):
    """A side with its weights and optimizer, which is given data and takes steps."""

    def set(self, data: Data) -> None:
        """Train on this from now on."""
        ...

    def prepare(self, index: int) -> None:
        """What step ``index`` needs that is no work of its own."""
        ...

    def step(self, index: int) -> float:
        """Train step ``index``; its loss."""
        ...

    def forget(self) -> None:
        """Let go of what a step that failed has left."""
        ...


class Ours:
    """The loop of ``sdxl train-unet``."""

    def __init__(self, config: ModelConfig, weights: Weights, way: Way, place: Place, data: Data) -> None:
        with torch.device("meta"):
            model = SDXL(config, ("unet",))
        model.unet.load_state_dict(weights, assign=True)
        model.requires_grad_(True)
        loop = LoopConfig(
            max_steps=STEPS,
            batch_size=data.count,
            ema_decay=place.ema_decay,
            dtype=place.computes,
            device=str(place.device),
            fused_backward=way.fused_backward,
            optimizer=OptimizerConfig(
                name=way.optimizer,
                learning_rate=place.rate,
                max_grad_norm=0.0 if way.fused_backward else NORM,
                schedule="constant",
            ),
        )
        train = UNetTrainConfig(text_dropout=0.0, memory=way.memory, weight_dtype=way.weights, loop=loop)
        hold(model, train, place.device)
        model.to(memory_format=torch.channels_last).train()
        empty = data.text.zeros()
        empty = TextFeatures(empty.crossattn[:1], empty.pooled[:1])
        self.task = UNetTask(model, data, lambda captions: (torch.empty(0), torch.empty(0)), train, empty)
        recompute(model.unet, way.memory, self.task.computing)
        self._folder = tempfile.TemporaryDirectory()
        self.run = Run(self.task, loop, Path(self._folder.name), {})

    def set(self, data: Data) -> None:
        self.task.batches = data

    def prepare(self, index: int) -> None:
        """Nothing: what it draws is its own work."""

    def step(self, index: int) -> float:
        return self.run.advance(index)["loss"]

    def forget(self) -> None:
        self.run.free_gradients()


class Theirs:
    """See the module."""

    def __init__(self, config: ModelConfig, weights: Weights, way: Way, place: Place, data: Data) -> None:
        from diffusers import DDPMScheduler, UNet2DConditionModel
        from diffusers.training_utils import EMAModel

        with torch.device("meta"):
            self.unet: Any = UNet2DConditionModel.from_config(unet_json(config))
        plan = unet_to_diffusers(weights, config.unet)
        self.unet.load_state_dict({name: weights[s.keys[0]] for name, s in plan.items()}, assign=True)
        self.unet.requires_grad_(True).train()
        if way.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if way.memory != "none":
            self.unet.enable_gradient_checkpointing()
        self.scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(),
            lr=place.rate,
            betas=(0.9, 0.999),
            weight_decay=1e-2,
            eps=1e-8,
            fused=way.fused_step,
        )
        self.average = EMAModel(self.unet.parameters(), decay=place.ema_decay) if place.ema_decay else None
        self.place = place
        self.set(data)

    def set(self, data: Data) -> None:
        device, (_, height, width) = self.place.device, data.shape
        self.data, self.latent = data, data.latent.to(device)
        self.crossattn, self.pooled = data.text.crossattn.to(device), data.text.pooled.to(device)
        self.ids = torch.tensor([[8 * height, 8 * width, 0, 0, 8 * height, 8 * width]] * data.count).to(
            device
        )

    def prepare(self, index: int) -> None:
        self.drawn = tuple(value.to(self.place.device) for value in self.data.drawn(index))

    def step(self, index: int) -> float:
        import torch.nn.functional as F

        noise, timesteps = self.drawn
        noisy = self.scheduler.add_noise(self.latent, noise, timesteps)
        added = {"time_ids": self.ids, "text_embeds": self.pooled}
        low = self.place.computes == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=low):
            output = self.unet(noisy, timesteps, self.crossattn, added_cond_kwargs=added, return_dict=False)[
                0
            ]
        loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.step(self.unet.parameters())
        return float(loss.detach())

    def forget(self) -> None:
        self.optimizer.zero_grad()


def build(config: ModelConfig, weights: Weights, way: Way, place: Place, data: Data) -> Trainee:
    """The side that ``way`` names; it takes the weights for its own."""
    side = Ours if way.side == "sdxl" else Theirs
    return side(config, weights, way, place, data)


def random_weights(config: ModelConfig, device: torch.device) -> Weights:
    """fp32, made on the device; the same in every process."""
    with torch.device("meta"):
        state = SDXL(config, ("unet",)).unet.state_dict()
    return {
        name: random_tensor(f"unet.{name}", tensor.shape, torch.float32, device)
        for name, tensor in state.items()
    }

"""``--plan``: what a job would run, said before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.generation.device import NAMES, describe
from sdxl_cli.generation.jobs import Settled
from sdxl_cli.generation.memory import Needs, estimate
from sdxl_cli.generation.plan import Plan
from sdxl_cli.generation.prompt import CONTEXT_LENGTH
from sdxl_cli.generation.request import GenerateRequest, token_counts
from sdxl_cli.generation.sizes import Size, format_size
from sdxl_cli.generation.weights import Weights

_PART_NAMES = {"text": "text encoders", "unet": "U-Net", "vae": "autoencoder"}


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A model that would be used."""

    role: str
    name: str
    path: Path
    file_bytes: int
    parameters: int
    needs: Needs
    stays: bool
    """Whether its parts stay loaded together; otherwise they take turns."""
    streams: bool
    """Whether of its U-Net one block is loaded at a time."""

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        return self.needs.peak(together=self.stays)


@dataclass(frozen=True, slots=True)
class Outline:
    """What a job would run."""

    where: str
    pictures: int
    seeds: tuple[int, int]
    """The first and the last."""
    passes: tuple[dict[str, Any], ...]
    """Of each: size, and the timesteps of every expert."""
    sampler: str
    scheduler: str
    guidance: str
    tokens: dict[str, tuple[int, int]]
    """Prompt -> tokens and chunks."""
    device: str
    dtype: str
    vae_dtype: str
    models: tuple[ModelOutline, ...]

    @property
    def peak(self) -> int:
        """Bytes at the most: of models that stay, together; of others, the largest."""
        if all(model.stays for model in self.models):
            weights = sum(sum(model.needs.weights.values()) for model in self.models)
            return weights + max(max(model.needs.work.values()) for model in self.models)
        return max(model.peak for model in self.models)

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; sizes in bytes."""
        models = [
            {**asdict(model), "needs": {**asdict(model.needs), "peak": model.peak}} for model in self.models
        ]
        tokens = {name: {"tokens": count, "chunks": chunks} for name, (count, chunks) in self.tokens.items()}
        kept = {name: value for name, value in asdict(self).items() if name not in ("models", "tokens")}
        return {**kept, "tokens": tokens, "models": models, "peak": self.peak}

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        first, last = self.seeds
        seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
        rows = [("pictures", f"{self.pictures}, {seeds}")]
        for index, one in enumerate(self.passes):
            for who, timesteps in one["timesteps"].items():
                label = f"{'pass ' + str(index + 1) + ', ' if len(self.passes) > 1 else ''}{who}"
                walk = " ".join(map(str, timesteps))
                rows.append((label, f"{one['size']}, {len(timesteps)} steps, t = {walk}"))
        rows.append(("sampler", f"{self.sampler}, {self.scheduler}, {self.guidance}"))
        for name, (count, chunks) in self.tokens.items():
            rows.append((name, f"{count} tokens, {chunks} chunk{'s' if chunks != 1 else ''} of 75"))
        rows.append(("runs on", f"{self.device}, {self.dtype}; autoencoder {self.vae_dtype}"))
        for model in self.models:
            file = (
                f"{model.name}, {model.parameters / 1e6:.0f} M parameters, {format_bytes(model.file_bytes)}"
            )
            rows.append((model.role, f"{file}, {model.path}"))
            for part, count in model.needs.weights.items():
                work = model.needs.work.get(part)
                beside = f", about {format_bytes(work)} while it works" if work else ""
                rows.append((f"  {_PART_NAMES[part]}", f"{format_bytes(count)} of weights{beside}"))
        how = "all parts stay loaded" if all(model.stays for model in self.models) else "parts take turns"
        if any(model.streams for model in self.models):
            how += ", and so do the blocks of the U-Net"
        return [*rows, ("memory", f"about {format_bytes(self.peak)} at the most; {how}")]


def outline(settled: Settled) -> Outline:
    """Say what a settled job would run. Takes seconds for a large model: its shapes are gone through."""
    plan, request = settled.plan, settled.plan.request
    assert isinstance(request, GenerateRequest)
    models = settled.models
    tokens = token_counts(request)
    opened = [("base", settled.files[0], models.base)]
    if models.refiner is not None:
        opened.append(("refiner", settled.files[1], models.refiner))
    chunks = max((count for _, count in tokens.values()), default=1)
    base = models.base
    return Outline(
        where=settled.job.where,
        pictures=request.num_images,
        seeds=(request.seed, request.seed + request.num_images - 1),
        passes=tuple(_pass(one) for one in plan.passes),
        sampler=plan.sampler.label,
        scheduler=request.scheduler,
        guidance=plan.guidance,
        tokens=tokens,
        device=describe(base.device),
        dtype=NAMES[base.dtype],
        vae_dtype=NAMES[base.vae_dtype],
        models=tuple(_model(role, files, weights, plan, request, chunks) for role, files, weights in opened),
    )


def _pass(plan: Plan) -> dict[str, Any]:
    shares = {"base": plan.timesteps[: plan.base_steps], "refiner": plan.timesteps[plan.base_steps :]}
    return {
        "size": format_size(plan.framing.size),
        "timesteps": {name: timesteps for name, timesteps in shares.items() if timesteps},
    }


def _model(
    role: str, files: ModelFiles, weights: Weights, plan: Plan, request: GenerateRequest, chunks: int
) -> ModelOutline:
    size: Size = max((one.framing.size for one in plan.passes), key=lambda sides: sides[0] * sides[1])
    pictures = 1 if weights.device.type == "cpu" else min(request.batch_size, request.num_images)
    guided = 1 if request.cfg_scale in (0, 1) else 2
    needs = estimate(
        files,
        weights,
        size=size,
        batch=pictures * guided,
        tokens=CONTEXT_LENGTH * max(chunks, 1),
        decodes=role == "base",
    )
    return ModelOutline(
        role=role,
        name=files.name,
        path=files.path,
        file_bytes=files.size,
        parameters=files.identity.parameters,
        needs=needs,
        stays=weights.stays,
        streams=weights.streams,
    )

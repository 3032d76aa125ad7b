"""Prompt to picture, and picture to better picture: the stages in order, with as little in memory as can be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sdxl_cli.diffusion.guidance import Guided
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.generation.autoencode import to_image
from sdxl_cli.generation.canvas import Canvas
from sdxl_cli.generation.checks import FiniteWatch
from sdxl_cli.generation.device import NAMES, describe
from sdxl_cli.generation.embeddings import sha256
from sdxl_cli.generation.encode import Prompts, encode_prompts, guided
from sdxl_cli.generation.hires import enlarged, later_streams
from sdxl_cli.generation.metadata import Kind, ModelRecord, Record
from sdxl_cli.generation.observe import Step, stage, step
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.plan import Expert, Plan
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.request import GenerateRequest, SamplingRequest, token_counts, unmentioned
from sdxl_cli.generation.rescue import Keep, decode_safely, encode_safely, memory_limit
from sdxl_cli.generation.start import PLAIN, Held, Source, Start, encode_source
from sdxl_cli.generation.weights import Weights, lora_records

T = TypeVar("T")


class Reporter(Protocol):
    """Who is told how things go; the console is one."""

    def note(self, text: str) -> None:
        """Something worth knowing."""
        ...

    def warn(self, text: str) -> None:
        """Something to act on."""
        ...

    def progress(self, items: Iterable[T], description: str, *, total: int | None = None) -> Iterator[T]:
        """Hand on ``items``, showing how far it is."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Models:
    """Who makes the picture."""

    base: Weights
    refiner: Weights | None = None

    def named(self) -> dict[Expert, Weights]:
        """Those that there are, in the order of their work."""
        found: dict[Expert, Weights] = {"base": self.base}
        if self.refiner is not None:
            found["refiner"] = self.refiner
        return found

    def release(self) -> None:
        """Let go of all that need not stay."""
        self.base.release()
        if self.refiner is not None:
            self.refiner.release()

    def forget(self) -> None:
        """Let go of everything."""
        self.base.forget()
        if self.refiner is not None:
            self.refiner.forget()


@dataclass(frozen=True)
class Picture:
    """A picture that was made."""

    decoded: Pixels
    """RGB [H, W, 3], uint8, as the model made it."""
    seed: int
    tile: int | None = None
    """Side of the tiles it was decoded in, in latents; None: as a whole."""
    canvas: Canvas | None = None
    """What it was begun with; None: noise."""

    @cached_property
    def pixels(self) -> Pixels:
        """The finished picture, RGB [H, W, 3], uint8; put together by whoever asks first."""
        return self.decoded if self.canvas is None else self.canvas.finish(self.decoded)


@torch.inference_mode()
def generate(plan: Plan, models: Models, report: Reporter, *, keep: Keep | None = None) -> Iterator[Picture]:
    """Make the pictures of a plan, one seed after the other.

    Args:
        plan: made by ``plan_generation`` for these models.
        models: their parts are loaded when their turn comes: text encoders, U-Net, (refiner,) autoencoder.
        report: hears of progress, and of words the model never saw.
        keep: saves latents whose decoding ran out of memory, before anything else is tried.

    Raises:
        NumericError: a stage gave NaN or infinity; the text names the stage and the step.
        MemoryLimitError: it does not fit in memory, after every fallback.
    """
    with memory_limit(plan.passes[-1].framing.size, _batch(plan.request, models.base)):
        for runs in _waves(plan, models, report):
            yield from _finished(runs, plan, models, report, keep)
    models.release()


def _waves(plan: Plan, models: Models, report: Reporter) -> Iterator[list[Run]]:
    """The pictures in groups that are carried together through all passes, denoised."""
    request = plan.request
    assert isinstance(request, GenerateRequest)
    prompts = {}
    for name, weights in models.named().items():
        if any(part.steps_of(name) for part in plan.passes):
            with stage(report, "text"):
                prompts[name] = encode_prompts(request, weights)
            weights.release()
    tell_of_prompts(request, models.base, report)
    with stage(report, "vae"):
        source = encode_source(plan, models.base, report)
    seeds = [request.seed + index for index in range(request.num_images)]
    batch = _batch(request, models.base)
    stay = all(weights.stays for name, weights in models.named().items() if name in prompts)
    for wave in _groups(seeds, batch if stay else len(seeds)):
        runs = [started(plan, group, models.base, source) for group in _groups(wave, batch)]
        for number, part in enumerate(plan.passes):
            if number:
                models.release()
                runs = [continued(run, part, number, models.base, report) for run in runs]
            for name, texts in prompts.items():
                if not (steps := part.steps_of(name)):
                    continue
                models.release()
                for run in runs:
                    run.advance(models.named()[name], texts, steps, report)
        models.release()
        yield runs


def _finished(
    runs: list[Run], plan: Plan, models: Models, report: Reporter, keep: Keep | None
) -> Iterator[Picture]:
    """Decode what was denoised; when memory runs out, all that is not decoded yet is saved first."""
    waiting = [
        (seed, latent[None]) for run in runs for seed, latent in zip(run.seeds, run.latents, strict=True)
    ]
    saved: list[Path] = []

    def before_retry() -> str:
        models.forget()
        if keep is not None and not saved:
            saved.extend(keep(latent, seed) for seed, latent in waiting)
        names = ", ".join(str(path) for path in saved)
        return f"; the latents are saved as {names}, for sdxl decode" if saved else ""

    tile: int | None = None
    while waiting:
        seed, latent = waiting[0]
        with stage(report, "vae"):
            pixels, tile = decode_safely(
                latent,
                models.base,
                report,
                tiling=plan.request.vae_tiling,
                before_retry=before_retry,
                tile=tile,
            )
        waiting.pop(0)
        yield Picture(pixels, seed, tile, plan.canvas)


@torch.inference_mode()
def refine(plan: Plan, pixels: Pixels, weights: Weights, report: Reporter) -> Picture:
    """Add noise to a picture and run the last steps again (SDEdit, arXiv 2108.01073).

    Args:
        plan: made by ``plan_refinement`` for the size of ``pixels``.
        pixels: RGB [H, W, 3], uint8, sides multiples of what the model needs.
        weights: the refiner, or any other model.
        report: hears of progress, and of words the model never saw.

    Raises:
        NumericError: a stage gave NaN or infinity; the text names the stage and the step.
    """
    with stage(report, "text"):
        prompts = encode_prompts(plan.request, weights)
    tell_of_prompts(plan.request, weights, report)
    weights.release()
    streams = NoiseStreams([plan.request.seed])
    with stage(report, "vae"):
        moments = encode_safely(to_image(pixels), weights, report, tiling=plan.request.vae_tiling)
        source = Source(vae=weights.config.vae, picture=moments)
    run = Run(plan, [plan.request.seed], streams, source.start(plan, streams).to(weights.device))
    weights.release()
    run.advance(weights, prompts, plan.steps, report)
    weights.release()
    (picture,) = _finished([run], plan, Models(base=weights), report, None)
    weights.release()
    return picture


class Run:
    """A batch of pictures on its way down the noise levels.

    It may change hands: the sampler stays suspended between two experts, with whatever it remembers of earlier
    steps, so that the second continues where the first stopped and no noise is added.
    """

    def __init__(self, plan: Plan, seeds: Sequence[int], streams: NoiseStreams, start: Start) -> None:
        """``start`` is where the pictures of ``seeds`` begin, on the device where the networks run."""
        self.seeds = seeds
        self.latents = start.x
        self.plan = plan
        self.start = start
        self._held: Held | None = None
        self._expert: Guided | None = None
        self._seen: tuple[Tensor, Tensor, float] | None = None
        """What the last evaluation gave and was given: denoised, x, sigma."""
        self._done = 0
        self._walk = plan.sampler.steps(self._denoise, self.latents, plan.sigmas, streams)

    def advance(self, weights: Weights, prompts: Prompts, steps: int, report: Reporter) -> None:
        """Let ``weights`` do the next ``steps`` steps.

        Raises:
            NumericError: the latents are not finite after one of them.
        """
        plan = self.plan
        who = "refiner" if weights.config.is_refiner else "base"
        timesteps, label = plan.timesteps, f"{who}, seed {_span(self.seeds)}"
        watch = FiniteWatch(weights.dtype, "--dtype")
        with stage(report, "unet"):
            self._expert = guided(
                weights,
                prompts,
                plan.framing,
                plan.request,
                plan.sigmas,
                len(self.seeds),
                self.start.seen,
                levels=plan.sampler.levels(plan.sigmas),
            )
            # an inpainting U-Net sees what is not repainted beside its latents
            plain = weights.config.unet.in_channels == PLAIN
            self._held = self.start.held if plain else None
            for latents in report.progress(islice(self._walk, steps), label, total=steps):
                where = f"the U-Net of the {who}, step {self._done + 1} of {plan.steps} (t={timesteps[self._done]})"
                watch.see(latents, where)
                self.latents = latents
                self._done += 1
                if self._seen is not None:
                    denoised, x, sigma = self._seen
                    step(report, Step(denoised, who, self._done, plan.steps, x, sigma))
            watch.settle()
        self._expert = None

    def _denoise(self, x: Tensor, sigma: float) -> Tensor:
        assert self._expert is not None
        held = self._held
        seen = x if held is None else held.before(x, sigma)
        denoised = self._expert(seen, sigma)
        denoised = denoised if held is None else held.after(denoised)
        self._seen = denoised, seen, sigma
        return denoised


def started(plan: Plan, seeds: Sequence[int], weights: Weights, source: Source) -> Run:
    """The run of these seeds' pictures, each from its own random numbers and ``source``."""
    streams = NoiseStreams(seeds)
    return Run(plan, seeds, streams, source.start(plan, streams).to(weights.device))


def continued(run: Run, plan: Plan, number: int, weights: Weights, report: Reporter) -> Run:
    """The run of the same pictures in their pass ``number``, from where the one before ended."""
    streams, latents = later_streams(run.seeds, number), run.latents.float().cpu()
    with stage(report, "vae"):
        if plan.framing.size != run.plan.framing.size:
            assert isinstance(plan.request, GenerateRequest)
            latents = enlarged(run.latents, plan, plan.request.hires_upscaler, weights, streams, report)
        source = encode_source(plan, weights, report)
    start = source.start(plan, streams, latents, run.start.held and run.start.held.to(torch.device("cpu")))
    return Run(plan, run.seeds, streams, start.to(weights.device))


def tell_of_prompts(request: SamplingRequest, weights: Weights, report: Reporter) -> None:
    """Say how long long prompts are, and which words a small vocabulary lacks: to it they are all one word."""
    for name, (tokens, chunks) in token_counts(request).items():
        if chunks > 1:
            report.note(f"{'' if name == 'prompt' else f'{name}, '}tokens: {tokens} → {chunks} chunks")
    reader, tokenizer = request.reader(), Tokenizer.default()
    for name in unmentioned(request):
        how = f"embedding:{name}" if reader.syntax == "comfy" else name
        report.warn(f"--embedding {name}: no prompt mentions it; write {how} where it is to be")
    if weights.known_token_ids is None:
        return
    texts = [reader.plain(text, name) for name, text in request.texts().items()]
    if words := tokenizer.unknown_words(" ".join(texts), weights.known_token_ids):
        report.warn(f"this model never saw the word{'s' if len(words) > 1 else ''} {', '.join(words)}")


def record(
    plan: Plan,
    models: Models,
    seed: int,
    *,
    kind: Kind = "generate",
    source: Mapping[str, Any] | None = None,
    tile: int | None = None,
) -> Record:
    """What the picture of ``seed`` remembers of how it was made.

    Args:
        plan: what was run.
        models: who ran it. Hashing a large file for the first time takes seconds.
        seed: the picture's.
        kind: ``generate`` or ``refine``.
        source: for a picture made from another, what that was.
        tile: side of the tiles it was decoded in, in latents.
    """
    request = replace(plan.request, seed=seed)
    if isinstance(request, GenerateRequest):
        request = replace(request, num_images=1, batch_size=_batch(request, models.base))
    main, role = models.base, "refiner" if kind == "refine" else "base"
    records, loras = main.records(role), lora_records(main.loras, role)
    if kind == "generate" and models.refiner is not None and any(p.steps_of("refiner") for p in plan.passes):
        records |= models.refiner.records("refiner")
        loras += lora_records(models.refiner.loras, "refiner")
    for name, path in request.reader().embeddings(request.texts()).items():
        records |= {f"embedding {name}": ModelRecord(name, sha256(path))}
    run = {
        "device": describe(main.device),
        "dtype": NAMES[main.dtype],
        "vae_dtype": NAMES[main.vae_dtype],
        "torch": str(torch.__version__),
        "prediction": str(main.formulation),
        "steps": plan.split(),
    }
    if tile is not None:
        run["vae_tile"] = str(tile)
    return Record(
        kind=kind,
        request=request,
        framing=plan.framing,
        models=records,
        run=run,
        sampler_label=plan.sampler.label,
        loras=loras,
        source=source,
    )


def _batch(request: SamplingRequest, weights: Weights) -> int:
    """How many pictures are denoised together: on a CPU one, on an accelerator as many as asked for.

    Kernels choose their order of summation by the size of the batch. One by one, a picture made on the CPU has the
    same bits whatever it is made along with, and a CPU gains nothing from larger batches.
    """
    if weights.device.type == "cpu" or not isinstance(request, GenerateRequest):
        return 1
    return request.batch_size


def _groups(seeds: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (seeds[start : start + size] for start in range(0, len(seeds), size))


def _span(seeds: Sequence[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]}…{seeds[-1]}"

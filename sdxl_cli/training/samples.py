"""Pictures of a model in training, made by the code that makes all pictures."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_cli import presets
from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.console import get as console
from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.batchfile import Line
from sdxl_cli.generation.jobs import LIGHT_FIELDS
from sdxl_cli.generation.picture import write_picture
from sdxl_cli.generation.pipeline import Models, generate, record
from sdxl_cli.generation.plan import plan_generation
from sdxl_cli.generation.request import RANDOM_SEED, GenerateRequest
from sdxl_cli.generation.values import changed
from sdxl_cli.generation.weights import LoadedWeights
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.vae import Autoencoder
from sdxl_cli.training.config import UNetTrainConfig
from sdxl_cli.training.export import Export, file_name
from sdxl_cli.training.loop import Run
from sdxl_cli.training.place import computing

FOLDER, COMMANDS = "samples", "commands.txt"
NEEDS_FILES = frozenset({"refiner_mode", "refiner_strength", "refiner_switch_at"})

Wanted = GenerateRequest


def sample_plans(lines: Sequence[Line], config: UNetTrainConfig) -> list[Wanted]:
    """The requests of a file of prompts; those without a seed have the run's, to compare steps by.

    Raises:
        UsageError: a line asks for another model, or the model in training makes no pictures by itself.
    """
    if not lines:
        return []
    if config.objective == "edm":
        raise UsageError(
            "--sample-prompts: generation has no continuous noise levels, which objective edm trains"
        )
    found = []
    for line in lines:
        if other := sorted(line.changes.keys() - (LIGHT_FIELDS - NEEDS_FILES)):
            raise UsageError(
                f"{line.where}: {other[0]} is not for pictures of the model in training; leave it out"
            )
        base = presets.layered(
            GenerateRequest, preset="generate", flags={"prompt": "", "seed": config.loop.seed}
        )
        request = changed(base, line.changes, line.where)
        if not request.prompt:
            raise UsageError(f"{line.where}: has no prompt")
        if request.seed == RANDOM_SEED:
            raise UsageError(f"{line.where}: seed -1 makes other pictures every time; give one")
        found.append(request)
    return found


@dataclass(slots=True)
class Samples:
    """Makes the pictures every so many steps with the averaged weights, as ``samples/000500-0.png``.

    Each has everything about itself in its metadata, as any picture; ``samples/commands.txt`` has the command that
    makes it again from the model file of its step.
    """

    model: SDXL
    """U-Net and text encoders, in training."""
    vae: Autoencoder
    wanted: Sequence[Wanted]
    config: UNetTrainConfig
    folder: Path
    """Of the run."""
    export: Export
    """What writes the files that the pictures can be made with again."""

    def after_step(self, run: Run, done: int) -> None:
        """See :class:`~sdxl_cli.training.loop.Watcher`."""
        if done % self.config.sample_every and done != run.config.max_steps:
            return
        run.free_gradients()  # room for the pictures
        trained = run.shipped()
        with run.shown() as model, self._computing():
            if model is None or trained is None:
                return
            assert isinstance(model, SDXL)
            path = self.folder / file_name(self.export, done)
            wanted = [self.export.asked(request, path, trained, done) for request in self.wanted]
            whole = self._whole(model).eval()
            try:
                self._make(whole, wanted, done)
            finally:
                whole.train()

    def _computing(self) -> AbstractContextManager[object]:
        """The precision of training, where weights that are not trained are kept in it."""
        kept = next((p for p in self.model.parameters() if p.dtype != torch.float32), None)
        return nullcontext() if kept is None else computing(self.config.loop, kept.device)

    def _whole(self, model: SDXL) -> SDXL:
        """The model with its autoencoder, sharing all weights."""
        whole = SDXL(model.config, ())
        whole.model, whole.conditioner = model.model, model.conditioner
        whole.first_stage_model = self.vae
        whole.known_token_ids = model.known_token_ids
        return whole

    def _make(self, whole: SDXL, wanted: Sequence[Wanted], done: int) -> None:
        formulation = Formulation(self.config.prediction, self.config.zero_terminal_snr)
        models = Models(base=LoadedWeights(whole, file_name(self.export, done), formulation=formulation))
        commands = []
        for number, request in enumerate(wanted):
            plan = plan_generation(request, whole.config, formulation=formulation)
            for picture in generate(plan, models, console()):
                name = f"{done:06d}-{number}" + (f"-{picture.seed}" if request.num_images > 1 else "")
                path = self.folder / FOLDER / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                # a resumed run makes the pictures of its last step again
                write_picture(
                    path, picture.pixels, record(plan, models, picture.seed).texts(), overwrite=True
                )
                commands.append(self._command(path, done))
        self._write_commands(commands)
        console().note(f"step {done}: {len(commands)} pictures in {self.folder / FOLDER}")

    def _command(self, picture: Path, done: int) -> str:
        kept = (self.folder / file_name(self.export, done)).exists()
        file = self.folder / file_name(self.export, done if kept else None)
        command = shlex.join(["sdxl", "generate", "--from", str(picture), *self.export.arguments(file)])
        last = done == self.config.loop.max_steps
        return command if kept or last else f"{command}  # step {done} was not kept: see save_model_every"

    def _write_commands(self, commands: Sequence[str]) -> None:
        path = self.folder / FOLDER / COMMANDS
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = list(dict.fromkeys([*before, *commands]))
        with atomic_write(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

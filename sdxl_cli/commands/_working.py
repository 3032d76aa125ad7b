"""How ``generate`` works through what is asked for: prompt files, sweeps, the prompt loop, previews, timings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxl_cli.console import plain_table
from sdxl_cli.errors import FileError, SdxlError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_cli.console import Console
    from sdxl_cli.generation.batchfile import Line
    from sdxl_cli.generation.behind import Behind
    from sdxl_cli.generation.jobs import Job, Settled, Workshop
    from sdxl_cli.generation.onlooker import Onlooker
    from sdxl_cli.generation.picture import Target
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.generation.sweep import Axis

SEVERAL = "Several pictures"
LOOKING_ON = "Looking on"

PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts-file",
        "--from-file",
        help='A request a line: JSON, or "prompt --n negative --w 1024 --h 832 --d seed --l cfg --s steps"; '
        "- reads stdin.",
        metavar="FILE",
        rich_help_panel=SEVERAL,
    ),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        help="All values of a setting, such as cfg-scale=3,5,7 or prompt-sr=red,blue; may be repeated.",
        metavar="NAME=A,B",
        rich_help_panel=SEVERAL,
    ),
]
Grid = Annotated[
    bool,
    typer.Option("--grid", help="Also write all pictures as one, with labels.", rich_help_panel=SEVERAL),
]
Interactive = Annotated[
    bool,
    typer.Option(
        "--interactive",
        help="Read prompts from the terminal or a pipe until it ends; /help tells more.",
        rich_help_panel=SEVERAL,
    ),
]
Preview = Annotated[
    str | None,
    typer.Option(
        "--preview",
        help="Show pictures while they are made: none, terminal or file.",
        metavar="WHERE",
        rich_help_panel=LOOKING_ON,
    ),
]
PreviewPath = Annotated[
    Path | None,
    typer.Option(
        "--preview-path",
        help="The file of --preview file; default: preview.png.",
        metavar="FILE",
        rich_help_panel=LOOKING_ON,
    ),
]
PreviewInterval = Annotated[
    int,
    typer.Option(
        "--preview-interval", help="Steps between previews.", metavar="N", min=1, rich_help_panel=LOOKING_ON
    ),
]
PlanOnly = Annotated[
    bool,
    typer.Option("--plan", help="Say what would be run, load and make nothing.", rich_help_panel=LOOKING_ON),
]
ShowTimings = Annotated[
    bool, typer.Option("--timings", help="Say how long each stage took.", rich_help_panel=LOOKING_ON)
]

PREVIEWS = ("none", "terminal", "file")
_NOT_INTERACTIVE = {
    "prompts_file": "--prompts-file",
    "sweep": "--sweep",
    "grid": "--grid",
    "plan_only": "--plan",
}
_PREVIEW_FILE = Path("preview.png")


@dataclass(slots=True)
class Worker:
    """Makes the pictures of jobs, writes each behind the next one and says so."""

    given: Mapping[str, Any]
    """The flags of the command, by name."""
    console: Console
    onlooker: Onlooker
    shop: Workshop
    behind: Behind
    """Who writes."""
    made: list[tuple[Settled, list[Path]]] = field(default_factory=list)
    """Finished jobs with their pictures."""

    def work(self, settled: Settled, place: Target, label: str = "") -> dict[str, object]:
        """Make every picture of a job, and have it written and named; returns what ``--json`` says.

        That is complete when :meth:`finishing` is left.
        """
        from sdxl_cli.generation.latents import save_latents
        from sdxl_cli.generation.observe import stage
        from sdxl_cli.generation.picture import Texts
        from sdxl_cli.generation.pipeline import Picture, generate, record
        from sdxl_cli.generation.session import source_of

        plan, models = settled.plan, self.shop.ready(settled)
        self.onlooker.begin(models)
        if plan.canvas is not None:
            share = plan.request.share_of_noise  # type: ignore[attr-defined]
            self.console.note(f"{label}{plan.canvas.describe()}; strength {share:g}: {plan.share()}")
        height, width = plan.framing.size
        self.console.note(f"{label}{width}x{height}, {plan.split()}, {plan.sampler.label}, {plan.guidance}")
        started = time.perf_counter()
        bare = self.given["no_metadata"]
        source = None if bare else source_of(plan.request)

        def texts_of(seed: int, tile: int | None = None) -> Texts:
            return record(plan, models, seed, source=source, tile=tile).texts()

        def keep(latent: Tensor, seed: int) -> Path:
            name = place.file.stem if place.file else place.prefix
            return save_latents(place.folder, f"{name}-{seed}", latent, texts_of(seed))

        pictures: list[dict[str, object]] = []
        paths: list[Path] = []
        result: dict[str, object] = {
            "pictures": pictures,
            "request": plan.request,
            "resolved": plan.framing.named(),
            "steps": plan.split(),
            "seconds": 0.0,
            **({"job": settled.job.where} if settled.job.where else {}),
        }

        def save(picture: Picture) -> None:
            texts = Texts() if bare else texts_of(picture.seed, picture.tile)
            path = place.save(picture.pixels, picture.seed, texts)
            self.console.print_result(str(path))
            pictures.append({"path": path, "seed": picture.seed})
            paths.append(path)
            result["seconds"] = round(time.perf_counter() - started, 3)

        for picture in generate(plan, models, self.onlooker, keep=keep):
            with stage(self.onlooker, "save"):
                self.behind.do(partial(save, picture))
        self.made.append((settled, paths))
        return result

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """When it is left, all pictures that were made are written, also where something stopped the next one.

        Raises:
            FileError: one cannot be.
        """
        from sdxl_cli.generation.behind import finishing
        from sdxl_cli.generation.observe import stage

        with finishing(self.behind, self.console.warn):
            yield
            with stage(self.onlooker, "save"):
                self.behind.settle()


def aliases(command: Callable[..., object], request: type[Any]) -> dict[str, str]:
    """Flag without its dashes -> field of the request, of every flag that ``command`` has for a field."""
    from sdxl_cli.generation.values import hints

    app = typer.Typer(add_completion=False)
    app.command()(command)
    params = typer.main.get_command(app).params
    return {
        option.removeprefix("--"): str(param.name)
        for param in params
        for option in param.opts
        if param.name in hints(request) and option.startswith("--")
    }


def several(given: Mapping[str, Any]) -> bool:
    """Whether the prompt may come from somewhere else than the command line."""
    swept = [text.partition("=")[0].strip().lstrip("-") for text in given["sweep"] or ()]
    return bool(given["prompts_file"] or given["interactive"] or "prompt" in swept)


def check(given: Mapping[str, Any]) -> None:
    """Refuse flags that do not go together.

    Raises:
        UsageError: names the two.
    """
    if given["preview"] not in (None, *PREVIEWS):
        raise UsageError(f"--preview {given['preview']}: there are {', '.join(PREVIEWS)}")
    if given["interactive"]:
        for name, flag in _NOT_INTERACTIVE.items():
            if given[name]:
                raise UsageError(f"--interactive and {flag}: give one of the two")


def look_on(given: Mapping[str, Any], console: Console, check: Callable[[], None]) -> Onlooker:
    """The onlooker that the flags ask for; ``check`` is called at each step.

    Raises:
        UsageError: a preview file that is no picture.
    """
    from sdxl_cli.generation.onlooker import Onlooker
    from sdxl_cli.generation.preview import Show, to_file, to_rows

    kind, path = given["preview"] or "none", given["preview_path"]
    shows: list[Show] = []
    if kind == "file" or path is not None:
        shows.append(to_file(path or _PREVIEW_FILE))
    if kind == "terminal":
        if not console.shows_progress:
            console.warn("--preview terminal: stderr is no terminal, or --quiet was given; nothing is shown")
        else:
            shows.append(lambda pixels: console.show(to_rows(pixels)))
    interval = given["preview_interval"]
    return Onlooker(console, timed=given["timings"], shows=shows, interval=interval, check=check)


def read_prompts(path: Path | None, names: Mapping[str, str]) -> list[Line]:
    """The lines of ``--prompts-file``; none without one.

    Raises:
        FileError: it cannot be read.
        UsageError: lines that are no requests; all of them are named.
    """
    from sdxl_cli.generation.batchfile import LineReader, read_lines
    from sdxl_cli.generation.request import GenerateRequest

    if path is None:
        return []
    reader = LineReader(GenerateRequest, names)
    if str(path) == "-":
        return read_lines(sys.stdin, "stdin", reader)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not text in UTF-8") from error
    return read_lines(text.splitlines(), path.name, reader)


def work_all(worker: Worker, settled: Sequence[Settled], axes: Sequence[Axis]) -> None:
    """Make the pictures of all jobs, then the grids and the reports."""
    from sdxl_cli.generation.jobs import labelled

    given, console = worker.given, worker.console
    started = time.perf_counter()
    count = sum(one.plan.request.num_images for one in settled)  # type: ignore[attr-defined]
    places = [_place(given, one.job, count) for one in settled]
    with worker.finishing():
        results = [
            worker.work(one, place, labelled(settled, index))
            for index, (one, place) in enumerate(zip(settled, places, strict=True))
        ]
    grids = list(_grids(worker, axes, places[0])) if given["grid"] else []
    seconds = time.perf_counter() - started
    console.note(f"{count} picture{'s' if count > 1 else ''} in {seconds:.1f} s")
    result = results[0] if len(results) == 1 else {"jobs": results, "seconds": round(seconds, 3)}
    if given["grid"]:
        result["grids"] = grids
    console.json(result | _timings(worker))


def show_plans(settled: Sequence[Settled], console: Console) -> None:
    """Say what every job would run."""
    from sdxl_cli.generation.jobs import labelled
    from sdxl_cli.generation.outline import outline

    plans = [outline(one) for one in settled]
    for index, plan in enumerate(plans):
        console.table(("", "would run"), plan.rows(), title=labelled(settled, index).strip() or None)
    console.json({"plans": [plan.to_json() for plan in plans]})


def converse(worker: Worker, base: GenerateRequest, names: Mapping[str, str]) -> int:
    """The prompt loop, until the input ends; returns the exit code.

    At a terminal that is 0; from a pipe it is that of the first line that failed. A failure never ends the loop.
    """
    from sdxl_cli.generation.batchfile import LineReader
    from sdxl_cli.generation.interactive import HELP, Loop
    from sdxl_cli.generation.picture import target
    from sdxl_cli.generation.request import GenerateRequest
    from sdxl_cli.presets import to_toml

    given, console = worker.given, worker.console
    place = target(given["output"], prefix="sdxl", count=2, overwrite=given["overwrite"])
    loop, code, terminal = Loop(base, LineReader(GenerateRequest, names)), 0, sys.stdin.isatty()
    if terminal:
        console.note("a prompt a line; /help tells more, Ctrl-D ends")
    for text in _lines(terminal):
        try:
            asked = loop.feed(text)
            if asked == "quit":
                break
            if isinstance(asked, str):
                console.note(HELP if asked == "help" else to_toml(loop.base).rstrip())
            elif asked is not None:
                job_place = _place(given, asked, 2) if asked.output else place
                with worker.finishing():
                    result = worker.work(worker.shop.settle(asked), job_place)
                console.json_line(result)
        except SdxlError as error:
            code = code or error.exit_code
            console.json_line(
                {"job": f"line {loop.number}", "error": str(error), "exit_code": error.exit_code}
            )
            console.warn(str(error))
        except KeyboardInterrupt:
            if not terminal:
                raise
            console.note("stopped; Ctrl-D ends")
    _timings(worker)
    return 0 if terminal else code


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of stdin; at a terminal with a prompt, and with the arrow keys where the system has readline."""
    if not terminal:
        yield from iter(sys.stdin.readline, "")
        return
    with suppress(ImportError):
        import_module("readline")  # editing and history come with the import
    while True:
        try:
            # input() would write its prompt to stdout, which is for results
            print("> ", end="", file=sys.stderr, flush=True)
            yield input()
        except EOFError:
            print(file=sys.stderr)
            return


def _place(given: Mapping[str, Any], job: Job, count: int) -> Target:
    from sdxl_cli.generation.picture import target

    own = job.output is not None
    several = job.request.num_images if own else count
    return target(
        job.output if own else given["output"], prefix="sdxl", count=several, overwrite=given["overwrite"]
    )


def _grids(worker: Worker, axes: Sequence[Axis], place: Target) -> Iterator[Path]:
    """Draw and write the grids of everything that was made."""
    from dataclasses import replace

    from sdxl_cli.generation.grid import draw, grid_sheets, grid_texts
    from sdxl_cli.generation.picture import Texts

    stem = place.file.stem if place.file is not None else place.prefix
    beside = replace(place, prefix=f"{stem}-grid", file=None)
    for sheet, captions in grid_sheets(worker.made, axes):
        texts = Texts() if worker.given["no_metadata"] else grid_texts(sheet)
        seed = worker.made[0][0].plan.request.seed
        path = beside.save(draw(sheet, captions), seed, texts)
        worker.console.print_result(str(path))
        yield path


def _timings(worker: Worker) -> dict[str, object]:
    """Say the timings, when asked for, and return them for ``--json``."""
    if not worker.given["timings"]:
        return {}
    timings = worker.onlooker.timings
    rows = [(name, round(seconds, 3), remark) for name, seconds, remark in timings.rows()]
    worker.console.note(plain_table(["stage", "seconds", ""], rows))
    return {"timings": timings.to_json()}

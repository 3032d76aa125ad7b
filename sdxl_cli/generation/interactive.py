"""The prompt loop: a line is a prompt, a change of settings, or a request as JSON; the model stays loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdxl_cli.errors import UsageError
from sdxl_cli.generation.batchfile import Line, LineReader
from sdxl_cli.generation.jobs import Job
from sdxl_cli.generation.request import GenerateRequest
from sdxl_cli.generation.values import changed

Action = Literal["show", "help", "quit"]

HELP = """\
a red guitar            makes a picture
a red guitar --s 20     the same with a setting for this picture only; --n --w --h --d --l --s or any flag
--seed 5 --steps 20     settings from here on
{"prompt": "a cat"}     a request as JSON, for programs
/again                  the last prompt once more, with the settings as they are now
/show                   the settings
/quit                   the end, as is the end of the input"""

_ACTIONS: dict[str, Action] = {
    "/show": "show",
    "/help": "help",
    "/?": "help",
    "/quit": "quit",
    "/exit": "quit",
}


@dataclass(slots=True)
class Loop:
    """What the loop remembers from line to line."""

    base: GenerateRequest
    """What holds for every picture; its prompt may be empty."""
    reader: LineReader
    number: int = 0
    """Lines read."""
    stated: frozenset[str] = frozenset()
    """Fields set for all pictures from here on."""

    def feed(self, text: str) -> Job | Action | None:
        """What to do for a line: a job, something about the loop itself, or nothing more.

        Raises:
            UsageError: the line makes no sense; nothing has changed then.
        """
        self.number += 1
        where, text = f"line {self.number}", text.strip()
        if text.lower() in _ACTIONS:
            return _ACTIONS[text.lower()]
        if text.lower() == "/again":
            return self._job(Line(where, {}))
        line = self.reader.read(text, where)
        if line is None:
            return None
        if text.startswith("--"):
            self.base = changed(self.base, line.changes, where)
            self.stated |= line.changes.keys()
            return None
        return self._job(line)

    def _job(self, line: Line) -> Job:
        request = changed(self.base, line.changes, line.where)
        if not request.prompt:
            raise UsageError(f"{line.where}: has no prompt")
        # the last prompt is what /again and later changes of settings are about
        self.base = changed(self.base, {"prompt": request.prompt}, line.where)
        return Job(
            request=request,
            stated=self.stated | line.changes.keys(),
            where=line.where,
            output=line.output,
        )

"""How the prompts of a request are read: dialect, learned embeddings, and what weights do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_cli.generation.chunks import Chunk, chunks, reference
from sdxl_cli.generation.embeddings import Book
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.prompt_syntax import Emphasis, Syntax, parse


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads prompts. Without arguments: as ``sdxl generate`` does when nothing is asked for."""

    syntax: Syntax = "a1111"
    emphasis: Emphasis = "original"
    layer: int = 2
    """Of both text encoders, counted from the end."""
    book: Book = field(default_factory=Book)

    @property
    def bare_names(self) -> bool:
        """Whether an embedding's name alone is a mention, as in A1111; in ComfyUI it needs ``embedding:``."""
        return self.syntax != "comfy"

    def chunks(self, text: str, name: str = "prompt") -> list[Chunk]:
        """What the text encoders are given for one text, at least one chunk.

        Args:
            text: as typed.
            name: what the text is called in an error; a negative prompt's begins with "negative".

        Raises:
            UsageError: the text asks for something this program does not do, or for an unknown embedding.
            FileError: an embedding that is mentioned cannot be read, or is for another architecture.
        """
        sections = parse(text, self.syntax, name, composes=not name.startswith("negative"))
        texts = [span.text for section in sections for span in section]
        mentioned = self.book.mentioned(texts, name, bare=self.bare_names)
        return chunks(sections, self.syntax, Tokenizer.default(), mentioned, bare=self.bare_names)

    def embeddings(self, texts: Mapping[str, str]) -> dict[str, Path]:
        """Names and files of the embeddings that prompts, by what they are called, mention."""
        read = [chunk for name, text in texts.items() for chunk in self.chunks(text, name)]
        names = dict.fromkeys(vector.name for chunk in read for _, vector in chunk.vectors())
        return {name: self.book.files[name] for name in names}

    def plain(self, text: str, name: str = "prompt") -> str:
        """The words alone, without brackets, weights and embeddings. Raises as :meth:`chunks` does."""
        sections = parse(text, self.syntax, name, composes=not name.startswith("negative"))
        words = " ".join(span.text for section in sections for span in section)
        pattern = reference(self.book.files, bare=self.bare_names)
        return pattern.sub(" ", words) if pattern else words

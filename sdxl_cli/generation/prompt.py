"""Text to token ids: CLIP's byte-pair encoding, as both of SDXL's text encoders read it.

The vocabulary is the one that open_clip ships, read without importing open_clip (which costs seconds). Both
encoders use the same 49408 ids; they differ only in what fills a row after the end token (facts.md section 3).
"""

from __future__ import annotations

import gzip
import html
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import ftfy
import regex

from sdxl_cli.errors import FileError

START, END = 49406, 49407
CONTEXT_LENGTH = 77
"""Ids in a row, the start and the end token included."""
MAX_TOKENS = CONTEXT_LENGTH - 2
PAD_CLIP_L = END
"""CLIP-L's tokenizer fills a row with the end token ..."""
PAD_BIG_G = 0
"""... and OpenCLIP's with 0, which is the token "!"."""

_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 48894
"""Merges of the released vocabulary; the file has more lines than were used."""
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def clean(text: str) -> str:
    """Repair mis-decoded unicode, resolve HTML entities (twice), squeeze white space, lower the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@dataclass(frozen=True, slots=True)
class Word:
    """A run of letters, a digit or a run of punctuation, with its token ids."""

    text: str
    ids: tuple[int, ...]
    start: int
    """Offset in the cleaned text."""


class Tokenizer:
    """Byte-pair encoder over CLIP's vocabulary. Control tokens written out in a text are plain text."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        self.merges = merges
        self.vocabulary = _vocabulary(merges)
        self._rank = {pair: rank for rank, pair in enumerate(merges)}
        self._letters = _byte_letters()
        self._bytes = {letter: bytes([byte]) for byte, letter in self._letters.items()}
        self._pieces_by_id = list(self.vocabulary)
        self._cache: dict[str, tuple[int, ...]] = {}

    @classmethod
    def default(cls) -> Tokenizer:
        """The tokenizer of both released text encoders (read once per process).

        Raises:
            FileError: open_clip's vocabulary file is not there.
        """
        return _default_tokenizer()

    def words(self, text: str) -> list[Word]:
        """The words of ``text`` after :func:`clean`, in order."""
        return [
            Word(text=match.group(), ids=self._word_ids(match.group()), start=match.start())
            for match in _WORD.finditer(clean(text))
        ]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without start, end and padding."""
        return [token for word in self.words(text) for token in word.ids]

    def text(self, ids: Iterable[int]) -> str:
        """The words of token ids, cleaned as :func:`clean` does, with a space after each."""
        letters = "".join(self._pieces_by_id[token] for token in ids).replace("</w>", " ")
        spelled = bytes(
            byte for letter in letters for byte in self._bytes.get(letter, letter.encode("utf-8"))
        )
        return spelled.decode("utf-8", errors="replace").strip()

    def row(self, text: str, padding: int) -> list[int]:
        """The 77 ids an encoder reads: start, at most 75 tokens of ``text``, end, ``padding``."""
        ids = [START, *self.encode(text)[:MAX_TOKENS], END]
        return ids + [padding] * (CONTEXT_LENGTH - len(ids))

    def unknown_words(self, text: str, known: frozenset[int]) -> list[str]:
        """Words of ``text`` with a token outside ``known``, each once, in order.

        Punctuation does not count: nobody asks for a picture of a comma.
        """
        return list(
            dict.fromkeys(
                word.text
                for word in self.words(text)
                if word.text[0].isalnum() and not known.issuperset(word.ids)
            )
        )

    def _word_ids(self, word: str) -> tuple[int, ...]:
        if word not in self._cache:
            self._cache[word] = tuple(self.vocabulary[piece] for piece in self._pieces(word))
        return self._cache[word]

    def _pieces(self, word: str) -> list[str]:
        """Merge the bytes of ``word``, the most frequent pair of the training corpus first."""
        pieces = [self._letters[byte] for byte in word.encode("utf-8")]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            best = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: self._rank.get(pair, _MERGES))
            if best not in self._rank:
                break
            merged, at = [], 0
            while at < len(pieces):
                width = 2 if tuple(pieces[at : at + 2]) == best else 1
                merged.append("".join(pieces[at : at + width]))
                at += width
            pieces = merged
        return pieces


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte: printable bytes stand for themselves, the others start at U+0100."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in sorted(printable)} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Letters, letters at the end of a word, merges, start, end: the position is the id."""
    letters = list(_byte_letters().values())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    return {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}


@lru_cache(maxsize=1)
def _default_tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("open_clip")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / _VOCABULARY).is_file():
        raise FileError("the vocabulary of open_clip is not installed: pip install open_clip_torch")
    with gzip.open(folder / _VOCABULARY, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : _MERGES + 1]
    return Tokenizer([(first, second) for first, second in (line.split() for line in lines)])

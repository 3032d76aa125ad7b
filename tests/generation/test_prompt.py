"""The tokenizer against open_clip's and transformers'."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sdxl_cli.generation.prompt import PAD_BIG_G, PAD_CLIP_L, Tokenizer, clean

PROMPTS = [
    "",
    " ",
    "a red guitar",
    "A  Red\n\tGUITAR , on a Table!!",
    "it's what they've, I'm, we'll, you'd, you're, don't, DON'T",
    "1girl, 8k uhd, f/1.8, 35mm, ISO100, 2024-06-01 12:30",
    "Füße, naïve café, smörgåsbord, ﬁne ligature, Ǆ",
    "日本の城、桜 赤いギター",
    "مدينة في الليل",
    "Здравствуй, мир",
    "हिन्दी में एक गिटार",
    "a 🎸 and 👩‍👩‍👧 with ☃️ and 🇩🇪",
    "fish &amp; chips &lt;b&gt; &amp;eacute; caf&eacute;",
    "âœ” mojibake â€œquotesâ€\x9d",
    "“curly” ‘quotes’ — dashes… ½ ² ①",
    "(masterpiece:1.2), [ugly], <lora:x:0.8>, {a|b}, a__b",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaa aaa hahahahahaha !!!!!!!!!!!!!",
    "zero\u200bwidth nbsp\u00a0space \u3000wide",
    "a photo of a cat, " * 40,
]


ALPHABET = [
    *"abzAZ019 .,!?'\"()[]{}<>:;-_/\\|&#@*+=~^%$`\n\t\0\a",
    *"éßﬁǄİıſΐ日本الहिन🎸👩\u200d\ufe0f\u200b\u00a0\u3000\u0301½²①™®…—“’\u202e\ufeffΣς",
    *("&amp;", "&lt;", "&#39;", "&amp;lt;", "'s", "'re", "<|endoftext|>", "<|startoftext|>"),
]
"""What makes tokenizers differ, for random texts."""


def nasty(count: int) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(ALPHABET, k=generator.randint(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.default()


def test_rows_equal_open_clip(tokenizer: Tokenizer) -> None:
    open_clip = pytest.importorskip("open_clip")
    texts = PROMPTS + nasty(300)
    assert [tokenizer.row(text, PAD_BIG_G) for text in texts] == open_clip.tokenize(texts).tolist()


def test_rows_equal_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers' CLIP tokenizer neither repairs unicode nor resolves entities, so it gets cleaned text."""
    from transformers import CLIPTokenizer

    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in tokenizer.merges)])
    (tmp_path / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    reference = CLIPTokenizer.from_pretrained(tmp_path, pad_token="<|endoftext|>")
    # to transformers, a control token written out is that token
    texts = PROMPTS + [text for text in nasty(300) if "<|" not in clean(text)]
    rows = reference([clean(text) for text in texts], padding="max_length", max_length=77, truncation=True)
    assert [tokenizer.row(text, PAD_CLIP_L) for text in texts] == rows["input_ids"]


def test_ids_go_back_to_their_words(tokenizer: Tokenizer) -> None:
    for text in ("a red guitar", "füße 日本 🎸"):
        assert tokenizer.text(tokenizer.encode(text)) == text


def test_vocabulary_has_49408_distinct_entries(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.vocabulary.values()) == list(range(49408))


def test_rows_are_77_long_and_differ_only_in_padding(tokenizer: Tokenizer) -> None:
    assert tokenizer.row("a red apple", PAD_CLIP_L) == [49406, 320, 736, 3055, 49407] + [49407] * 72
    assert tokenizer.row("a red apple", PAD_BIG_G) == [49406, 320, 736, 3055, 49407] + [0] * 72


def test_unknown_words_are_named_once_and_punctuation_is_not(tokenizer: Tokenizer) -> None:
    known = frozenset(tokenizer.encode("a red guitar"))
    assert tokenizer.unknown_words("a Purple, purple red zeppelin!", known) == ["purple", "zeppelin"]
    assert tokenizer.unknown_words("a red guitar", known) == []

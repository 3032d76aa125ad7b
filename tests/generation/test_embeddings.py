"""Textual inversion: files, names, and the features diffusers gives with the same vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sdxl_cli import cli
from sdxl_cli.checkpoint.embedding import read_embedding
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.embeddings import Book, open_book
from sdxl_cli.generation.metadata import read_record
from sdxl_cli.generation.picture import read_texts
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.reading import Reader
from sdxl_cli.generation.text_features import encode_text, require_readable
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.config import BASE, REFINER
from tests.model.peers import randomize, relative, transformers_big_g, transformers_clip_l

CPU = torch.device("cpu")


def vectors(count: int = 3, *, left: int = 64, right: int = 96, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "clip_l": torch.randn(count, left, generator=generator),
        "clip_g": torch.randn(count, right, generator=generator),
    }


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["style.safetensors", "style.pt", "style.bin"])
def test_both_halves_are_read(tmp_path: Path, name: str) -> None:
    tensors = vectors(left=768, right=1280)
    embedding = read_embedding(saved(tmp_path / name, tensors))
    assert torch.equal(embedding.clip_l, tensors["clip_l"])
    assert torch.equal(embedding.clip_g, tensors["clip_g"])
    assert embedding.count == 3
    embedding.require_fit(BASE)
    embedding.require_fit(REFINER)


def test_other_ways_to_write_the_same(tmp_path: Path) -> None:
    tensors = vectors(1, left=768, right=1280)
    early = {"text_encoders_0": tensors["clip_l"].half(), "text_encoders_1": tensors["clip_g"].half()}
    flat = {name: tensor[0] for name, tensor in tensors.items()}
    for number, content in enumerate((early, flat)):
        embedding = read_embedding(saved(tmp_path / f"{number}.safetensors", content))
        assert (embedding.clip_l.shape, embedding.clip_g.shape) == ((1, 768), (1, 1280))
        assert embedding.clip_l.dtype == torch.float32
        assert torch.allclose(embedding.clip_g, tensors["clip_g"], atol=2e-3)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.pt",
            {"string_to_param": {"*": torch.ones(2, 768)}, "name": "a", "step": 9},
            "Stable Diffusion 1.x",
        ),
        ("b.safetensors", {"emb_params": torch.ones(2, 768)}, "Stable Diffusion 1.x"),
        ("c.bin", {"<cat-toy>": torch.ones(1024)}, "Stable Diffusion 2.x"),
        ("d.safetensors", {"clip_g": torch.ones(1, 1280)}, "half of what SDXL needs"),
        ("e.safetensors", {"emb_params": torch.ones(2, 4096)}, "no textual inversion for any"),
        ("f.safetensors", {f"{i}.weight": torch.ones(4) for i in range(9)}, "no textual inversion for any"),
        ("g.safetensors", {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(1, 1280)}, "damaged"),
        (
            "h.safetensors",
            {"clip_l": torch.ones(76, 768), "clip_g": torch.ones(76, 1280)},
            "76 vectors; 1 to 75",
        ),
        ("i.safetensors", {"clip_l": torch.full((1, 768), torch.nan), "clip_g": torch.ones(1, 1280)}, "NaN"),
    ],
)
def test_a_file_for_something_else_is_named_as_such(
    tmp_path: Path, name: str, content: Any, said: str
) -> None:
    with pytest.raises(FileError, match=said) as caught:
        read_embedding(saved(tmp_path / name, content))
    assert name in str(caught.value)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (open, (str(tmp_path / "sprung"), "w"))  # type: ignore[return-value]

    path = saved(tmp_path / "trap.pt", {"clip_l": Trap()})
    with pytest.raises(FileError, match=r"trap\.pt"):
        read_embedding(path)
    assert not (tmp_path / "sprung").exists()


def test_names_come_from_files_or_are_given(tmp_path: Path) -> None:
    first = saved(tmp_path / "more" / "nice.safetensors", vectors())
    saved(tmp_path / "more" / "other.pt", vectors(2))
    second = saved(tmp_path / "x.safetensors", vectors(1))
    book = open_book([f"{second}:Nice"], str(tmp_path / "more"))
    assert book.files == {"other": tmp_path / "more" / "other.pt", "Nice": second}
    assert open_book([str(first)], None).files == {"nice": first}
    assert book.mentioned(["a nice other thing"], "prompt", bare=True) == {"Nice": 1, "other": 2}
    assert book.mentioned(["a nice embedding:other thing"], "prompt", bare=False) == {"other": 2}
    with pytest.raises(UsageError, match=r"prompt: unknown embedding 'othr'; did you mean other\?"):
        book.mentioned(["embedding:othr"], "prompt", bare=True)
    with pytest.raises(UsageError, match="another one is called nice"):
        open_book([str(first), f"{second}:nice"], None)
    with pytest.raises(UsageError, match="cannot stand in a prompt"):
        open_book([f"{second}:a(b"], None)
    for specs, folder in (([str(tmp_path / "no.pt")], None), ([], str(tmp_path / "no"))):
        with pytest.raises(FileError, match="no such"):
            open_book(specs, folder)


def test_a_file_nobody_mentions_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    book = open_book([], str(tmp_path))
    assert book.mentioned(["a cat"], "prompt", bare=True) == {}
    with pytest.raises(FileError, match=r"broken\.safetensors is a web page"):
        book.mentioned(["a broken cat"], "prompt", bare=True)


@pytest.fixture(scope="module")
def weights(models: dict[str, Path]) -> FileWeights:
    found = FileWeights(
        locate(str(models["base"]), "base"),
        device=CPU,
        dtype=torch.float32,
        vae_dtype=torch.float32,
        stays=True,
    )
    for embedder in found.text().embedders:
        randomize(embedder)
    return found


def test_vectors_of_another_width_are_refused_before_anything_is_loaded(
    tmp_path: Path, weights: FileWeights
) -> None:
    book = Book({"big": saved(tmp_path / "big.safetensors", vectors(left=768, right=1280))})
    with pytest.raises(FileError, match=r"clip_g vectors are 1280 wide, the model's text encoder is 96"):
        require_readable({"prompt": "a big cat"}, Reader(book=book), weights.config)
    require_readable({"prompt": "a bigger cat"}, Reader(book=book), weights.config)


def diffusers_features(weights: FileWeights, folder: Path, tensors: dict[str, Tensor], text: str) -> Any:
    """What its SDXL pipeline makes of a text with ``<style>`` in it, after its load_textual_inversion."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    ours = Tokenizer.default()
    (folder / "vocab.json").write_text(json.dumps(ours.vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in ours.merges)])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    tokenizers = [
        CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)
        for pad in ("<|endoftext|>", "!")
    ]
    clip_l, big_g = weights.text().embedders
    encoders = [transformers_clip_l(clip_l), transformers_big_g(big_g)]
    for encoder in encoders:
        # with the placeholder 2 of the released configs, transformers takes the highest id for the end token: an
        # added one, so that the pooled features would be those of the embedding
        encoder.config.eos_token_id = 49407
        getattr(encoder, "text_model", encoder).eos_token_id = 49407
    pipe = StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
    )
    for half, encoder, tokenizer in zip(("clip_l", "clip_g"), encoders, tokenizers, strict=True):
        pipe.load_textual_inversion(tensors[half], token="<style>", text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        cond, _, pooled, _ = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)
    return cond, pooled


@pytest.mark.parametrize("count", [1, 4])
def test_diffusers_gives_the_same_features(tmp_path: Path, weights: FileWeights, count: int) -> None:
    tensors = vectors(count)
    book = Book({"style": saved(tmp_path / "style.safetensors", tensors)})
    cond, pooled = diffusers_features(weights, tmp_path, tensors, "a red <style> cat, in <style>")
    for text, syntax in (
        ("a red style cat, in embedding:style", "a1111"),
        ("a red embedding:style cat, in embedding:style", "comfy"),
    ):
        with torch.no_grad():
            ours = encode_text(weights.text(), text, None, CPU, Reader(syntax=syntax, book=book))  # type: ignore[arg-type]
            without = encode_text(weights.text(), "a red style cat, in style", None, CPU, Reader())
        assert relative(ours.crossattn, cond) < 2e-5
        assert relative(ours.pooled, pooled) < 2e-5
        assert relative(without.crossattn, cond) > 1e-2


def test_the_encoders_are_as_before_afterwards(tmp_path: Path, weights: FileWeights) -> None:
    book = Book({"style": saved(tmp_path / "style.safetensors", vectors())})
    with torch.no_grad():
        before, _, after = (
            encode_text(weights.text(), "a style", None, CPU, reader)
            for reader in (Reader(), Reader(book=book), Reader())
        )
    assert torch.equal(before.crossattn, after.crossattn)


@pytest.fixture
def generate(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(*args: object) -> tuple[int, list[Path], str]:
        code = cli.run(["generate", "--steps", "2", "--seed", "5", *map(str, args)])
        captured = capsys.readouterr()
        return code, [Path(line) for line in captured.out.splitlines()], captured.err

    return run


def test_a_picture_with_an_embedding_is_remembered_and_made_again(
    tmp_path: Path, models: dict[str, Path], generate: Callable[..., Any]
) -> None:
    style = saved(tmp_path / "style.safetensors", vectors())
    # the words that a small vocabulary lacks are told of, an embedding's name is none of them
    asked = ("a (red:1.2) style zeppelin", "-m", models["pruned"], "--embedding", f"{style}:style")
    code, (picture,), err = generate(*asked)
    assert code == 0
    assert "never saw the word zeppelin" in err
    stored = read_record(picture)
    assert stored is not None
    assert stored.request.embedding == (f"{style}:style",)
    digest = stored.models["embedding style"].sha256
    assert f'TI hashes: "style: {str(digest)[:12]}"' in str(read_texts(picture).parameters)
    again = generate("--from", picture, "-o", "again")[1][0]
    assert again.read_bytes() == picture.read_bytes()
    plain = generate("a (red:1.2) style zeppelin", "-m", models["pruned"], "-o", "plain")[1][0]
    assert plain.read_bytes() != picture.read_bytes()


def test_an_embedding_nobody_mentions_is_told_of(
    tmp_path: Path, models: dict[str, Path], generate: Callable[..., Any]
) -> None:
    style = saved(tmp_path / "style.safetensors", vectors())
    asked = ("a style", "-m", models["base"], "--embedding", style)
    assert "no prompt mentions" not in generate(*asked)[2]
    assert "write embedding:style where" in generate(*asked, "--prompt-syntax", "comfy")[2]


def test_how_prompts_are_read_is_written_down_in_a1111s_words(
    models: dict[str, Path], generate: Callable[..., Any]
) -> None:
    picture = generate("a (cat)", "-m", models["base"], "--clip-skip", 3, "--emphasis", "no-norm")[1][0]
    assert "Clip skip: 3, Emphasis: No norm, " in str(read_texts(picture).parameters)
    plain = str(read_texts(generate("a (cat)", "-m", models["base"])[1][0]).parameters)
    assert "Clip skip" not in plain
    assert "Emphasis" not in plain


def test_a_long_prompt_says_how_long_it_is(models: dict[str, Path], generate: Callable[..., Any]) -> None:
    err = generate("cat " * 100, "-n", "dog BREAK " * 3, "-m", models["base"])[2]
    assert "tokens: 100 → 2 chunks" in err
    assert "negative prompt, tokens: 3 → 3 chunks" in err
    assert "tokens:" not in generate("cat", "-m", models["base"])[2]


def test_a_refined_picture_reads_the_prompt_as_the_picture_did(
    tmp_path: Path, models: dict[str, Path], generate: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    style = saved(tmp_path / "style.safetensors", vectors())
    asked = (
        "embedding:style AND [cat]",
        "-m",
        models["base"],
        "--embedding",
        style,
        "--prompt-syntax",
        "comfy",
    )
    picture = generate(*asked)[1][0]
    assert cli.run(["refine", str(picture), "-m", str(models["refiner"]), "--steps", "8"]) == 0
    stored = read_record(Path(capsys.readouterr().out.strip()))
    assert stored is not None
    request = stored.request
    assert (request.prompt, request.prompt_syntax) == ("embedding:style AND [cat]", "comfy")
    assert (request.embedding, "embedding style" in stored.models) == ((str(style),), True)

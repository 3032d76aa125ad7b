"""Textual inversion: vectors of a word are trained, and diffusers and generation make of the file what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from sdxl_cli import cli
from sdxl_cli.checkpoint.embedding import read_embedding
from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.checkpoint.read import load_model
from sdxl_cli.checkpoint.write import save_model
from sdxl_cli.data.manifest import read_manifest
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.embeddings import Book
from sdxl_cli.generation.encode import encode_text
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.reading import Reader
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.training.config import EmbeddingConfig
from sdxl_cli.training.embedding import EmbeddingTask, with_word
from sdxl_cli.training.state import load_state
from sdxl_cli.training.unet_request import UNetRequest
from sdxl_cli.training.unet_run import train_unet
from tests.model.peers import transformers_big_g, transformers_clip_l
from tests.training.files import assert_same_bits, tensors
from tests.training.small import SMALL_REFINER, unet_config

WORD = EmbeddingConfig(word="thingamy", vectors=3, initial="disc")


def config(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "embedding": WORD,
        "train_text_encoders": False,
        "text_dropout": 0.0,
        "ema_decay": 0.0,
        "max_steps": 4,
    }
    return unet_config(**values | changes)


@pytest.fixture
def asked(manifest: Path, base_file: Path, latents: Path, tmp_path: Path) -> UNetRequest:
    return UNetRequest(
        data=manifest, output=tmp_path / "run", config=config(), init=str(base_file), cache=latents
    )


def test_vectors_begin_at_a_word_and_only_they_are_trained(asked: UNetRequest, base_file: Path) -> None:
    result = train_unet(asked)
    assert result.path.name == "thingamy.safetensors"
    shipped, base = tensors(result.path), tensors(base_file)
    (token,) = Tokenizer.default().encode("disc")
    tables = {
        "clip_l": base["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"],
        "clip_g": base["conditioner.embedders.1.model.token_embedding.weight"],
    }
    rate = asked.config.loop.optimizer.learning_rate
    for half, table in tables.items():
        moved = (shipped[half] - table[token]).abs()
        assert shipped[half].shape == (3, table.shape[1])
        assert bool((moved.amax(1) > rate / 10).all()), "every vector of every half has a gradient"
        assert float(moved.max()) < 4 * rate
    state, _ = load_state(asked.output)
    assert {name for name in state if name.startswith("weights.")} == {
        "weights.learned.clip_l",
        "weights.learned.clip_g",
    }


def test_two_halves_of_a_run_are_the_whole(asked: UNetRequest, tmp_path: Path) -> None:
    rate = replace(config().loop.optimizer, decay_steps=0)
    whole = replace(asked, config=config(optimizer=rate))
    train_unet(whole)
    halves = replace(whole, output=tmp_path / "halves")
    train_unet(replace(halves, config=config(optimizer=rate, max_steps=2)))
    train_unet(replace(halves, resume=True))
    assert_same_bits(load_state(whole.output)[0], load_state(halves.output)[0])


def test_training_generation_and_diffusers_read_a_caption_alike(
    asked: UNetRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The features of a text with the word: as trained, as ``sdxl generate`` and as diffusers make them of the file."""
    tasks: list[EmbeddingTask] = []
    original = EmbeddingTask.__post_init__
    monkeypatch.setattr(EmbeddingTask, "__post_init__", lambda task: (tasks.append(task), original(task))[1])
    path = train_unet(asked).path
    caption = "a photo of thingamy, red"
    with torch.no_grad():
        trained = tasks[0]._encoded([caption])
    base = load_model(locate(asked.init, "model"), ("text",), dtype=torch.float32, vae_dtype=torch.float32)
    reader = Reader(book=Book({"thingamy": path}))
    generated = encode_text(base.conditioner, caption, None, torch.device("cpu"), reader)
    torch.testing.assert_close(generated.crossattn, trained.crossattn, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(generated.pooled, trained.pooled, rtol=1e-5, atol=1e-6)
    assert read_embedding(path).count == 3

    clip_l, big_g = base.conditioner.embedders.children()
    encoders = [transformers_clip_l(clip_l), transformers_big_g(big_g)]
    tokenizers = [peer_tokenizer(tmp_path / half, pad) for half, pad in (("l", "<|endoftext|>"), ("g", "!"))]
    pipe = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, text_encoder=encoders[0], text_encoder_2=encoders[1],
        tokenizer=tokenizers[0], tokenizer_2=tokenizers[1],
    )  # fmt: skip
    state = load_file(path)
    for half, tokenizer, encoder in zip(("clip_l", "clip_g"), tokenizers, encoders, strict=True):
        pipe.load_textual_inversion(state[half], token="thingamy", text_encoder=encoder, tokenizer=tokenizer)
    features = []
    with torch.no_grad():
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            text = pipe.maybe_convert_prompt(caption, tokenizer)
            ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
            features.append(encoder(ids, output_hidden_states=True).hidden_states[-2])
    torch.testing.assert_close(torch.cat(features, dim=-1), trained.crossattn, rtol=1e-4, atol=1e-5)


def peer_tokenizer(folder: Path, padding: str) -> CLIPTokenizer:
    """transformers' CLIP tokenizer from the same vocabulary."""
    folder.mkdir()
    ours = Tokenizer.default()
    (folder / "vocab.json").write_text(json.dumps(ours.vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in ours.merges)])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=padding, model_max_length=77)


def test_own_captions_must_have_the_word_and_others_are_sentences_about_it(asked: UNetRequest) -> None:
    own = replace(WORD, captions="own")
    with pytest.raises(UsageError, match=r"7 of 7 pictures have a caption without the word 'thingamy'"):
        train_unet(replace(asked, config=config(embedding=own)))
    disc = replace(own, word="red")
    with pytest.raises(UsageError, match=r"of 7 pictures have a caption without the word 'red'"):
        train_unet(replace(asked, config=config(embedding=disc)))


def test_a_word_after_what_is_read_is_refused(asked: UNetRequest) -> None:
    """Such a picture would teach nothing, and a batch of them has no gradient."""
    manifest = read_manifest(Path(str(asked.data)))
    own, long = replace(WORD, captions="own"), "a red disc, " * 24
    first, *rest = [replace(row, captions=(f"{long} thingamy",)) for row in manifest.rows]
    rest = [replace(row, captions=(f"thingamy, {long}",)) for row in rest]
    with pytest.raises(UsageError, match=rf"1 of 7 .* after the 75 tokens that are read, {first.path} is"):
        with_word(replace(manifest, rows=(first, *rest)), own)
    early = replace(manifest, rows=tuple(rest))
    assert with_word(early, own) == early
    with pytest.raises(UsageError, match=r"--vectors 74 leave no room in 'a photo of thingamy'; give fewer"):
        with_word(manifest, replace(WORD, vectors=74))


def test_a_word_is_not_dropped_from_captions() -> None:
    with pytest.raises(UsageError, match="give --set text_dropout=0"):
        config(text_dropout=0.1, text_dropout_mode="empty")
    assert config(text_dropout=0.0, text_dropout_mode="empty").embedding == WORD


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (EmbeddingConfig(word="two words"), "cannot stand in a prompt"),
        (EmbeddingConfig(word="x", vectors=76), "--vectors 76"),
    ],
)
def test_words_that_cannot_be_used_are_refused(word: EmbeddingConfig, said: str, asked: UNetRequest) -> None:
    with pytest.raises(UsageError, match=said):
        train_unet(replace(asked, config=config(embedding=word)))


def test_a_refiner_has_no_word_of_its_own(asked: UNetRequest, tmp_path: Path) -> None:
    save_model(tmp_path / "refiner.safetensors", SDXL(SMALL_REFINER), SMALL_REFINER)
    with pytest.raises(UsageError, match="a refiner has one"):
        train_unet(replace(asked, init=str(tmp_path / "refiner.safetensors")))


def test_the_command_makes_pictures_with_the_word_on_the_way(
    asked: UNetRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.txt").write_text("a picture of thingamy --w 64 --h 64 --s 2 --d 3\n")
    train = [
        "train-embedding",
        "--preset",
        "embedding",
        "--data",
        str(asked.data),
        "--model",
        str(asked.init),
    ]
    train += ["--word", "thingamy", "--initial-word", "red disc", "--cache", str(asked.cache), "-o", "run"]
    train += ["--max-steps", "2", "--sample-every", "1", "--sample-prompts", "prompts.txt", "-q"]
    assert cli.run(train) == 0
    commands = Path("run/samples/commands.txt").read_text().splitlines()
    assert len(commands) == 2
    # the first step's picture again, by its command, to the same pixels
    capsys.readouterr()
    assert cli.run([*commands[0].split()[1:], "-o", "again.png", "--device", "cpu", "--dtype", "fp32"]) == 0
    from PIL import Image, ImageChops

    pictures = [Image.open(path).convert("RGB") for path in ("run/samples/000001-0.png", "again.png")]
    _, high = zip(*ImageChops.difference(*pictures).getextrema(), strict=True)
    assert max(high) <= 1
    assert cli.run(["train-embedding", "--data", str(asked.data)]) == 2
    assert "give --word" in capsys.readouterr().err


def test_it_learns_what_its_model_predicts(asked: UNetRequest, tmp_path: Path) -> None:
    """A model for v gets a word without being told; one that is trained itself must be told."""
    model = load_model(locate(asked.init, "model"), dtype=torch.float32, vae_dtype=torch.float32)
    path = tmp_path / "v.safetensors"
    save_model(path, model, model.config, prediction="v")
    train_unet(replace(asked, init=str(path)))
    assert 'prediction = "v"' in (asked.output / "config.resolved.toml").read_text()
    whole = unet_config(max_steps=1)
    with pytest.raises(UsageError, match="predicts v, the configuration says eps"):
        train_unet(replace(asked, init=str(path), config=whole, output=tmp_path / "whole"))

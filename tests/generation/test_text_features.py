"""Features of long and weighted prompts, from transformers' encoders and formulas written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.diffusion.denoiser import Denoiser
from sdxl_cli.diffusion.schedule import NoiseSchedule
from sdxl_cli.errors import UsageError
from sdxl_cli.generation.emphasis import a1111, comfy
from sdxl_cli.generation.encode import encode_prompts
from sdxl_cli.generation.prompt import Tokenizer
from sdxl_cli.generation.reading import Reader
from sdxl_cli.generation.remember import Remembering
from sdxl_cli.generation.request import GenerateRequest, require_prompts_fit, token_counts
from sdxl_cli.generation.text_features import encode_text, of_one_length, require_readable
from sdxl_cli.generation.weights import FileWeights
from sdxl_cli.model.conditioning import TextFeatures
from tests.model.peers import randomize, relative, transformers_big_g, transformers_clip_l

CPU = torch.device("cpu")
WORDS = "cat dog red blue sky old car tree house river"
LONG = "a big red old fat cat, " * 17
TOKENIZER = Tokenizer.default()
BOUND, VISIBLE = 2e-5, 1e-3


class Peers:
    """Both encoders of a small random base model, and transformers' with the same weights."""

    def __init__(self, path: Path) -> None:
        self.weights = FileWeights(
            locate(str(path), "base"), device=CPU, dtype=torch.float32, vae_dtype=torch.float32, stays=True
        )
        self.encoders = self.weights.text()
        for embedder in self.encoders.embedders:
            randomize(embedder)
        self.clip_l = transformers_clip_l(self.encoders.embedders[0])
        self.big_g = transformers_big_g(self.encoders.embedders[1])
        for model in (self.clip_l, self.big_g):
            model.config.eos_token_id = 49407

    @torch.no_grad()
    def states(self, ids: list[int], layer: int = 2) -> tuple[Tensor, Tensor, Tensor]:
        """CLIP-L's and bigG's features [77, width] and the pooled ones, of up to 75 token ids."""
        row = [49406, *ids, 49407]
        rest = 77 - len(row)
        left = self.clip_l(torch.tensor([row + [49407] * rest]), output_hidden_states=True)
        right = self.big_g(torch.tensor([row + [0] * rest]), output_hidden_states=True)
        return left.hidden_states[-layer][0], right.hidden_states[-layer][0], right.text_embeds

    @torch.no_grad()
    def ours(self, text: str, text_2: str | None = None, **reading: Any) -> TextFeatures:
        return encode_text(self.encoders, text, text_2, CPU, Reader(**reading))


@pytest.fixture(scope="module")
def peers(models: dict[str, Path]) -> Peers:
    return Peers(models["base"])


def test_long_prompts_are_chunks_one_after_the_other(peers: Peers) -> None:
    ids = TOKENIZER.encode(LONG)
    assert len(ids) == 119
    # 10 times 7 tokens and 5 more are 75; what follows the last comma moves on
    halves = [peers.states(ids[:70]), peers.states(ids[70:])]
    expected = torch.cat([torch.cat(half[:2], dim=-1) for half in halves])[None]
    ours = peers.ours(LONG)
    assert ours.crossattn.shape == (1, 154, 160)
    assert relative(ours.crossattn, expected) < BOUND
    assert relative(ours.pooled, halves[0][2]) < BOUND
    assert relative(ours.pooled, halves[1][2]) > VISIBLE


def test_a1111s_weights_scale_each_encoder_and_chunk_back_to_its_mean(peers: Peers) -> None:
    text = "a (red:1.5) cat BREAK a [dog]"
    weights = [torch.ones(77), torch.ones(77)]
    weights[0][2], weights[1][2] = 1.5, 1 / 1.1
    parts = [peers.states(TOKENIZER.encode(part)) for part in ("a red cat", "a dog")]
    plain, normed = [], []
    for part, weight in zip(parts, weights, strict=True):
        scaled = [x * weight[:, None] for x in part[:2]]
        plain.append(torch.cat(scaled, dim=-1))
        back = [
            y * (x.double().mean() / y.double().mean()).float() for x, y in zip(part[:2], scaled, strict=True)
        ]
        normed.append(torch.cat(back, dim=-1))
    ours = peers.ours(text)
    assert relative(ours.crossattn[0], torch.cat(normed)) < 1e-4
    assert relative(ours.crossattn[0], torch.cat(plain)) > VISIBLE
    no_norm = peers.ours(text, emphasis="no-norm")
    assert relative(no_norm.crossattn[0], torch.cat(plain)) < BOUND
    # pooled features have no weights
    assert relative(ours.pooled, parts[0][2]) < BOUND


def test_comfys_weights_go_away_from_the_empty_prompt(peers: Peers) -> None:
    weight = torch.ones(77)
    weight[2], weight[3] = 1.5, 0.25
    left, right, pooled = peers.states(TOKENIZER.encode("a red cat"))
    empty = peers.states([])
    expected = torch.cat(
        [e + (x - e) * weight[:, None] for x, e in zip((left, right), empty[:2], strict=True)], dim=-1
    )
    ours = peers.ours("a (red:1.5) (cat:0.25)", syntax="comfy")
    assert relative(ours.crossattn[0], expected) < BOUND
    assert relative(ours.pooled, pooled) < BOUND
    assert relative(peers.ours("a (red:1.5) (cat:0.25)").crossattn[0], expected) > VISIBLE


def test_compel_goes_away_from_the_empty_prompt_too(peers: Peers, tmp_path: Path) -> None:
    """Another implementation of the same rule; compel takes it for weights above 1."""
    from compel.embeddings_provider import EmbeddingsProvider, ReturnedEmbeddingsType

    provider = EmbeddingsProvider(
        tokenizer=hf_tokenizer(tmp_path, "<|endoftext|>"),
        text_encoder=peers.clip_l,
        truncate=True,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
    )
    with torch.no_grad():
        theirs = provider.get_embeddings_for_weighted_prompt_fragments(
            [["a", "red", "cat and a", "dog"]], [[1.0, 1.5, 1.0, 2.0]]
        )
    ours = peers.ours("a (red:1.5) cat and a (dog:2)", syntax="comfy").crossattn[..., :64]
    assert relative(ours, theirs) < BOUND


def hf_tokenizer(folder: Path, padding: str) -> Any:
    """transformers' CLIP tokenizer from the same vocabulary."""
    from transformers import CLIPTokenizer

    (folder / "vocab.json").write_text(json.dumps(TOKENIZER.vocabulary), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in TOKENIZER.merges)])
    (folder / "merges.txt").write_text(merges + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=padding, model_max_length=77)


def test_formulas_leave_what_has_no_weight_alone() -> None:
    torch.manual_seed(0)
    features, empty = torch.randn(2, 77, 8), torch.randn(1, 77, 8)
    ones = torch.ones(2, 77)
    assert a1111(features, ones, "original") is features
    assert torch.equal(comfy(features, 0 * ones, empty), empty.expand(2, -1, -1))
    heavy = ones.clone()
    heavy[1, 5] = 1.7
    normed = a1111(features, heavy, "original")
    # a chunk without weights is not touched by another one's, and the mean of each is what it was
    assert torch.allclose(normed[0], features[0], rtol=1e-6)
    assert torch.allclose(normed.mean(dim=(1, 2)), features.mean(dim=(1, 2)), atol=1e-6)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_clip_skip_counts_layers_from_the_end(peers: Peers, layer: int) -> None:
    left, right, pooled = peers.states(TOKENIZER.encode(WORDS), layer)
    ours = peers.ours(WORDS, layer=layer)
    assert relative(ours.crossattn[0], torch.cat([left, right], dim=-1)) < BOUND
    assert relative(ours.pooled, pooled) < BOUND
    other = peers.states(TOKENIZER.encode(WORDS), layer % 3 + 1)
    assert relative(ours.crossattn[0], torch.cat(other[:2], dim=-1)) > VISIBLE


def test_diffusers_encodes_the_same(peers: Peers, tmp_path: Path) -> None:
    """Both prompts, both negative ones, and its clip_skip, which is ours less two."""
    from diffusers import StableDiffusionXLPipeline

    folders = [tmp_path / "l", tmp_path / "g"]
    for folder in folders:
        folder.mkdir()
    pipe = StableDiffusionXLPipeline(
        vae=None,
        unet=None,
        scheduler=None,
        text_encoder=peers.clip_l,
        text_encoder_2=peers.big_g,
        tokenizer=hf_tokenizer(folders[0], "<|endoftext|>"),
        tokenizer_2=hf_tokenizer(folders[1], "!"),
    )
    for layer, skip in ((2, None), (3, 1)):
        with torch.no_grad():
            cond, _, pooled, _ = pipe.encode_prompt(
                WORDS, "a dog", device="cpu", do_classifier_free_guidance=False, clip_skip=skip
            )
        ours = peers.ours(WORDS, "a dog", layer=layer)
        assert relative(ours.crossattn, cond) < BOUND
        assert relative(ours.pooled, pooled) < BOUND


def test_a_layer_the_encoders_lack_is_refused(peers: Peers) -> None:
    for layer in (1, 3):
        require_readable({}, Reader(layer=layer), peers.weights.config)
    with pytest.raises(UsageError, match=r"--clip-skip 4: .* 1 … 3"):
        require_readable({}, Reader(layer=4), peers.weights.config)


def test_a_shorter_second_prompt_is_followed_by_empty_chunks(peers: Peers) -> None:
    ids = TOKENIZER.encode(LONG)
    ours = peers.ours(LONG, "a dog")
    left = torch.cat([peers.states(part)[0] for part in (ids[:70], ids[70:])])
    right = torch.cat([peers.states(part)[1] for part in (TOKENIZER.encode("a dog"), [])])
    assert relative(ours.crossattn[0], torch.cat([left, right], dim=-1)) < BOUND
    assert relative(ours.pooled, peers.states(TOKENIZER.encode("a dog"))[2]) < BOUND


def test_a_refiner_reads_long_weighted_prompts_with_big_g_alone(models: dict[str, Path]) -> None:
    weights = FileWeights(
        locate(str(models["refiner"]), "refiner"), device=CPU, dtype=torch.float32, vae_dtype=torch.float32
    )
    encoders = weights.text()
    big_g = transformers_big_g(encoders.embedders[0])
    with torch.no_grad():
        for syntax in ("a1111", "comfy"):
            ours = encode_text(encoders, "ignored", "a (red:1.2) cat", CPU, Reader(syntax=syntax))  # type: ignore[arg-type]
            row = TOKENIZER.row("a red cat", 0)
            theirs = big_g(torch.tensor([row]), output_hidden_states=True).hidden_states[-2]
            assert ours.crossattn.shape == theirs.shape == (1, 77, 96)
            assert relative(ours.crossattn[:, 3:], theirs[:, 3:]) < 0.1
            assert relative(ours.crossattn, theirs) > VISIBLE


@torch.no_grad()
@pytest.mark.parametrize(("positive", "negative"), [(1, 2), (3, 2), (2, 2)])
def test_the_length_of_one_side_does_not_change_the_other(peers: Peers, positive: int, negative: int) -> None:
    """Attention over the same keys n times is attention over them once."""
    torch.manual_seed(0)
    texts = [
        TextFeatures(torch.randn(1, 77 * count, 160), torch.randn(1, 96)) for count in (positive, negative)
    ]
    same = of_one_length(texts[0], texts[1])
    assert same[0].crossattn.shape == same[1].crossattn.shape
    denoise = Denoiser(Remembering(peers.weights.unet()), NoiseSchedule(), "eps")
    x, vector = torch.randn(1, 4, 8, 8), torch.randn(1, peers.weights.config.unet.adm_in_channels)
    for short, long in zip(texts, same, strict=True):
        assert torch.equal(short.pooled, long.pooled)
        alone, together = (denoise(x, 5.0, side.crossattn, vector) for side in (short, long))
        assert relative(together, alone) < BOUND


def test_both_sides_of_a_request_have_as_many_tokens(peers: Peers) -> None:
    request = GenerateRequest(prompt=LONG, negative_prompt="cat, " * 80)
    with torch.no_grad():
        prompts = encode_prompts(request, peers.weights)
        zeros = encode_prompts(GenerateRequest(prompt=LONG), peers.weights).negative.crossattn
    assert prompts.positive.crossattn.shape == prompts.negative.crossattn.shape == (1, 77 * 6, 160)
    assert zeros.shape == (1, 77 * 2, 160)
    assert zeros.abs().max() == 0


def test_tokens_are_counted_and_strictness_names_what_is_beyond() -> None:
    request = GenerateRequest(prompt=LONG + "Füße", negative_prompt="(ugly:1.2)", prompt_2="a BREAK b")
    assert token_counts(request) == {
        "prompt": (119 + len(TOKENIZER.encode("füße")), 2),
        "prompt 2": (2, 2),
        "negative prompt": (1, 1),
    }
    require_prompts_fit(request)
    strict = GenerateRequest(prompt="cat " * 75 + "Red guitar, Füße 🎸", strict_tokens=True)
    with pytest.raises(UsageError, match=r"prompt: \d+ tokens in 2 chunks.*: 'red guitar , füße 🎸'"):
        require_prompts_fit(strict)
    require_prompts_fit(GenerateRequest(prompt="cat " * 75, strict_tokens=True))

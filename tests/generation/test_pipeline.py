"""The stages of generation, with small random models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_cli.checkpoint.locate import locate
from sdxl_cli.diffusion.noise import NoiseStreams
from sdxl_cli.diffusion.samplers import SAMPLERS
from sdxl_cli.errors import NumericError
from sdxl_cli.generation import pipeline
from sdxl_cli.generation.encode import encode_prompts, guided
from sdxl_cli.generation.pipeline import Models, Picture, generate, refine, started
from sdxl_cli.generation.plan import plan_generation, plan_refinement
from sdxl_cli.generation.request import GenerateRequest, RefineRequest
from sdxl_cli.generation.start import encode_source
from sdxl_cli.generation.text_features import encode_text
from sdxl_cli.generation.weights import FileWeights, LoadedWeights

REQUEST = GenerateRequest(prompt="a red guitar", seed=5, steps=4, sampler="euler", scheduler="sgm")


class Silent:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    warn = note

    def progress(self, items: Iterable[Any], description: str, *, total: int | None = None) -> Iterator[Any]:
        self.said.append(f"{description}: {total}")
        yield from items


def weights(path: Path, *, stays: bool = True) -> FileWeights:
    return FileWeights(
        locate(str(path), "model"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        vae_dtype=torch.float32,
        stays=stays,
    )


def made(
    request: GenerateRequest, base: Path, refiner: Path | None = None, *, stays: bool = True
) -> list[Picture]:
    models = Models(
        base=weights(base, stays=stays),
        refiner=weights(refiner, stays=stays) if refiner is not None else None,
    )
    configs = [m.config for m in (models.base, models.refiner) if m is not None]
    return list(generate(plan_generation(request, *configs), models, Silent()))


def test_batch_size_and_company_never_change_a_picture(models: dict[str, Path]) -> None:
    together = made(replace(REQUEST, num_images=4, batch_size=4), models["base"])
    one_by_one = made(replace(REQUEST, num_images=4, batch_size=1), models["base"])
    alone = [made(replace(REQUEST, seed=seed), models["base"])[0] for seed in range(5, 9)]
    assert [picture.seed for picture in together] == [5, 6, 7, 8]
    for a, b, c in zip(together, one_by_one, alone, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
        assert np.array_equal(a.pixels, c.pixels)
    assert not np.array_equal(together[0].pixels, together[1].pixels)


def test_parts_that_are_freed_in_between_give_the_same_pictures(models: dict[str, Path]) -> None:
    request = replace(REQUEST, num_images=2)
    kept = made(request, models["base"], models["refiner"])
    freed = made(request, models["base"], models["refiner"], stays=False)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(kept, freed, strict=True))


def test_only_one_part_is_in_memory_when_models_do_not_stay(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The U-Net alone decides the peak."""
    loaded: list[FileWeights] = []
    held: list[int] = []
    load = FileWeights._part

    def watched(self: FileWeights, part: Any) -> Any:
        loaded.append(self)
        model = load(self, part)
        held.append(sum(len(one._loaded) for one in set(loaded)))
        return model

    monkeypatch.setattr(FileWeights, "_part", watched)
    made(replace(REQUEST, num_images=2), models["base"], models["refiner"], stays=False)
    assert set(held) == {1}


def test_a_model_in_memory_gives_what_its_file_gives(models: dict[str, Path]) -> None:
    from sdxl_cli.checkpoint.read import load_model

    files = locate(str(models["base"]))
    loaded = load_model(files, dtype=torch.float32, vae_dtype=torch.float32)
    memory = Models(base=LoadedWeights(loaded, "in training"))
    plan = plan_generation(REQUEST, files.config)
    picture = next(iter(generate(plan, memory, Silent())))
    assert np.array_equal(picture.pixels, made(REQUEST, models["base"])[0].pixels)
    assert pipeline.record(plan, memory, 5).models["base"].sha256 is None


def test_no_negative_prompt_is_zeros_for_the_base_and_an_empty_text_for_the_refiner(
    models: dict[str, Path],
) -> None:
    """facts.md section 4: the original forces zeros for the base; the refiner encodes what it is given."""
    for negative in (None, ""):
        prompts = encode_prompts(replace(REQUEST, negative_prompt=negative), weights(models["base"]))
        assert prompts.negative.crossattn.abs().max() == 0
        assert prompts.negative.pooled.abs().max() == 0
        refiner = weights(models["refiner"])
        with torch.inference_mode():
            prompts = encode_prompts(replace(REQUEST, negative_prompt=negative), refiner)
            empty = encode_text(refiner.text(), "", None, refiner.device)
        assert torch.equal(prompts.negative.crossattn, empty.crossattn)
        assert torch.equal(prompts.negative.pooled, empty.pooled)
        assert empty.pooled.abs().max() > 0


def test_a_negative_prompt_is_encoded_and_matters(models: dict[str, Path]) -> None:
    base = weights(models["base"])
    prompts = encode_prompts(replace(REQUEST, negative_prompt="blue"), base)
    assert torch.equal(
        prompts.negative.crossattn, encode_text(base.text(), "blue", None, base.device).crossattn
    )
    plain, pulled = (made(replace(REQUEST, negative_prompt=n), models["base"])[0] for n in (None, "blue"))
    assert not np.array_equal(plain.pixels, pulled.pixels)


def test_the_second_prompt_is_what_big_g_reads(models: dict[str, Path]) -> None:
    base = weights(models["base"])
    both = encode_prompts(replace(REQUEST, prompt_2="a dog"), base).positive
    first, second = (
        encode_prompts(replace(REQUEST, prompt=text), base).positive for text in ("a red guitar", "a dog")
    )
    width = base.config.clip_l.width if base.config.clip_l else 0
    assert torch.equal(both.crossattn[..., :width], first.crossattn[..., :width])
    assert torch.equal(both.crossattn[..., width:], second.crossattn[..., width:])
    assert torch.equal(both.pooled, second.pooled)


def test_sizes_are_kept_on_the_negative_side(models: dict[str, Path]) -> None:
    base, request = weights(models["base"]), replace(REQUEST, negative_original_size="16x8")
    plan = plan_generation(request, base.config)
    sides = guided(base, encode_prompts(request, base), plan.framing, request, plan.sigmas, batch=3)
    embed = base.config.big_g.embed_dim
    negative, positive = sides.vector
    assert negative.shape == (3, base.config.unet.adm_in_channels)
    assert not torch.equal(negative[:, embed : embed + 512], positive[:, embed : embed + 512])
    assert torch.equal(negative[:, embed + 512 :], positive[:, embed + 512 :])
    assert negative[:, :embed].abs().max() == 0


def test_the_refiner_continues_from_the_bases_latents_without_noise(models: dict[str, Path]) -> None:
    """Ensemble of experts: two separate walks, the second from where the first ended, with Euler's no memory."""
    base, refiner = weights(models["base"]), weights(models["refiner"])
    plan = plan_generation(replace(REQUEST, steps=10), base.config, refiner.config)
    assert (plan.base_steps, plan.steps) == (8, 10)
    report = Silent()
    with torch.inference_mode():
        run = started(plan, [5], base, encode_source(plan, base, Silent()))
        x = run.latents
        for model, steps in ((base, 8), (refiner, 2)):
            run.advance(model, encode_prompts(plan.request, model), steps, report)
        for model, sigmas in ((base, plan.sigmas[:9]), (refiner, plan.sigmas[8:])):
            prompts = encode_prompts(plan.request, model)
            denoise = guided(model, prompts, plan.framing, plan.request, plan.sigmas, batch=1)
            *_, x = plan.sampler.steps(denoise, x, sigmas, NoiseStreams([5]))
    assert torch.equal(run.latents, x)
    assert report.said == ["base, seed 5: 8", "refiner, seed 5: 2"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_solver_remembers_the_base_when_the_refiner_takes_over(
    models: dict[str, Path], sampler: str
) -> None:
    """With the same network on both sides of the cut no sampler may notice it: no noise added, nothing forgotten."""
    request = replace(REQUEST, sampler=sampler, steps=10)
    base = weights(models["base"])
    whole = list(generate(plan_generation(request, base.config), Models(base=base), Silent()))
    split = plan_generation(request, base.config, base.config)
    # those of DPM2 skip the last level above 0
    assert split.base_steps == (9 if split.sampler.skips_penultimate else 8)
    handed = list(generate(split, Models(base=base, refiner=weights(models["base"])), Silent()))
    assert np.array_equal(whole[0].pixels, handed[0].pixels)


def test_the_first_latents_have_the_originals_variance(models: dict[str, Path]) -> None:
    """x = randn · sqrt(1 + sigma²), facts.md section 5, drawn on the CPU from the picture's own seed."""
    base = weights(models["base"])
    plan = plan_generation(REQUEST, base.config)
    run = started(plan, [5, 6], base, encode_source(plan, base, Silent()))
    for latent, seed in zip(run.latents, (5, 6), strict=True):
        noise = torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(latent, noise * (1 + plan.sigmas[0] ** 2) ** 0.5)


def test_refinement_starts_from_the_picture_and_stays_near_it(models: dict[str, Path]) -> None:
    refiner = weights(models["refiner"])
    pixels = np.full((64, 96, 3), 200, np.uint8)
    plans = [
        plan_refinement(RefineRequest(prompt="x", seed=1, strength=s, steps=20, scheduler="sgm"), (64, 96))
        for s in (0.1, 0.1, 0.9)
    ]
    first, again, strong = (refine(plan, pixels, refiner, Silent()).pixels for plan in plans)
    assert first.shape == (64, 96, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, strong)


@pytest.mark.parametrize(
    ("parameter", "stage"),
    [
        (
            "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
            "the text encoders",
        ),
        ("conditioner.embedders.1.model.text_projection", "the text encoders"),
        ("model.diffusion_model.out.2.bias", r"the U-Net of the base, step 1 of 4 \(t=999\)"),
        ("first_stage_model.decoder.conv_out.bias", "the autoencoder, decoding"),
    ],
)
def test_nan_stops_the_run_and_names_the_stage(
    broken: Callable[[str], Path], parameter: str, stage: str
) -> None:
    with pytest.raises(NumericError, match=f"{stage}: gave NaN or infinity in float32"):
        made(REQUEST, broken(parameter))


def test_nan_while_encoding_a_picture_names_the_stage(broken: Callable[[str], Path]) -> None:
    model = weights(broken("first_stage_model.encoder.conv_out.bias"))
    plan = plan_refinement(RefineRequest(prompt="x", seed=1), (64, 64))
    with pytest.raises(NumericError, match="the autoencoder, encoding"):
        refine(plan, np.zeros((64, 64, 3), np.uint8), model, Silent())


def test_words_a_pruned_vocabulary_lacks_are_named(models: dict[str, Path]) -> None:
    for prompt, said in (("a red guitar", []), ("a purple zeppelin, purple", ["purple, zeppelin"])):
        report, pruned = Silent(), weights(models["pruned"])
        list(
            generate(
                plan_generation(replace(REQUEST, prompt=prompt), pruned.config), Models(base=pruned), report
            )
        )
        warnings = [text for text in report.said if "never saw" in text]
        assert len(warnings) == len(said)
        assert all(words in text for words, text in zip(said, warnings, strict=True))

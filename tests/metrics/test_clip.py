"""CLIP score against transformers, torchmetrics' formula and OpenCLIP, on small random networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.multimodal import clip_score
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sdxl_cli.errors import FileError, NetworkError, UsageError
from sdxl_cli.metrics.clip import Pixels, find_clip, load_clip

TEXTS = ["a red guitar", "two cats on a blue sofa, in the evening"]
LONG = "very " * 100 + "long"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 6, 8, 3), np.uint8)
    return [np.array(Image.fromarray(pixels).resize((80, 61), Image.Resampling.BICUBIC)) for pixels in coarse]


def test_scores_are_the_cosines_of_transformers(clip_folder: Path, pictures: list[Pixels]) -> None:
    clip = load_clip(find_clip(str(clip_folder), None), "cpu")
    found, cut = clip.scores(pictures, TEXTS)
    model, tokenizer = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    inputs = torch.stack([clip._preprocess(Image.fromarray(pixels)) for pixels in pictures])
    with torch.inference_mode():
        out = model(**tokenizer(TEXTS, padding=True, return_tensors="pt"), pixel_values=inputs)
    expected = 100 * out.logits_per_image.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-4)
    assert not cut.any()
    assert found.abs().max() > 1


def test_pictures_are_prepared_as_transformers_does_with_pillow(
    clip_folder: Path, pictures: list[Pixels]
) -> None:
    clip = load_clip(find_clip(str(clip_folder), None), "cpu")
    image = Image.fromarray(pictures[0])
    (expected,) = CLIPImageProcessor.from_pretrained(clip_folder)(image, return_tensors="pt")["pixel_values"]
    # torch's filter rounds otherwise than Pillow's: a level or two of 255
    torch.testing.assert_close(clip._preprocess(image), expected, rtol=0, atol=2.5 / 255 / 0.26)


def test_the_score_is_that_of_torchmetrics(
    clip_folder: Path, pictures: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = load_clip(find_clip(str(clip_folder), None), "cpu")
    inputs = [clip._preprocess(Image.fromarray(pixels)) for pixels in pictures]

    class Theirs(CLIPModel):  # type: ignore[misc]
        """torchmetrics expects tensors from these, as transformers gave before version 5."""

        def get_image_features(self, pixel_values: Any) -> Any:
            return self.visual_projection(self.vision_model(pixel_values).pooler_output)

        def get_text_features(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.text_projection(self.text_model(input_ids, attention_mask).pooler_output)

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)

    def processor(images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        return {"pixel_values": torch.stack(inputs)} if text is None else tokenizer(text, **kwargs)

    images = [torch.from_numpy(pixels).permute(2, 0, 1) for pixels in pictures]
    with torch.no_grad():
        expected = clip_score(images, TEXTS, lambda: (Theirs.from_pretrained(clip_folder).eval(), processor))
    found, _ = clip.scores(pictures, TEXTS)
    assert float(found.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert expected > 1


def test_a_long_text_is_cut_before_its_end_mark_and_counted(
    clip_folder: Path, pictures: list[Pixels]
) -> None:
    clip = load_clip(find_clip(str(clip_folder), None), "cpu")
    found, cut = clip.scores(pictures, [TEXTS[0], LONG])
    assert cut.tolist() == [False, True]
    # 75 words fill it: what comes after them is not read
    expected, cut = clip.scores(pictures, [TEXTS[0], "very " * 75])
    assert not cut.any()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_openclip_by_architecture_and_file(tmp_path: Path, pictures: list[Pixels]) -> None:
    torch.manual_seed(0)
    name = "test-tiny-clip"
    config = tmp_path / f"{name}.json"
    config.write_text(
        '{"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},'
        ' "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}}'
    )
    open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    files = find_clip(name, tmp_path / "weights.pt")
    found, cut = load_clip(files, "cpu").scores(pictures, [TEXTS[0], LONG])
    with torch.inference_mode():
        seen = model.encode_image(torch.stack([preprocess(Image.fromarray(p)) for p in pictures]))
        read = model.encode_text(open_clip.get_tokenizer(name)([TEXTS[0], LONG]))
    expected = 100 * nn.functional.cosine_similarity(seen, read)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    assert cut.tolist() == [False, True]
    assert files.describe()["name"] == name


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"openai/clip-vit-large-patch14 is not in the local cache"):
        find_clip(None, None)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(UsageError, match="--clip-model has to say which architecture"):
        find_clip(None, tmp_path / "weights.pt")
    with pytest.raises(UsageError, match="unknown architecture of OpenCLIP 'ViT-g-15'"):
        find_clip("ViT-g-15", tmp_path / "weights.pt")
    with pytest.raises(FileError, match="no such file of weights"):
        find_clip("ViT-g-14", tmp_path / "missing.pt")
    with pytest.raises(FileError, match=r"has no CLIP: none of model.safetensors"):
        find_clip(str(tmp_path), None)

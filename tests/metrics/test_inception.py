"""The network against torch-fidelity's, and the two ways to 299 pixels against those who have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from sdxl_cli.errors import FileError, NetworkError
from sdxl_cli.metrics.inception import find_inception, load_inception, resized


def picture(height: int, width: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Something smooth with edges and noise."""
    rng = np.random.default_rng(height)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack(
        [rows * 255 / height, columns * 255 / width, 255 * ((rows // 9 + columns // 7) % 2)], axis=2
    )
    return (base * 0.8 + rng.uniform(0, 51, base.shape)).astype(np.uint8)


def test_features_and_logits_are_those_of_torch_fidelity(inception_file: Path) -> None:
    images = np.stack([picture(80, 64), picture(80, 64)[::-1]])
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_file))
    expected = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = load_inception(inception_file)
    with torch.inference_mode():
        found = ours(torch.stack([resized(image, "tf1") for image in images]))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert expected[0].std() > 1e-3


@pytest.mark.parametrize("size", [(64, 64), (301, 511), (299, 299)])
def test_the_old_resize_is_that_of_torch_fidelity(size: tuple[int, int]) -> None:
    image = picture(*size)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(tensor, size=(299, 299), align_corners=False)[0]
    torch.testing.assert_close(resized(image, "tf1"), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (301, 511)])
def test_the_clean_resize_is_that_of_clean_fid(size: tuple[int, int]) -> None:
    image = picture(*size)
    expected = build_resizer("clean")(image)
    np.testing.assert_allclose(resized(image, "clean").permute(1, 2, 0).numpy(), expected, atol=1e-4)


def test_weights_that_are_not_here_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        NetworkError, match=r"get https://github.com/mseitzer/pytorch-fid/.*--inception-weights"
    ):
        find_inception(None)


def test_the_cache_of_torch_is_looked_into_under_both_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert find_inception(None) == path


def test_torchvisions_own_inception_is_refused(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    state["fc.weight"] = torch.zeros(1000, 2048)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(FileError, match="torchvision's, trained apart"):
        load_inception(tmp_path / "other.pth")

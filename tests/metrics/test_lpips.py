"""LPIPS against the package of its authors, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_cli.errors import FileError, NetworkError
from sdxl_cli.metrics.lpips import LPIPS, NETS, Net, load_lpips

PUBLISHED = Path(lpips.__file__).parent / "weights" / "v0.1"


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module", params=NETS)
def theirs(request: pytest.FixtureRequest) -> Any:
    """Theirs with a random trunk and the published heads."""
    torch.manual_seed(0)
    # the classifier is not used, and filling it takes seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.init, "normal_", lambda tensor, *args: tensor)
        model = lpips.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    for parameter in model.net.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
        else:
            nn.init.uniform_(parameter, -0.1, 0.1)
    return model


def pairs(size: int = 72) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    return tuple(torch.rand(2, 3, size, size + 9, generator=noise) * 2 - 1 for _ in range(2))  # type: ignore[return-value]


def saved(model: Any, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def test_distances_and_slopes_are_those_of_the_authors(theirs: Any, tmp_path: Path) -> None:
    net: Net = theirs.pnet_type
    ours = load_lpips(net, [saved(theirs, tmp_path / "whole.pth")])
    images, others = pairs()
    images.requires_grad_()
    expected = theirs(images, others).flatten()
    (slope,) = torch.autograd.grad(expected.sum(), images)
    found = ours(images, others)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), images)[0], slope, rtol=1e-4, atol=1e-8)
    assert expected.min() > 1e-3


def test_training_mode_changes_nothing(theirs: Any, tmp_path: Path) -> None:
    ours = load_lpips(theirs.pnet_type, [saved(theirs, tmp_path / "whole.pth")])
    images, others = pairs()
    assert torch.equal(ours.train()(images, others), ours.eval()(images, others))
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_trunk_from_torchvisions_file_and_heads_from_the_package(theirs: Any, tmp_path: Path) -> None:
    net: Net = theirs.pnet_type
    trunk = {
        "features." + name.partition(".")[2].partition(".")[2]: tensor
        for name, tensor in theirs.state_dict().items()
        if name.startswith("net.")
    }
    save_file(trunk, tmp_path / "trunk.safetensors")
    ours = load_lpips(net, [tmp_path / "trunk.safetensors"])
    images, others = pairs()
    torch.testing.assert_close(ours(images, others), theirs(images, others).flatten(), rtol=1e-5, atol=1e-7)


def test_weights_that_are_nowhere_are_asked_for_by_name_and_place(no_cache: Path) -> None:
    with pytest.raises(NetworkError) as error:
        load_lpips("vgg")
    told = str(error.value)
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in told
    assert str(no_cache) in told
    assert "--lpips-weights" in told
    assert "\n" not in told


def test_heads_that_are_nowhere_name_the_package(theirs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trunk = {n: t for n, t in theirs.state_dict().items() if n.startswith("net.")}
    torch.save(trunk, tmp_path / "trunk.pth")
    with pytest.raises(NetworkError, match=r"sdxl-cli\[eval\]"):
        load_lpips(theirs.pnet_type, [tmp_path / "trunk.pth"])


def test_another_file_by_the_name_of_the_published_one_is_refused(no_cache: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, no_cache / "vgg16-397923af.pth")
    with pytest.raises(FileError, match="sha256 begins with"):
        load_lpips("vgg")


def test_files_without_the_weights_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match=r"other.safetensors has no weights of LPIPS \(vgg\)"):
        load_lpips("vgg", [tmp_path / "other.safetensors"])
    with pytest.raises(FileError, match="no such file"):
        load_lpips("vgg", [tmp_path / "missing.pth"])
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(FileError, match=r"part.pth, .*vgg.pth: .* is missing"):
        load_lpips("vgg", [tmp_path / "part.pth", PUBLISHED / "vgg.pth"])


def test_a_dark_picture_has_a_slope() -> None:
    """Where a ReLU leaves nothing the root's slope would be infinite."""
    model = LPIPS("vgg")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.constant_(parameter, -9)
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(image, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()

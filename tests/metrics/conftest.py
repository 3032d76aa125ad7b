from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.metrics.networks import random_inception, write_clip


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of the published file."""
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_inception().net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP as transformers saves it."""
    return write_clip(tmp_path_factory.mktemp("clip"))

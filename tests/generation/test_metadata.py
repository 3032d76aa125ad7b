"""What pictures say of themselves, read by A1111's own rule and by ours."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sdxl_cli.errors import FileError, UsageError
from sdxl_cli.generation.metadata import ModelRecord, Record, read_record
from sdxl_cli.generation.picture import Texts, write_picture
from sdxl_cli.generation.request import GenerateRequest, RefineRequest

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""A1111's parser of the last line."""

REQUEST = GenerateRequest(
    prompt="a cat,\non a mat: soft",
    negative_prompt="ugly",
    seed=42,
    steps=30,
    size="1024x1024",
    scheduler="karras",
)
MODELS = {"base": ModelRecord("sd_xl, base: 1", "31e35c80fc" + "0" * 54)}


def record(**changes: object) -> Record:
    framing = REQUEST.framing((1024, 1024), buckets=(), multiple=32)
    made = Record(
        kind="generate", request=REQUEST, framing=framing, models=MODELS, run={}, sampler_label="DPM++ 2M"
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def fields(text: str) -> dict[str, str]:
    pairs = PAIR.findall(text.splitlines()[-1])
    return {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def test_a1111_text_reads_back_by_its_own_rule() -> None:
    text = record().parameters()
    assert text.startswith("a cat,\non a mat: soft\nNegative prompt: ugly\nSteps: 30, Sampler: DPM++ 2M, ")
    assert fields(text) == {
        "Steps": "30",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "5",
        "Seed": "42",
        "Size": "1024x1024",
        "Model hash": "31e35c80fc",
        "Model": "sd_xl, base: 1",
        "RNG": "CPU",
        "Version": "sdxl 0.1.0",
    }


def test_refiner_and_vae_are_named_with_their_hashes() -> None:
    models = {
        **MODELS,
        "refiner": ModelRecord("sd_xl_refiner_1.0", "7440042bbd" + "0" * 54),
        "vae": ModelRecord("sdxl_vae", "63aeecb90f" + "0" * 54),
    }
    found = fields(record(models=models).parameters())
    assert found["Refiner"] == "sd_xl_refiner_1.0 [7440042bbd]"
    assert found["Refiner switch at"] == "0.8"
    assert (found["VAE"], found["VAE hash"]) == ("sdxl_vae", "63aeecb90f")


def test_a_refined_picture_says_its_strength() -> None:
    request = RefineRequest(prompt="a cat", strength=0.25, seed=1)
    models = {"refiner": ModelRecord("r", None)}
    found = fields(record(kind="refine", request=request, models=models).parameters())
    assert found["Denoising strength"] == "0.25"
    assert "Model hash" not in found


def test_our_record_comes_back_from_a_file(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), record().texts())
    stored = read_record(tmp_path / "p.png")
    assert stored is not None
    assert stored.request == REQUEST
    assert stored.models == MODELS
    assert stored.raw["resolved"]["original_size"] == {"height": 1024, "width": 1024}
    assert stored.raw["resolved"]["crop_top_left"] == {"top": 0, "left": 0}


def test_a_picture_of_another_program_has_no_record(tmp_path: Path) -> None:
    write_picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), Texts(parameters="a cat"))
    assert read_record(tmp_path / "p.png") is None


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": 1, "kind": "generate", "models": 3}'])
def test_a_damaged_record_is_a_file_error(tmp_path: Path, damage: str) -> None:
    write_picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), Texts(record=damage))
    with pytest.raises(FileError, match="metadata is damaged"):
        read_record(tmp_path / "p.png")


def test_a_record_of_a_later_version_says_so(tmp_path: Path) -> None:
    later = json.loads(record().to_json()) | {"format": 2, "sdxl": "9.0"}
    write_picture(tmp_path / "p.png", np.zeros((8, 8, 3), np.uint8), Texts(record=json.dumps(later)))
    with pytest.raises(FileError, match=r"later version of sdxl \(9.0\)"):
        read_record(tmp_path / "p.png")
    odd = json.loads(record().to_json())
    odd["request"]["stepps"] = 3
    write_picture(tmp_path / "q.png", np.zeros((8, 8, 3), np.uint8), Texts(record=json.dumps(odd)))
    with pytest.raises(UsageError, match="did you mean steps"):
        read_record(tmp_path / "q.png")

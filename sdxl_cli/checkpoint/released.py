"""The released files: where they are on the hub, and the hashes they are known by (facts.md section 2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Released:
    """One file of the Hugging Face hub."""

    repo: str
    file: str
    sha256: str | None = None
    """Of the file as it was released; None where only the hub knows it."""


RELEASED: dict[str, Released] = {
    "base": Released(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0.safetensors",
        "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b",
    ),
    "refiner": Released(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "sd_xl_refiner_1.0.safetensors",
        "7440042bbdc8a24813002c09b6b69b64dc90fded4472613437b7f55f9b7d9c5f",
    ),
    "vae": Released(
        "stabilityai/sdxl-vae",
        "sdxl_vae.safetensors",
        "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e",
    ),
}
"""What may be typed for the released models."""


def name_of(sha256: str) -> str | None:
    """``sd_xl_base_1.0`` for the hash of that file, None for any other."""
    files = (known.file for known in RELEASED.values() if known.sha256 == sha256)
    return next((file.removesuffix(".safetensors") for file in files), None)

"""The files of one model, before anything of them is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.checkpoint.diffusers_folder import Component
from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.checkpoint.hub import blob_sha256, user_cache
from sdxl_cli.checkpoint.identify import Identity, Layout, Prediction
from sdxl_cli.errors import FileError, SdxlError
from sdxl_cli.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """Where a model is and what it is. Nothing but tables of contents has been read."""

    name: str
    """For people and for A1111's ``Model:``, such as ``sd_xl_base_1.0``."""
    path: Path
    """The file or folder."""
    layout: Layout
    components: tuple[Component, ...]
    identity: Identity
    config: ModelConfig
    is_bundled: bool = False
    origin: str = ""
    """Where it was found when nobody gave a path: ``the local Hugging Face cache``."""
    vae: ModelFiles | None = None
    """Another model whose autoencoder takes the place of this one's."""

    @property
    def prediction(self) -> Prediction:
        """What the U-Net predicts: the noise (``eps``) or the velocity (``v``)."""
        return self.identity.prediction

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file of tensors."""
        return tuple(path for component in self.components for path in component.paths)

    @property
    def size(self) -> int:
        """Bytes of all files of tensors."""
        return sum(path.stat().st_size for path in self.paths)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file in 64 hexadecimal digits; of a folder, that of its first U-Net file.

        Known at once for files of the Hugging Face cache, otherwise computed once and remembered in the user's
        cache folder by path, size and time of change. Takes a few seconds for 7 GB.
        """
        path = self.paths[0]
        return blob_sha256(path) or remembered_sha256(path)

    @property
    def short_hash(self) -> str:
        """A1111's model hash: the first 10 digits of :attr:`sha256`."""
        return self.sha256[:10]

    def with_vae(self, vae: ModelFiles) -> ModelFiles:
        """The same model with the autoencoder, and its scale factor, of another one.

        Raises:
            FileError: the two have different latents.
        """
        mine, other = self.config.vae, vae.config.vae
        if (mine.z_channels, mine.downsampling) != (other.z_channels, other.downsampling):
            raise FileError(
                f"{vae.path}: its VAE makes latents of {other.z_channels} channels at 1/{other.downsampling}, "
                f"{self.name} wants {mine.z_channels} at 1/{mine.downsampling}"
            )
        return replace(self, config=replace(self.config, vae=other), vae=vae)

    def describe(self, flag: str = "--model") -> str:
        """One line: what it is, where it is, how big. ``flag`` is the one that would name another model."""
        side = self.config.native_size
        if self.is_bundled:
            return (
                f"the bundled tiny model ({self.identity.parameters / 1e6:.0f} M parameters, {side}x{side}); "
                f"for SDXL itself give {flag} FILE"
            )
        where = f" from {self.origin}" if self.origin else f" at {self.path}"
        return f"{self.name}, {self.identity.label}, {format_bytes(self.size)}{where}"


def remembered_sha256(path: Path, *, body: bool = False) -> str:
    """Hash of a file, computed once and remembered in the user's cache folder.

    Args:
        path: the file.
        body: of a safetensors file, hash the tensors alone, without the table of contents.
    """
    status = path.stat()
    key = f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}" + (":body" if body else "")
    store = user_cache() / "sdxl" / "sha256.json"
    known = _read_store(store)
    if key not in known:
        with path.open("rb") as file:
            if body:
                file.seek(int.from_bytes(file.read(8), "little") + 8)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        known = {**known, key: digest}
        try:
            with atomic_write(store) as temporary:
                temporary.write_text(json.dumps(known, indent=1), "utf-8")
        except (OSError, SdxlError):  # a read-only home costs the next run some seconds, no more
            return digest
    return known[key]


def _read_store(store: Path) -> Mapping[str, str]:
    try:
        known = json.loads(store.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}

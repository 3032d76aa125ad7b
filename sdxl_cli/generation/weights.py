"""The networks of a model, when they are needed: read part by part from its file, or at hand already."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Protocol

import torch
from sdxl_kernels import cuda_norm
from sdxl_kernels.processor import cpu_has_bf16

from sdxl_cli.checkpoint.files import ModelFiles
from sdxl_cli.checkpoint.lora import LoraMerge, WornLora
from sdxl_cli.checkpoint.read import load_model, stored_dtype
from sdxl_cli.diffusion.formulation import Formulation
from sdxl_cli.generation.allocator import give_back
from sdxl_cli.generation.metadata import LoraRecord, ModelRecord
from sdxl_cli.generation.observe import stage
from sdxl_cli.generation.remember import RecordedSteps
from sdxl_cli.generation.streaming import stream
from sdxl_cli.model.conditioning import Conditioner
from sdxl_cli.model.config import ModelConfig, Part
from sdxl_cli.model.prepacked import prepack_linears
from sdxl_cli.model.sdxl import SDXL
from sdxl_cli.model.unet import UNet
from sdxl_cli.model.vae import Autoencoder


class Weights(Protocol):
    """A model whose parts can be asked for; asking for one may let go of the others."""

    config: ModelConfig
    formulation: Formulation
    device: torch.device
    dtype: torch.dtype
    """Of the U-Net and the text encoders."""
    vae_dtype: torch.dtype
    known_token_ids: frozenset[int] | None
    """What the text encoders know, once they were asked for; None: every token."""
    stays: bool
    """Whether parts remain loaded, so that going back to one costs nothing."""
    streams: bool
    """Whether of the U-Net one block is loaded at a time."""
    winograd: bool
    """Whether a CPU may compute convolutions with fewer multiplications."""
    recorded: RecordedSteps | None
    """Replays the steps of the U-Net that :meth:`unet` gave last, where that is faster."""
    loras: Sequence[WornLora]
    """What changes the weights, in order."""

    def text(self) -> Conditioner:
        """The text encoders."""
        ...

    def unet(self) -> UNet:
        """The denoising network."""
        ...

    def vae(self) -> Autoencoder:
        """The autoencoder."""
        ...

    def release(self) -> None:
        """Let go of whatever need not stay."""
        ...

    def forget(self) -> None:
        """Let go of everything: another model is next."""
        ...

    def records(self, role: str) -> dict[str, ModelRecord]:
        """What a picture remembers of this model: its name and hash under ``role``, and of a foreign VAE."""
        ...


class FileWeights:
    """Reads one part at a time, so that the largest alone decides how much memory is needed."""

    def __init__(
        self,
        files: ModelFiles,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vae_dtype: torch.dtype,
        stays: bool = False,
        streams: bool = False,
        winograd: bool = True,
        prepacks: bool = False,
        cuda_graphs: bool = True,
        compiles: bool = False,
        report: object = None,
    ) -> None:
        """``report``, when it is an observer, sees how long reading takes.

        Two flags say what is in memory: with ``stays`` every part, once loaded; with ``streams`` of the U-Net one
        block, while it is computed. Four say how it is computed: ``winograd``, on a CPU, with fewer multiplications;
        ``prepacks``, there too, linear layers as it multiplies them; ``cuda_graphs``, on a GPU, recorded and
        replayed; ``compiles``, by torch's compiler.
        """
        self._report = report
        self.files, self.config = files, files.config
        self.formulation = Formulation(files.prediction, files.identity.zero_terminal_snr)
        self.device, self.dtype, self.vae_dtype = device, dtype, vae_dtype
        self.stays, self.streams, self.winograd = stays, streams, winograd
        self.prepacks, self.cuda_graphs, self.compiles = prepacks, cuda_graphs, compiles
        self.recorded: RecordedSteps | None = None
        self.known_token_ids: frozenset[int] | None = None
        self.loras: Sequence[WornLora] = ()
        self._loaded: dict[Part, SDXL] = {}

    def wear(self, loras: Sequence[WornLora]) -> None:
        """Change the weights by these LoRAs, and by no others, from the next time a part is asked for."""
        self._loaded = {part: model for part, model in self._loaded.items() if part == "vae"}
        self.recorded = None
        self.loras = tuple(loras)

    def text(self) -> Conditioner:
        """The text encoders; sets ``known_token_ids``."""
        model = self._part("text")
        self.known_token_ids = model.known_token_ids
        return model.conditioner

    def unet(self) -> UNet:
        """The denoising network."""
        if "unet" not in self._loaded:
            self._set_up(self._part("unet").unet)
        return self._part("unet").unet

    def _set_up(self, unet: UNet) -> None:
        """Choose how a U-Net that was just read is computed."""
        # the compiler traces torch's own convolutions whole, and ours in fragments
        unet.compute_fast(convolves_fast(self, self.dtype) and not self.compiles)
        if self.compiles:
            unet.compile_blocks()
        elif self.prepacks and not self.streams:
            prepack_linears(unet)
        else:
            compute_on_gpu(unet, self.device, self.dtype, streams=self.streams)
        if self.cuda_graphs and self.device.type == "cuda" and not self.streams:
            self.recorded = RecordedSteps(unet)

    def vae(self) -> Autoencoder:
        """The autoencoder."""
        vae = self._part("vae").vae
        if not vae.channels_last and channels_last_pays(self.device, self.vae_dtype):
            vae.lay_channels_last()
        return vae

    def release(self) -> None:
        """Free everything, unless this model stays."""
        if not self.stays:
            self.forget()

    def forget(self) -> None:
        """Free everything."""
        if not self._loaded:
            return
        self._loaded.clear()
        self.recorded = None
        gc.collect()
        give_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def records(self, role: str) -> dict[str, ModelRecord]:
        """See :class:`Weights`. The first time, hashing a large file takes seconds."""
        found = {role: ModelRecord(self.files.name, self.files.sha256)}
        if self.files.vae is not None:
            found["vae"] = ModelRecord(self.files.vae.name, self.files.vae.sha256)
        return found

    def _part(self, part: Part) -> SDXL:
        if part not in self._loaded:
            self.release()
            with stage(self._report, "load"):
                self._loaded[part] = self._streamed() if self.streams and part == "unet" else self._load(part)
        return self._loaded[part]

    def _load(self, part: Part, dtype: torch.dtype | None = None, device: torch.device | None = None) -> SDXL:
        return load_model(
            self.files,
            (part,),
            dtype=dtype or self.dtype,
            vae_dtype=self.vae_dtype,
            device=device or self.device,
            merge=LoraMerge(self.loras) if self.loras else None,
        )

    def _streamed(self) -> SDXL:
        """The U-Net as it is stored, which as pages of the file takes no memory, and its blocks on their way."""
        stored = stored_dtype(self.files, "unet")
        # numbers of one byte have scales beside them; what a LoRA adds would be rounded to what is stored
        stored = self.dtype if self.loras or stored.itemsize == 1 else stored
        model = self._load("unet", stored, torch.device("cpu"))
        stream(
            model.unet, self.device, self.dtype, joined=joins_projections(self.device) and not self.compiles
        )
        return model


class LoadedWeights:
    """A model in memory, such as one in training."""

    stays = True
    streams = False
    winograd = True
    recorded: RecordedSteps | None = None
    loras: Sequence[WornLora] = ()

    def __init__(self, model: SDXL, name: str, *, formulation: Formulation | None = None) -> None:
        self.model, self.name, self.config = model, name, model.config
        self.formulation = formulation or Formulation()
        unet, vae = next(model.unet.parameters()), next(model.vae.parameters())
        self.device, self.dtype, self.vae_dtype = unet.device, unet.dtype, vae.dtype
        self.known_token_ids = model.known_token_ids

    def text(self) -> Conditioner:
        """The text encoders."""
        return self.model.conditioner

    def unet(self) -> UNet:
        """The denoising network; until :meth:`release`, it is computed as one from a file is."""
        self.model.unet.compute_fast(convolves_fast(self, self.dtype))
        return self.model.unet

    def vae(self) -> Autoencoder:
        """The autoencoder."""
        return self.model.vae

    def release(self) -> None:
        """Nothing is freed: the model belongs to somebody else, and is given back as it was."""
        self.model.unet.compute_fast(False)

    def forget(self) -> None:
        """As :meth:`release`."""
        self.release()

    def records(self, role: str) -> dict[str, ModelRecord]:
        """See :class:`Weights`; a model that is not a file has no hash."""
        return {role: ModelRecord(self.name, None)}


def convolves_fast(weights: Weights, dtype: torch.dtype) -> bool:
    """Whether networks of a model are to convolve with fewer multiplications, when computed in ``dtype``."""
    # bf16 gains nothing from it where the processor does not compute in it
    native = dtype != torch.bfloat16 or cpu_has_bf16()
    return weights.winograd and weights.device.type == "cpu" and native


def compute_on_gpu(unet: UNet, device: torch.device, dtype: torch.dtype, *, streams: bool = False) -> None:
    """Let a U-Net be computed as GPUs like it; elsewhere nothing happens. ``streams``: see :class:`FileWeights`."""
    if channels_last_pays(device, dtype):
        if streams:  # kernels are pages of the file
            unet.channels_last = True
        else:
            unet.lay_channels_last()
    if joins_projections(device) and not streams:
        unet.join_projections()


def channels_last_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether networks are to have channels last in memory: where the group norm between convolutions leaves it so."""
    wanted = device.type == "cuda" and dtype in cuda_norm.WANTED
    return wanted and not isinstance(cuda_norm.ready(device, dtype), str)


def joins_projections(device: torch.device) -> bool:
    """Whether queries, keys and values of a picture are one product: on a GPU fewer and larger ones take less time."""
    return device.type == "cuda"


def lora_records(loras: Sequence[WornLora], role: str) -> list[LoraRecord]:
    """What a picture remembers of the LoRAs on the model of this role."""
    return [
        LoraRecord(
            name=worn.fitted.lora.name,
            sha256=worn.fitted.lora.sha256,
            short_hash=worn.fitted.lora.short_hash,
            scale=worn.scale,
            text_scale=worn.text_scale,
            model=role,
        )
        for worn in loras
    ]

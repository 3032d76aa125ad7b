"""What a user asks for: everything that is needed to make a picture, and to make it again.

A request says things as people type them (sizes ``WxH``, names of samplers, paths of models); ``None`` is "what the
model does by itself". :meth:`GenerateRequest.framing` turns the sizes into numbers once the model is known.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeVar

from sdxl_cli.errors import UsageError
from sdxl_cli.generation import guidance_texts
from sdxl_cli.generation.chunks import Chunk
from sdxl_cli.generation.embeddings import open_book, split_spec
from sdxl_cli.generation.lora import has_tags, take_tags
from sdxl_cli.generation.prompt import MAX_TOKENS, Tokenizer
from sdxl_cli.generation.prompt_syntax import Emphasis, Syntax
from sdxl_cli.generation.reading import Reader
from sdxl_cli.generation.sizes import (
    LARGEST_SIDE,
    Size,
    format_size,
    output_size,
    parse_corner,
    parse_size,
    require_multiple,
)

Precision = Literal["auto", "fp32", "bf16", "fp16"]
ResizeMode = Literal["crop", "pad", "stretch", "fit"]
MaskContent = Literal["original", "noise"]
Upscaler = Literal["latent", "lanczos"]
RefinerMode = Literal["ensemble", "sdedit"]
Vram = Literal["auto", "high", "med", "low"]
Prepack = Literal["auto", "on", "off"]
RANDOM_SEED = -1
LARGEST_SEED = 2**32 - 1
"""Seeds drawn for ``-1`` are below this, so that other front ends can be given them."""

_NEEDS = {
    "init_img": ("strength", "exact_steps", "resize_mode", "mask", "outpaint"),
    "mask": ("invert_mask", "only_masked"),
    "hires_scale": ("hires_steps",),
    "refiner": ("refiner_strength",),
}
"""Field -> those that say something about it only."""
_EITHER_OR = (
    ("only_masked", "outpaint"),
    ("only_masked", "resize_mode"),
    ("hires_scale", "mask"),
    ("hires_scale", "outpaint"),
)


@dataclass(frozen=True, slots=True)
class Framing:
    """The sizes of a picture and of what the model is told about it. (height, width), (top, left), in pixels."""

    size: Size
    original_size: Size
    crop_top_left: tuple[int, int]
    target_size: Size
    negative_original_size: Size
    negative_crop_top_left: tuple[int, int]
    negative_target_size: Size

    def named(self) -> dict[str, dict[str, int]]:
        """For JSON, with every number named: front ends disagree about the order."""
        corner, size = ("top", "left"), ("height", "width")
        return {
            name: dict(zip(corner if name.endswith("top_left") else size, pair, strict=True))
            for name, pair in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """What ``generate`` and ``refine`` have in common. The defaults are those of the shipped presets."""

    prompt: str
    negative_prompt: str | None = None
    """What the picture should not be. Without one, ``empty_negative`` decides."""
    negative_prompt_2: str | None = None
    """The negative prompt that bigG reads. None: the same as CLIP-L's."""
    empty_negative: Literal["zeros", "encode"] = "zeros"
    """What a base gets without a negative prompt: zeros, as in the original, or the empty text, encoded, as in
    ComfyUI. A refiner always gets the empty text."""
    prompt_2: str | None = None
    """The prompt that the bigG text encoder reads. None: the same as CLIP-L's."""
    prompt_syntax: Syntax = "a1111"
    """How brackets in prompts are read; see :func:`sdxl_cli.generation.prompt_syntax.parse`."""
    emphasis: Emphasis = "original"
    """What A1111's weights do to the features; see :func:`sdxl_cli.generation.emphasis.a1111`."""
    clip_skip: int = 2
    """The layer of both text encoders that is read, counted from the end: 1 is the last, 2 SDXL's own."""
    strict_tokens: bool = False
    """Whether a prompt of more than one chunk of 75 tokens is refused."""
    embedding: tuple[str, ...] = ()
    """Textual inversion files, ``FILE`` or ``FILE:NAME``."""
    embeddings_dir: str | None = None
    """A folder of more of them, each called by its file's name."""
    model: str | None = None
    """File, diffusers folder or name of the model. None: the released one, else the bundled one."""
    vae: str | None = None
    """File or folder of another autoencoder. None: the model's own."""
    lora: tuple[str, ...] = ()
    """LoRAs in order, each ``FILE[:SCALE[:TEXT_SCALE]]``. Tags in the prompts, ``<lora:name:0.8>``, end up here."""
    lora_dir: str = "loras"
    """Folder in which LoRAs are looked for by name."""
    steps: int = 30
    cfg_scale: float = 5.0
    """Strength of classifier-free guidance; 1 turns it off, and so does 0, as in diffusers."""
    cfg_rescale: float = 0.0
    """How far guidance's gain in contrast is taken back, 0 … 1 (arXiv 2305.08891, section 3.4)."""
    cfg_interval: str | None = None
    """``LO:HI``, shares of the noise levels (0 is no noise), or ``sigma=LO:HI``: guidance only there. None:
    everywhere."""
    cfg_schedule: str = guidance_texts.CONSTANT
    """How the strength goes along the run: constant; linear or cosine, from cfg_scale to 1; linear-up or cosine-up,
    from 1 to cfg_scale; or a list of strengths, ``7,5,3``, spread over the steps."""
    adm_scale: str | None = None
    """``POSITIVE:NEGATIVE:SHARE``: the original sizes told to both sides times these, for the first share of the
    noise levels (Fooocus: 1.5:0.8:0.3)."""
    prediction: Literal["auto", "eps", "v", "x0"] = "auto"
    """What the U-Net predicts. auto: what its file says."""
    zero_terminal_snr: bool | None = None
    """Whether it was trained down to pure noise. None: what its file says."""
    sampler: str = "dpmpp_2m"
    scheduler: str = "auto"
    """``auto``: the one that the sampler's name says, or that suits it."""
    sigmas: str | None = None
    """The noise levels one by one, with commas between. They take the place of scheduler and steps."""
    timesteps: str | None = None
    """The same, as places 999 … 0 among the model's levels."""
    eta: float | None = None
    """Share of fresh noise. None: what is usual for the sampler; likewise the next two."""
    s_noise: float | None = None
    """How strong added noise is."""
    s_churn: float | None = None
    """Noise added before steps, over all of them."""
    seed: int = RANDOM_SEED
    """Of the first picture; the others count up from it. -1 draws one."""
    original_size: str | None = None
    """WxH before resizing, as the model is told. None: the output size. The other sizes likewise."""
    crop_top_left: str = "0,0"
    target_size: str | None = None
    aesthetic_score: float = 6.0
    negative_original_size: str | None = None
    """None: as for the prompt. The other negative ones likewise."""
    negative_crop_top_left: str | None = None
    negative_target_size: str | None = None
    negative_aesthetic_score: float = 2.5
    device: str = "auto"
    dtype: Precision = "auto"
    vae_dtype: Precision = "auto"
    vram: Vram = "auto"
    """How much stays loaded: ``high`` all, ``med`` one part at a time, ``low`` of the U-Net one block."""
    vae_tiling: bool = False
    """Decode and encode in overlapping tiles from the start; they come by themselves when memory runs out."""
    winograd: bool = True
    """On a CPU, convolutions with fewer multiplications where that is faster: exact algebra, rounded otherwise."""
    prepack: Prepack = "auto"
    """On a CPU, lay the U-Net's linear layers out as it multiplies them: ``auto`` where that is known to be faster."""
    cuda_graphs: bool = True
    """On a GPU, record the first step of each shape and replay it."""
    compile: bool = False
    """Let torch compile the blocks of the U-Net: minutes before the first step, for a little at each."""

    def __post_init__(self) -> None:
        self._take_lora_tags()
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: at least 1 is needed")
        guidance_texts.check(self)
        if self.clip_skip < 1:
            raise ValueError(f"clip_skip {self.clip_skip}: 1 is the last layer, 2 SDXL's own")
        if self.emphasis != "original" and self.prompt_syntax != "a1111":
            raise ValueError(
                f"emphasis {self.emphasis} is A1111's; prompt_syntax {self.prompt_syntax} has no such choice"
            )
        if not RANDOM_SEED <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed}: must be 0 to 2**63 - 1, or -1 for a random one")

    def texts(self) -> dict[str, str]:
        """All prompts there are, by what they are called in messages."""
        named = {
            "prompt": self.prompt,
            "prompt 2": self.prompt_2,
            "negative prompt": self.negative_prompt,
            "negative prompt 2": self.negative_prompt_2,
        }
        return {name: text for name, text in named.items() if text is not None}

    def reader(self) -> Reader:
        """How these prompts are to be read.

        Raises:
            FileError: a file of a learned embedding, or the folder of them, is missing.
            UsageError: two embeddings have one name.
        """
        book = open_book(self.embedding, self.embeddings_dir)
        return Reader(self.prompt_syntax, self.emphasis, self.clip_skip, book)

    def _take_lora_tags(self) -> None:
        """A request has its LoRAs in one place, and a prompt is what the text encoders read."""
        for name in ("prompt", "prompt_2"):
            text, uses = take_tags(getattr(self, name) or "")
            if uses:
                object.__setattr__(self, name, text)
                object.__setattr__(self, "lora", (*self.lora, *uses))
        if has_tags(f"{self.negative_prompt} {self.negative_prompt_2}"):
            raise UsageError(
                "negative prompt: a LoRA changes the model, for both prompts; name it in the prompt or with --lora"
            )

    def frame(self, size: Size) -> Framing:
        """The sizes the model is told, for a picture of ``size``.

        Raises:
            UsageError: a size or a crop is not one.
        """
        original = _size_or(self.original_size, "--original-size", size)
        target = _size_or(self.target_size, "--target-size", size)
        crop = parse_corner(self.crop_top_left, "--crop-top-left")
        negative_crop = self.negative_crop_top_left
        return Framing(
            size=size,
            original_size=original,
            crop_top_left=crop,
            target_size=target,
            negative_original_size=_size_or(
                self.negative_original_size, "--negative-original-size", original
            ),
            negative_crop_top_left=crop
            if negative_crop is None
            else parse_corner(negative_crop, "--negative-crop-top-left"),
            negative_target_size=_size_or(self.negative_target_size, "--negative-target-size", target),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest(SamplingRequest):
    """Text to picture."""

    refiner: str | None = None
    """File, folder or name of the refiner. None: the base does all steps."""
    refiner_switch_at: float = 0.8
    """Share of the noise levels that the base removes before the refiner takes over, 0 … 1."""
    refiner_mode: RefinerMode = "ensemble"
    """``ensemble``: it continues where the base stops. ``sdedit``: the base finishes, and it goes over that again."""
    refiner_strength: float | None = None
    """With ``sdedit``, share of the noise levels gone through again, 0 … 1. None: 0.3."""
    hires_scale: float | None = None
    """How many times larger, per side, a second pass makes the picture. None: there is no second pass."""
    hires_steps: int | None = None
    """Steps of the second pass that are run. None: as many as ``steps``."""
    hires_denoising_strength: float = 0.7
    """Share of the noise levels the second pass goes through, 0 … 1."""
    hires_upscaler: Upscaler = "latent"
    size: str | None = None
    """``WxH``, or a ratio such as ``16:9``. None: the square the model was trained on."""
    width: int | None = None
    height: int | None = None
    """Each wins over ``size``."""
    num_images: int = 1
    batch_size: int = 1
    """Pictures denoised together on an accelerator; on the CPU always one by one."""
    init_img: str | None = None
    """The picture to start from. None: noise alone."""
    strength: float | None = None
    """Share of the noise levels gone through, 0 … 1. None: 0.75, and 1 with ``outpaint``."""
    exact_steps: bool = False
    """Whether ``steps`` is the number that is run, instead of that of which ``strength`` leaves a share."""
    resize_mode: ResizeMode | None = None
    """How ``init_img`` is brought to ``size``, when that is given. None: ``crop``."""
    background: str = "white"
    """What shows through transparent parts of ``init_img``, and around it with ``resize_mode`` ``pad``."""
    mask: str | None = None
    """A picture of what to repaint: white is."""
    invert_mask: bool = False
    """Repaint what is black instead."""
    mask_blur: int = 4
    """Pixels inside the mask's edge over which the new picture fades in."""
    mask_content: MaskContent = "original"
    """What the repainted part starts from, below the noise."""
    only_masked: bool = False
    """Work on the masked part alone, enlarged to ``size`` or the model's own area."""
    mask_padding: int = 32
    """Pixels around the masked part that ``only_masked`` shows the model."""
    outpaint: str | None = None
    """``LEFT,TOP,RIGHT,BOTTOM``: pixels to add around ``init_img``."""

    def __post_init__(self) -> None:
        # slots=True makes a new class, which zero-argument super() does not know
        SamplingRequest.__post_init__(self)
        if not 0 < self.refiner_switch_at <= 1:
            raise ValueError(f"refiner_switch_at {self.refiner_switch_at}: must be above 0, and at most 1")
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1 is needed")
        for name in ("width", "height"):
            pixels = getattr(self, name)
            if pixels is not None and not 0 < pixels <= LARGEST_SIDE:
                raise ValueError(f"{name} {pixels}: expected 1 to {LARGEST_SIDE} pixels")
        if self.init_img is not None and self.size is None and (self.width is None) != (self.height is None):
            raise ValueError("--width and --height: with --init-img give both, or --size")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength}: must be above 0, and at most 1")
        for name in ("refiner_strength", "hires_denoising_strength"):
            if not 0 < (getattr(self, name) or 1) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be above 0, and at most 1")
        if self.hires_scale is not None and not 1 < self.hires_scale <= 8:
            raise ValueError(f"hires_scale {self.hires_scale}: must be above 1, and at most 8")
        if self.hires_steps is not None and self.hires_steps < 1:
            raise ValueError(f"hires_steps {self.hires_steps}: at least 1 is needed")
        for name in ("mask_blur", "mask_padding"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: must be 0 or more pixels")
        for needed, names in _NEEDS.items():
            for name in names:
                if getattr(self, name) not in (None, False) and getattr(self, needed) is None:
                    raise ValueError(f"{name} has no meaning without {needed}")
        for one, other in _EITHER_OR:
            if all(getattr(self, name) not in (None, False) for name in (one, other)):
                raise ValueError(f"{one} and {other} do not go together")

    def framing(self, native: Size, *, buckets: Sequence[Size], multiple: int) -> Framing:
        """All sizes as numbers.

        Args:
            native: the size made when nothing is asked for.
            buckets: the sizes the model was trained on, for ratios.
            multiple: what both sides must be multiples of.

        Raises:
            UsageError: a size is not one, or not one this model can make.
        """
        size = output_size(self.size, "--size", buckets=buckets, multiple=multiple) if self.size else native
        if self.width is not None or self.height is not None:
            size = (self.height or size[0], self.width or size[1])
            require_multiple(size, "--width/--height", multiple)
        return self.frame(size)

    @property
    def share_of_noise(self) -> float:
        """How much of the noise levels is gone through, 0 … 1."""
        if self.init_img is None:
            return 1.0
        return self.strength or (0.75 if self.outpaint is None else 1.0)

    @property
    def asks_size(self) -> bool:
        """Whether a size is given, in whichever way."""
        return any(value is not None for value in (self.size, self.width, self.height))

    def fixed(self, size: Size) -> GenerateRequest:
        """The same request with what was left to chance or to the model written down: seed and size."""
        if self.init_img is not None and not self.asks_size:
            return with_seed(self)  # the size is the picture's
        return replace(with_seed(self), size=format_size(size), width=None, height=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefineRequest(SamplingRequest):
    """A finished picture, some noise, and the last steps again (SDEdit with the refiner)."""

    strength: float = 0.3
    """Share of the noise levels that are gone through again, 0 … 1."""

    def __post_init__(self) -> None:
        SamplingRequest.__post_init__(self)
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength}: must be above 0, and at most 1")


Request = TypeVar("Request", bound=SamplingRequest)


def with_seed(request: Request) -> Request:
    """The request itself, or with a drawn seed where it asked for a random one."""
    if request.seed != RANDOM_SEED:
        return request
    return replace(request, seed=random.SystemRandom().randint(0, LARGEST_SEED))


def require_prompts_fit(request: SamplingRequest) -> None:
    """Refuse prompts that cannot be read as they are meant; nothing is ever cut off.

    Raises:
        UsageError: one asks for something this program does not do, or mentions an embedding that is not there; or
            one is longer than what the encoders read at a time, and ``strict_tokens`` is set.
        FileError: a file of a learned embedding is missing, damaged or for another architecture.
    """
    reader = request.reader()
    for name, text in request.texts().items():
        chunks = reader.chunks(text, name)
        if request.strict_tokens and len(chunks) > 1:
            raise UsageError(f"{name}: {_beyond(chunks)}")


def token_counts(request: SamplingRequest) -> dict[str, tuple[int, int]]:
    """Tokens and chunks of every prompt, by what it is called; CLIP-L and bigG count the same.

    Raises:
        UsageError, FileError: as :func:`require_prompts_fit`.
    """
    reader = request.reader()
    read = {name: reader.chunks(text, name) for name, text in request.texts().items()}
    return {name: (sum(len(chunk.tokens) for chunk in chunks), len(chunks)) for name, chunks in read.items()}


def unmentioned(request: SamplingRequest) -> list[str]:
    """Names of embeddings that were given, one by one, and that no prompt mentions."""
    mentioned = request.reader().embeddings(request.texts())
    return [name for _, name in map(split_spec, request.embedding) if name not in mentioned]


def _beyond(chunks: Sequence[Chunk]) -> str:
    ids = [token.id for chunk in chunks[1:] for token in chunk.tokens if token.vector is None]
    total = sum(len(chunk.tokens) for chunk in chunks)
    return (
        f"{total} tokens in {len(chunks)} chunks of {MAX_TOKENS}, and --strict-tokens allows one; shorten it: "
        f"this is beyond the first: {Tokenizer.default().text(ids)!r}"
    )


def _size_or(text: str | None, name: str, default: Size) -> Size:
    return default if text is None else parse_size(text, name)

"""Opening pictures that may be anything: upright 8-bit sRGB without alpha, or a refusal with a name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

if TYPE_CHECKING:
    from sdxl_cli.data.buckets import Size

Reason = Literal[
    "missing",
    "unreadable",
    "empty",
    "not_an_image",
    "truncated",
    "damaged",
    "too_many_pixels",
    "animated",
    "unknown_depth",
    "crashed",
    "changed",
]
"""Why a file is refused."""

REASONS: dict[str, str] = {
    "missing": "the table names a file that is not there",
    "unreadable": "the file may not be read",
    "empty": "the file has no bytes",
    "not_an_image": "no known picture format",
    "truncated": "the file ends too early",
    "damaged": "the picture data is broken",
    "too_many_pixels": "more pixels than max_pixels: a decompression bomb, or a huge scan",
    "animated": "several frames (animated = first takes the first one)",
    "unknown_depth": "values without a known range (32-bit or floating point)",
    "crashed": "opening it ended the process that did, twice",
    "changed": "the file is not the one the manifest was made from",
}

Note = Literal[
    "rotated",
    "exif_broken",
    "icc_converted",
    "icc_broken",
    "alpha_flattened",
    "cmyk",
    "sixteen_bit",
    "first_frame",
    "wrong_extension",
]
"""What was done to a picture, or noticed about it, on the way in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hygiene:
    """How pictures are opened. Part of what makes pixels reproducible, so kept with the manifest."""

    background: tuple[int, int, int] = (255, 255, 255)
    """sRGB put under transparent pixels."""
    animated: Literal["refuse", "first"] = "refuse"
    """Whether a picture with several frames is refused, or its first one taken."""
    max_pixels: int = 178_956_970
    """Larger pictures are refused unopened (Pillow's own limit: a quarter of a gigabyte of RGB, thrice over)."""


class Refused(Exception):
    """A picture that is not used, and why. Counted by whoever reads many pictures; never silent."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail or REASONS[reason]}")
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class Opened:
    """A picture that is fit for use."""

    image: Image.Image
    """Upright, RGB, 8 bits, sRGB; loaded."""
    orientation: int
    """EXIF orientation of the file, 1..8; the image is already turned."""
    notes: tuple[Note, ...]

    @property
    def size(self) -> Size:
        """(height, width) of the upright picture, in pixels."""
        return self.image.height, self.image.width


def open_picture(data: bytes, hygiene: Hygiene, *, suffix: str = "") -> Opened:
    """Decode ``data`` completely and bring it into the one form everything else works with.

    Args:
        data: the file's bytes.
        hygiene: background, frames and size limits.
        suffix: of the file's name, such as ``.jpg``; noted when the content is another format.

    Raises:
        Refused: with the reason; see ``REASONS``.
    """
    with _refusals():
        image, notes = _identified(data, hygiene, suffix)
        image.load()
        orientation = _orientation(image, notes)
        rgb = _to_srgb(image, hygiene, notes)
        if orientation != 1:
            rgb = rgb.transpose(_TURNS[orientation])
            notes.append("rotated")
        return Opened(rgb, orientation, tuple(notes))


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a picture say, if they can be believed."""

    size: Size
    """(height, width) of the upright picture, in pixels."""
    orientation: int
    notes: tuple[Note, ...]
    """Those that can be had without decoding."""


def read_header(data: bytes, hygiene: Hygiene, *, suffix: str = "") -> Header:
    """The size of a picture without decoding it: fast, and blind to damage behind the header.

    Raises:
        Refused: with the reason; see ``REASONS``.
    """
    with _refusals():
        image, notes = _identified(data, hygiene, suffix)
        orientation = _orientation(image, notes)
        size = (image.height, image.width)
        if orientation != 1:
            notes.append("rotated")
        return Header(size[::-1] if orientation >= _SIDEWAYS else size, orientation, tuple(notes))


def _identified(data: bytes, hygiene: Hygiene, suffix: str) -> tuple[Image.Image, list[Note]]:
    """The picture, not decoded yet, and what can be noted by then."""
    image = Image.open(io.BytesIO(data))
    notes: list[Note] = []
    if image.width * image.height > hygiene.max_pixels:
        raise Refused("too_many_pixels", f"{image.width}x{image.height}")
    if getattr(image, "n_frames", 1) > 1:
        # MPO: a camera's JPEG with a preview or a second eye behind it; the first frame is the photograph
        if hygiene.animated == "refuse" and image.format != "MPO":
            raise Refused("animated", f"{getattr(image, 'n_frames', 0)} frames")
        notes.append("first_frame")
    expected = Image.registered_extensions().get(suffix.lower())
    if expected and image.format != expected and {image.format, expected} not in _ALIASES:
        notes.append("wrong_extension")
    if _sixteen_bits(image, data):
        notes.append("sixteen_bit")
    return image, notes


_ALIASES: tuple[set[str | None], ...] = ({"JPEG", "MPO"}, {"TIFF", "DNG"})

_SIDEWAYS = 5
"""EXIF orientations from here on exchange height and width."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what brings the picture upright."""


@contextmanager
def _refusals() -> Iterator[None]:
    """Pillow's many ways of failing on a bad file, by their names here."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise Refused("not_an_image") from error
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from error
    except (OSError, EOFError) as error:
        text = str(error).lower()
        short = "truncated" in text or "unexpected end" in text or isinstance(error, EOFError)
        raise Refused("truncated" if short else "damaged", str(error)) from error
    except (Refused, MemoryError):
        raise
    except (
        Exception
    ) as error:  # decoders raise whatever they stumble over: struct.error, zlib.error, KeyError, …
        raise Refused("damaged", f"{type(error).__name__}: {error}") from error


def _sixteen_bits(image: Image.Image, data: bytes) -> bool:
    """Whether a colour picture has 16 bits a channel, of which Pillow keeps the upper 8 (grey: see _to_eight_bits)."""
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    if image.format == "PNG":
        return data[24:25] == b"\x10"  # bit depth: the ninth byte of IHDR, which is always first
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, ())
        return 16 in (bits if isinstance(bits, tuple) else (bits,))
    return False


def _orientation(image: Image.Image, notes: list[Note]) -> int:
    """EXIF tag 0x0112; 1 when absent. A tag that cannot be read, or has no meaning, is noted."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # Pillow's EXIF reader raises struct.error, KeyError and others on broken data
        notes.append("exif_broken")
        return 1
    if value not in _TURNS and value != 1:
        notes.append("exif_broken")
        return 1
    return int(value)


def _to_srgb(image: Image.Image, hygiene: Hygiene, notes: list[Note]) -> Image.Image:
    """8-bit sRGB on the declared background. Colours are converted before alpha is laid over the background."""
    profile = image.info.get("icc_profile")
    image = _to_eight_bits(image, notes)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in ("1", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert({"1": "L", "L": "LA", "RGB": "RGBA", "La": "LA"}.get(image.mode, "RGBA"))
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    if alpha is not None:
        image = image.convert("L" if image.mode == "LA" else "RGB")
    if image.mode == "CMYK":
        notes.append("cmyk")
    converted = _by_profile(image, profile, notes) if profile else None
    rgb = converted if converted is not None else image.convert("RGB")
    if alpha is None or alpha.getextrema()[0] == 255:
        return rgb
    notes.append("alpha_flattened")
    ground = Image.new("RGB", rgb.size, hygiene.background)
    ground.paste(rgb, mask=alpha)
    return ground


def _to_eight_bits(image: Image.Image, notes: list[Note]) -> Image.Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; other modes as they are."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise Refused("unknown_depth", f"mode {image.mode}")
    notes.append("sixteen_bit")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _by_profile(image: Image.Image, profile: bytes, notes: list[Note]) -> Image.Image | None:
    """``image`` converted from its ICC profile to sRGB; None when it has sRGB already or the profile is broken."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).strip().lower().startswith("srgb"):
            return None
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("icc_broken")
        return None
    notes.append("icc_converted")
    return converted

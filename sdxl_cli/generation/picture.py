"""Picture files: pixels and the texts inside them, written whole or not at all, read back, named.

A PNG carries A1111's text under the key ``parameters`` and our JSON under ``sdxl``. JPEG and WebP carry the first
in EXIF's UserComment, where other front ends look for it, and the second in MakerNote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from sdxl_cli.checkpoint.atomic import atomic_write
from sdxl_cli.errors import FileError, UsageError, unknown

Pixels = NDArray[np.uint8]
"""RGB [H, W, 3]."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_OPTIONS: dict[str, dict[str, object]] = {
    "PNG": {"compress_level": 6},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True},
}
_PARAMETERS, _RECORD, _GRAPH = "parameters", "sdxl", "prompt"
_USER_COMMENT, _MAKER_NOTE = ExifTags.Base.UserComment, ExifTags.Base.MakerNote
_UNICODE = b"UNICODE\0"  # EXIF 2.3, UserComment: the character code; A1111 writes it big-endian
_OURS = b"sdxl\0"
_EXIF_LIMIT = 65000
"""Bytes of EXIF that fit into a JPEG's one APP1 segment, less its header."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What a picture file says about how it was made; empty where it does not."""

    parameters: str = ""
    """A1111's text."""
    record: str = ""
    """Our JSON."""
    graph: str = ""
    """ComfyUI's ``prompt`` JSON; read only."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where pictures go: a folder with names that count up, or one file."""

    folder: Path
    prefix: str
    suffix: str = ".png"
    file: Path | None = None
    """The name the user gave, when there is one picture."""
    overwrite: bool = False
    """Whether that file may be replaced. In a folder nothing ever is."""

    def save(self, pixels: Pixels, seed: int, texts: Texts) -> Path:
        """Write a picture under the next free name and return it.

        Raises:
            FileError: it cannot be written.
            UsageError: the texts do not fit into a JPEG.
        """
        if self.file is not None:
            write_picture(self.file, pixels, texts, overwrite=self.overwrite)
            return self.file
        while True:
            index = next_index(self.folder, self.prefix)
            path = self.folder / f"{self.prefix}-{index:05d}-{seed}{self.suffix}"
            try:
                write_picture(path, pixels, texts)
            except FileError:
                if not path.exists():
                    raise
                continue  # somebody else took the name in between
            return path


def target(output: str | None, *, prefix: str, count: int = 1, overwrite: bool = False) -> Target:
    """Decide where pictures go, and make the folder, before any work is done.

    Args:
        output: what ``--output`` says: a folder, or a file with a suffix of ``FORMATS``. None is ``outputs/``.
        prefix: beginning of the names in a folder.
        count: how many pictures; a file's name becomes the beginning of the names of several.
        overwrite: whether a file that is there may be replaced.

    Raises:
        UsageError: an unknown suffix, or a file that is there already.
        FileError: the folder cannot be made.
    """
    path = Path(output or "outputs").expanduser()
    if not path.suffix or path.is_dir() or (output or "").endswith(("/", "\\")):
        _make_folder(path)
        return Target(path, prefix)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise unknown("picture format", path.suffix, FORMATS)
    if count == 1 and path.exists() and not overwrite:
        raise UsageError(f"{path}: there already; give another name, a folder, or --overwrite")
    _make_folder(path.parent)
    return Target(path.parent, path.stem, suffix, path if count == 1 else None, overwrite)


def next_index(folder: Path, prefix: str) -> int:
    """The index after the highest of ``prefix-INDEX-SEED`` in ``folder``, 0 when there is none."""
    named = re.compile(re.escape(prefix) + r"-(\d{5,})-\d+\.\w+")
    taken = [int(match[1]) for path in folder.iterdir() if (match := named.fullmatch(path.name))]
    return max(taken, default=-1) + 1


def write_picture(path: Path, pixels: Pixels, texts: Texts, *, overwrite: bool = False) -> None:
    """Write [H, W, 3] RGB pixels with their texts; the suffix of ``path`` decides the format.

    Raises:
        FileError: the file is there already (unless ``overwrite``), or cannot be written.
        UsageError: the texts do not fit into a JPEG.
    """
    form = FORMATS[path.suffix.lower()]
    extra = {"pnginfo": _png_texts(texts)} if form == "PNG" else {"exif": _exif_texts(texts, path)}
    with atomic_write(path, overwrite=overwrite) as temporary:
        Image.fromarray(pixels, "RGB").save(temporary, form, **_OPTIONS[form], **extra)


def read_texts(path: Path) -> Texts:
    """The texts in a picture file.

    Raises:
        FileError: the file is missing or is no picture.
    """
    with _open(path) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            return Texts(*(str(image.text.get(key, "")) for key in (_PARAMETERS, _RECORD, _GRAPH)))
        whole = image.getexif()
        exif = whole.get_ifd(ExifTags.IFD.Exif)
        # ComfyUI writes "prompt:{...}" into whichever of the camera's tags is next (nodes_images.py, WebP)
        graphs = [str(value) for value in whole.values() if str(value).startswith(f"{_GRAPH}:")]
    comment, note = (_bytes(exif.get(tag)) for tag in (_USER_COMMENT, _MAKER_NOTE))
    parameters = _comment(comment)
    record = note.removeprefix(_OURS).decode("utf-8", "replace") if note.startswith(_OURS) else ""
    return Texts(parameters, record, graphs[0].partition(":")[2] if graphs else "")


def _comment(comment: bytes) -> str:
    """EXIF's UserComment as text; UTF-16 in either order, as writers do not agree on it."""
    if comment.startswith(b"ASCII\0\0\0"):
        return comment[8:].decode("ascii", "replace")
    if not comment.startswith(_UNICODE):
        return ""
    body = comment.removeprefix(_UNICODE)
    # of ASCII letters, most of what is in a prompt, the high byte is 0: it comes first in big-endian text
    order = "utf-16-le" if body[1::2].count(0) > body[::2].count(0) else "utf-16-be"
    return body.decode(order, "replace")


def file_texts(path: Path) -> dict[str, str]:
    """Every text in a picture file by its key, also those of programs nobody here knows.

    Raises:
        FileError: the file is missing or is no picture.
    """
    with _open(path) as image:
        if isinstance(image, PngImagePlugin.PngImageFile):
            return {str(key): str(text) for key, text in image.text.items()}
    ours = read_texts(path)
    named = {_PARAMETERS: ours.parameters, _RECORD: ours.record, _GRAPH: ours.graph}
    return {key: text for key, text in named.items() if text}


def describe(path: Path) -> dict[str, object]:
    """``format`` (``PNG``), ``width`` and ``height`` in pixels.

    Raises:
        FileError: the file is missing or is no picture.
    """
    with _open(path) as image:
        return {"format": image.format, "width": image.width, "height": image.height}


def read_pixels(path: Path, *, background: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    """A picture as [H, W, 3] RGB, turned as its EXIF orientation says; ``background`` shows through transparency.

    Raises:
        FileError: the file is missing, damaged, or is no picture.
    """
    with _open(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                behind = Image.new("RGBA", upright.size, background)
                upright = Image.alpha_composite(behind, upright)
            return np.asarray(upright.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise FileError(
                f"{path}: the picture is damaged ({error}); export or download it again"
            ) from error


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise FileError(f"{path}: is a folder; give a picture file") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise FileError(f"{path}: is not a picture that can be read (PNG, JPEG, WebP, ...)") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: cannot be made a folder for pictures ({error.strerror})") from error


def _png_texts(texts: Texts) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in ((_PARAMETERS, texts.parameters), (_RECORD, texts.record)):
        if text:
            info.add_text(key, text)
    return info


def _exif_texts(texts: Texts, path: Path) -> bytes:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    if texts.parameters:
        tags[_USER_COMMENT] = _UNICODE + texts.parameters.encode("utf-16-be")
    if texts.record:
        tags[_MAKER_NOTE] = _OURS + texts.record.encode("utf-8")
    block = exif.tobytes() if tags else b""
    if len(block) > _EXIF_LIMIT:
        raise UsageError(
            f"{path}: {len(block)} bytes of metadata do not fit; write a PNG, or give --no-metadata"
        )
    return block


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""

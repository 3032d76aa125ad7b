"""Running out of memory: what is there already is saved, and the rest is tried with less."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from sdxl_cli.checkpoint.header import format_bytes
from sdxl_cli.errors import MemoryLimitError
from sdxl_cli.generation.autoencode import decode, encode
from sdxl_cli.generation.memory import decoding_bytes
from sdxl_cli.generation.picture import Pixels
from sdxl_cli.generation.residency import free_bytes, ran_out_of_memory
from sdxl_cli.generation.sizes import Size, format_size
from sdxl_cli.generation.tiling import SMALLEST_TILE, TILE
from sdxl_cli.generation.weights import Weights
from sdxl_cli.model.vae import Moments

T = TypeVar("T")

Keep = Callable[[Tensor, int], Path]
"""Saves the latents [1, z, h, w] of a seed's picture and says where."""


class Listener(Protocol):
    """Who is told."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something to act on."""


def first_tile(size: Size, weights: Weights, report: Listener, *, tiling: bool) -> int | None:
    """Whether the autoencoder works in tiles from the start: side of a tile in latents, or None.

    A computer's own memory gives no error that could be caught when it is full: the program is ended. So there the
    need is estimated beforehand.

    Args:
        size: (height, width) of the picture.
        weights: whose autoencoder it is.
        report: is told when there is too little.
        tiling: whether tiles are asked for.
    """
    if tiling:
        return TILE
    if weights.device.type != "cpu":
        return None
    needed, free = decoding_bytes(weights.config, size, weights.vae_dtype), free_bytes(weights.device)
    if free is None or needed < free:
        return None
    report.warn(
        f"the autoencoder needs about {format_bytes(needed)} for {format_size(size)} and {format_bytes(free)} are "
        "free; it works in tiles, which changes colours a little"
    )
    return TILE


def with_less(
    work: Callable[[int | None], T],
    what: str,
    report: Listener,
    *,
    side: int,
    tile: int | None,
    before_retry: Callable[[], str],
) -> tuple[T, int | None]:
    """Do something with the autoencoder, in smaller and smaller tiles as long as memory does not suffice.

    Args:
        work: is given the side of a tile in latents, or None for all at once.
        what: the work in a word, for what is said.
        report: is told of every retry.
        side: the longer one, in latents.
        tile: what to begin with.
        before_retry: saves what would be lost and frees what can be; says what was saved, for the messages.

    Returns:
        What ``work`` gave, and the tile it was done with.

    Raises:
        MemoryLimitError: it did not suffice for the smallest tiles either.
    """
    saved = ""
    for size in _attempts(tile, side):
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
        saved = before_retry()
        if size != SMALLEST_TILE:
            report.warn(f"out of memory while {what}{saved}; going on in {'smaller ' if size else ''}tiles")
    raise MemoryLimitError(
        f"out of memory while {what}, in tiles of {SMALLEST_TILE} latents too{saved}; "
        "close other programs, or try --vae-dtype bf16 or --device cpu"
    )


def encode_safely(image: Tensor, weights: Weights, report: Listener, *, tiling: bool) -> Moments:
    """:func:`~sdxl_cli.generation.autoencode.encode`, in tiles when they are asked for or nothing else goes.

    Raises:
        MemoryLimitError: not even then.
    """
    size = (image.shape[2], image.shape[3])

    def free() -> str:
        weights.forget()
        return ""

    found, _ = with_less(
        lambda tile: encode(image, weights, tile=tile),
        "encoding",
        report,
        side=max(size) // weights.config.vae.downsampling,
        tile=first_tile(size, weights, report, tiling=tiling),
        before_retry=free,
    )
    return found


def decode_safely(
    latent: Tensor,
    weights: Weights,
    report: Listener,
    *,
    tiling: bool,
    before_retry: Callable[[], str],
    tile: int | None = None,
) -> tuple[Pixels, int | None]:
    """:func:`~sdxl_cli.generation.autoencode.decode`, in tiles when they are asked for or nothing else goes.

    ``before_retry`` is that of :func:`with_less`; ``tile`` is what sufficed for a picture of the same size.

    Returns:
        The pixels, and the side of the tiles, in latents, if there were any.

    Raises:
        MemoryLimitError: not even then.
    """
    factor = weights.config.vae.downsampling
    size = (latent.shape[2] * factor, latent.shape[3] * factor)
    return with_less(
        lambda tile: decode(latent, weights, tile=tile),
        "decoding",
        report,
        side=max(latent.shape[2:]),
        tile=tile or first_tile(size, weights, report, tiling=tiling),
        before_retry=before_retry,
    )


def _attempts(tile: int | None, side: int) -> Sequence[int | None]:
    """The tiles to try, from the first on; none as large as the longer side, which would be no tile."""
    sizes = [tile or TILE]
    while sizes[-1] > SMALLEST_TILE:
        sizes.append(sizes[-1] // 2)
    if tile is not None:
        return sizes
    return [None, *(size for size in sizes if size < side or size == SMALLEST_TILE)]


@contextmanager
def memory_limit(size: Size, batch: int) -> Iterator[None]:
    """Say in the user's words that memory ran out; by itself nothing here can be done with less.

    Raises:
        MemoryLimitError: it did inside the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        fewer = "--batch-size 1, " if batch > 1 else ""
        raise MemoryLimitError(
            f"out of memory making {format_size(size)}; try {fewer}--vram low, or a smaller --size"
        ) from error

"""Files are decoded in processes of their own: one that takes too long, or breaks its decoder, harms no other.

What a client sends is hostile until it is decoded. A process that exceeds its time is killed and replaced; the others
go on.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from cxrscale.io import LoadedImage, Strictness, load_image, load_stored
from cxrscale.types import UnreadableImageError, one_line

MEMORY = 2 << 30
"""Bytes of address space that a decoder may take beyond what it starts with; the largest image takes a tenth."""


@dataclass(frozen=True, slots=True)
class StoredPixels:
    """An image of more than 8 bits for a viewer that chooses its own window."""

    about: Mapping[str, Any]
    """Height and width, and what `io.StoredImage` says of its levels; the window's fields on their own."""
    deflated: bytes
    """Its levels as little-endian uint16, row by row, in zlib's format."""


class Decoder:
    """Processes that decode image files."""

    def __init__(self, workers: int, seconds: float) -> None:
        """Args:
        workers: processes.
        seconds: for each file, from the moment when a process takes it.
        """
        self.seconds, self._workers = seconds, workers
        # Not forked: this process has threads of torch and DALI.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(max_workers=workers, initializer=_limit_memory, context=context)
        self._started: list[ProcessFuture] = []

    def start(self) -> None:
        """Start the processes; they import their decoders while this one goes on."""
        self._started = [self._pool.schedule(_ready) for _ in range(self._workers)]

    async def warm_up(self) -> None:
        """Until the processes are ready for the first file."""
        if not self._started:
            self.start()
        await asyncio.gather(*(asyncio.wrap_future(one) for one in self._started))

    async def decode(self, data: bytes, name: str) -> LoadedImage:
        """The upright gray image of a file, read leniently.

        Args:
            name: the file's; `.dcm` files may lack the DICOM preamble.

        Raises:
            UnreadableImageError: with the reason.
        """
        found: LoadedImage = await self._run(_decode, data, name)
        return found

    async def decode_stored(self, data: bytes, name: str) -> StoredPixels | None:
        """The values of a file before its window; None where it has no more than 8 bits.

        Args, raises: as `decode`.
        """
        found: StoredPixels | None = await self._run(_decode_stored, data, name)
        return found

    async def _run(self, function: Callable[[bytes, str], Any], data: bytes, name: str) -> Any:
        future = self._pool.schedule(function, args=[data, name], timeout=self.seconds)
        try:
            found = await asyncio.wrap_future(future)
        except (TimeoutError, FutureTimeoutError):
            raise UnreadableImageError(f"decoding took more than {self.seconds:g} s") from None
        except (ProcessExpired, MemoryError):
            raise UnreadableImageError("the decoder broke: a damaged or hostile file") from None
        if isinstance(found, str):
            raise UnreadableImageError(found)
        return found

    def close(self) -> None:
        """End the processes."""
        self._pool.stop()
        self._pool.join()


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.exists():
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _ready() -> None:
    """Imports, in a process, what decoding needs."""


def _decode(data: bytes, name: str) -> LoadedImage | str:
    """The image, or the reason why there is none."""
    try:
        image = load_image(data, name=name, strictness=Strictness.LENIENT)
    except UnreadableImageError as error:
        return one_line(error)
    # The file itself need not come back.
    return LoadedImage(image.image_HW, spacing_mm=image.spacing_mm, burned_in=image.burned_in, warnings=image.warnings)


def _decode_stored(data: bytes, name: str) -> StoredPixels | str | None:
    try:
        image = load_stored(data, name=name, strictness=Strictness.LENIENT)
    except UnreadableImageError as error:
        return one_line(error)
    if image is None:
        return None
    height, width = image.level_HW.shape
    about = {
        "height": height,
        "width": width,
        "slope": image.slope,
        "intercept": image.intercept,
        "window": {"center": image.center, "width": image.width, "function": image.function},
        "inverted": image.inverted,
    }
    # Level 1 halves 12 bits in 16 and takes a third of the time of the next.
    return StoredPixels(about, zlib.compress(image.level_HW.astype("<u2").tobytes(), 1))

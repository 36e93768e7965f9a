"""Files are decoded in processes of their own: one that takes too long, or breaks its decoder, harms no other.

What a client sends is hostile until it is decoded. A process that exceeds its time is killed and replaced; the others
go on.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import resource
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from cxrscale.io import LoadedImage, Strictness, load_image
from cxrscale.types import UnreadableImageError, one_line

MEMORY = 2 << 30
"""Bytes of address space that a decoder may take beyond what it starts with; the largest image takes a tenth."""


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

    async def warm_up(self) -> None:
        """Start the processes, which import their decoders."""
        await asyncio.gather(*(asyncio.wrap_future(self._pool.schedule(_ready)) for _ in range(self._workers)))

    async def decode(self, data: bytes, name: str) -> LoadedImage:
        """The upright gray image of a file, read leniently.

        Args:
            name: the file's; `.dcm` files may lack the DICOM preamble.

        Raises:
            UnreadableImageError: with the reason.
        """
        future = self._pool.schedule(_decode, args=[data, name], timeout=self.seconds)
        try:
            found: LoadedImage | str = await asyncio.wrap_future(future)
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

"""How large an image may be, and how much memory decoding it may take: asked of its header, before it is decoded.

A few megabytes can declare an image of gigabytes. The largest detectors have 20 million pixels, which take 180 MB
in the most expensive encoding (16-bit JPEG 2000).
"""

from __future__ import annotations

from cxrscale.types import UnreadableImageError

MAX_PIXELS = 100_000_000
"""Height x width above this is a damaged or hostile header, not a detector."""

MAX_BYTES = 256 << 20
"""Bytes that decoding one encoded image may take: its values, what its decoder keeps beside them, and the gray image.
What is not encoded is bounded by the length of its file."""


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises UnreadableImageError if an image is larger than `MAX_PIXELS`; `name` is its format."""
    if height * width > MAX_PIXELS:
        raise UnreadableImageError(f"{name} of {height} x {width} pixels: over {MAX_PIXELS:,}")


def check_memory(height: int, width: int, bytes_per_pixel: int, name: str, more_bytes: int = 0) -> None:
    """Raises UnreadableImageError if decoding an image takes more memory than `MAX_BYTES`.

    Args:
        height, width: of the image, as its header declares them.
        bytes_per_pixel: of all arrays that are in memory at once.
        name: the image's format.
        more_bytes: what the decoder needs besides.
    """
    check_pixels(height, width, name)
    need = height * width * bytes_per_pixel + more_bytes
    if need > MAX_BYTES:
        raise UnreadableImageError(
            f"{name} of {height} x {width} pixels takes {need >> 20:,} MiB to decode: over {MAX_BYTES >> 20} MiB"
        )

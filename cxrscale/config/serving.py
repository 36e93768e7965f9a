"""The settings of the service."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from cxrscale.config.section import Section

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Serve(Section):
    """What the service takes, and how much of it at once."""

    learned: ClassVar[bool] = False

    max_megabytes: Positive = 200.0
    """Of a request's body, counted while it comes in; more is refused with 413."""
    max_files: Count = 100
    """Of one request; more are refused with 413."""
    memory_megabytes: Positive = 2000.0
    """Of the bodies of all requests together; beyond it new ones get 503 until others are done."""
    body_seconds: Positive = 60.0
    """How long a client may take to send its request; then 408."""
    decode_seconds: Positive = 20.0
    """How long the decoding of one file may take; then its process is ended and the file refused."""
    decode_workers: Count = 2
    """Processes that decode files."""
    queue: Count = 256
    """Images that may wait for decoding or for a model; beyond it requests get 503."""
    requests_per_minute: Annotated[int, Field(ge=0)] = 1200
    """From one address; more get 429. 0: no limit."""
    drift_window: Annotated[int, Field(ge=50)] = 500
    """The newest images whose statistics are compared with those of training."""

"""The settings of the service."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, SecretStr

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


class ServeApplication(Section):
    """What a replica of Ray Serve answers for: the `args` of its configuration file."""

    learned: ClassVar[bool] = False

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Name -> run, where every node finds it: on shared storage or in a bucket. The first is the default."""
    gate: str | None = None
    """A classifier's run before every segmenter."""
    device: str | None = None
    """cpu or cuda; None: the GPU that the replica has, else the CPU."""
    limits: Serve = Serve()
    """Of each replica."""
    models_per_replica: Count | None = None
    """In memory at once; None: all. With fewer than there are, requests should name theirs in the header
    `serve_multiplexed_model_id`, by which Ray Serve finds a replica that has it."""
    page: bool = True
    """Whether there is a page beside the API."""
    api_key: SecretStr | None = None
    """That every request must bring; None: CXRSCALE_API_KEY of the replicas' environment."""
    loopback: bool = False
    """Whether Ray Serve listens on 127.0.0.1 alone; elsewhere nothing starts without a key."""

"""One Ray session a process: on the cluster at hand, or a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket

import ray

from cxrscale.schema import InputError

PATIENCE_S = 5.0
"""Seconds that an address has to answer."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What opens an HTTP/2 connection: the magic words and an empty SETTINGS frame (RFC 9113, section 3.4)."""


def connect(address: str | None = None) -> None:
    """Join the cluster of this job or address, else start Ray on this machine; nothing happens when connected.

    Raises:
        InputError: no cluster answers at the address, or one of another version of Ray or Python.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address not in ("auto", "local"):
        reach(address)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray's own usage and dashboard lines would stand between the user and the one line that matters.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers that recompile torch on every start take 11 s instead of 5 to import it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise InputError(f"no Ray cluster answers at {address}: {error}; check RAY_ADDRESS or use --local") from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise InputError(f"{said}: install the cluster's versions here, or submit the job to it") from None


def reach(address: str) -> None:
    """Make sure that Ray's control service is at host:port; ray.init would try for minutes, deaf to Ctrl-C.

    Raises:
        InputError: it is not, and what is there instead.
    """
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rstrip("/").rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise InputError(f"{address!r} is no address of a Ray cluster; give host:port, e.g. 10.0.0.1:6379")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S) as line:
            if os.environ.get("RAY_USE_TLS") == "1":
                return
            line.settimeout(PATIENCE_S)
            line.sendall(_PREFACE)
            answer = line.recv(9)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(
            f"no Ray cluster answers at {address}: {said}; check RAY_ADDRESS, start one, or use --local"
        ) from None
    # A gRPC server answers with its SETTINGS, a frame of type 4; the dashboard with an HTTP/1.1 error.
    if len(answer) < 4 or answer[3] != 4:
        raise InputError(
            f"what answers at {address} is not Ray's control service; give its port (6379 unless told otherwise), "
            "not the dashboard's"
        )


def cpus() -> int:
    """CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]

"""One Ray session a process: on the cluster at hand, or a new one on this machine."""

from __future__ import annotations

import logging
import os

import ray

from cxrscale.schema import InputError


def connect(address: str | None = None) -> None:
    """Join the cluster of this job or address, else start Ray on this machine; nothing happens when connected.

    Raises:
        InputError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
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


def cpus() -> int:
    """CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]

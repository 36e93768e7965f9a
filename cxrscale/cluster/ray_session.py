"""One Ray session a process: on the cluster at hand, or a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket

import ray

from cxrscale.types import UserError

PATIENCE_S = 5.0
"""Seconds that an address has to answer."""


def connect(address: str | None = None) -> None:
    """Join the cluster of this job or address, else start Ray on this machine; nothing happens when connected.

    Raises:
        UserError: no cluster answers at the address, or one of another version of Ray or Python.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
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
        raise UserError(f"no Ray cluster answers at {address}: {error}; check RAY_ADDRESS or use --local") from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise UserError(f"{said}: install the cluster's versions here, or submit the job to it") from None


def connected() -> bool:
    """Whether this process has joined a cluster."""
    return bool(ray.is_initialized())


def reach(address: str) -> None:
    """Make sure that Ray's control service is at host:port; ray.init would try for minutes, deaf to Ctrl-C.

    Raises:
        UserError: it is not, or it wants a token.
    """
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            raise UserError("RAY_ADDRESS=auto, and no Ray cluster runs on this machine; start one") from None
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rstrip("/").rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise UserError(f"{address!r} is no address of a Ray cluster; give host:port, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE_S).close()
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at {address}: {said}; check RAY_ADDRESS, start one, or use --local"
        ) from None
    if not scheme:
        _ask(place)


def _ask(address: str) -> None:
    """One call to the control service, by its own protocol."""
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel  # with the TLS and token that RAY_* variables name
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(address)
    try:
        asked = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(asked, timeout=PATIENCE_S)  # type: ignore[no-untyped-call]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(
                f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token"
            ) from None
        raise UserError(
            f"what answers at {address} is not Ray's control service; give its port (6379 unless told otherwise), "
            "not the dashboard's"
        ) from None
    finally:
        channel.close()


def cpus() -> int:
    """CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]

"""The Ray session of this process: on an existing cluster, or a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket

import ray

from cxrscale.types import UserError, one_line

TIMEOUT_S = 5.0
"""Seconds within which an address must answer."""


def connect(address: str | None = None) -> None:
    """Join the cluster at an address or of this job, else start Ray on this machine. Does nothing if already connected.

    Raises:
        UserError: no cluster answers at the address, or it has another version of Ray or Python.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        reach(address)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray's usage and dashboard messages would hide the lines that matter.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers that recompile torch's bytecode at every start take 11 s instead of 5 to import it.
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
        raise UserError(f"{one_line(error)}: install the cluster's versions here, or use `cxrscale submit`") from None


def connected() -> bool:
    """Whether this process has joined a cluster."""
    return bool(ray.is_initialized())


def reach(address: str) -> None:
    """Check that Ray's control service answers at an address; ray.init would retry for minutes and ignore Ctrl-C.

    Args:
        address: host:port, ray://host:port, or auto for a cluster on this machine.

    Raises:
        UserError: it does not, or it needs a token.
    """
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            raise UserError("RAY_ADDRESS=auto, but no Ray cluster runs on this machine; start one") from None
    scheme, _, location = address.rpartition("://")
    host, _, port = location.rstrip("/").rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit():
        raise UserError(f"{address!r} is not an address of a Ray cluster; give host:port, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at {address}: {reason}; check RAY_ADDRESS, start one, or use --local"
        ) from None
    if not scheme:
        _check_control_service(location)


def _check_control_service(address: str) -> None:
    """Make one call to the control service, in its own protocol."""
    import grpc  # type: ignore[import-untyped]
    from ray._private.grpc_utils import init_grpc_channel  # uses TLS and the token as RAY_* variables configure them
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    channel = init_grpc_channel(address)
    try:
        request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(request, timeout=TIMEOUT_S)  # type: ignore[no-untyped-call]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise UserError(
                f"the cluster at {address} needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token"
            ) from None
        raise UserError(
            f"the service at {address} is not Ray's control service; give its port (6379 by default), "
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

"""The Ray session of this process: on an existing cluster, or a private one on this machine.

A private one (`private_session`) listens on loopback alone, and there only to who has its token. A cluster that exists
is joined with its token; one without is joined only where RAY_AUTH_MODE=disabled says so.
"""

from __future__ import annotations

import logging
import os
import re
import socket

import ray

from cxrscale.cluster import private_session
from cxrscale.types import UserError, one_line

TIMEOUT_S = 5.0
"""Seconds within which an address must answer."""
OPEN_CLUSTER = (
    "runs without a token: whoever reaches it can run code there and here. Start it with RAY_AUTH_MODE=token, or set "
    "RAY_AUTH_MODE=disabled to use it all the same"
)
NO_PROXY = "no_grpc_proxy"
"""gRPC's own list of hosts that it reaches without a proxy."""
PASSWORD = re.compile(r"(?<=://)[^/@\s]*@")
"""What must not be printed of an address."""


def connect(address: str | None = None) -> None:
    """Join the cluster at an address or of this job, else start a private Ray. Does nothing if already connected.

    Raises:
        UserError: no cluster answers at the address, it has another version of Ray or Python, or it has no token.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    # Ray's usage and dashboard messages would hide the lines that matter.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers that recompile torch's bytecode at every start take 11 s instead of 5 to import it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if not address or address == "local":
        private_session.start()
        return
    reach(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError as error:
        reason = one_line(hide_password(str(error)))
        raise UserError(
            f"no Ray cluster answers at {hide_password(address)}: {reason}; check RAY_ADDRESS or use --local"
        ) from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UserError(f"{one_line(error)}: install the cluster's versions here, or use `cxrscale submit`") from None


def connected() -> bool:
    """Whether this process has joined a cluster."""
    return bool(ray.is_initialized())


def hide_password(text: str) -> str:
    """The text without the name and password in an address."""
    return PASSWORD.sub("", text)


def reach(address: str) -> None:
    """Check that Ray's control service answers at an address; ray.init would retry for minutes and ignore Ctrl-C.

    Args:
        address: host:port, ray://host:port, or auto for a cluster on this machine.

    Raises:
        UserError: it does not, it needs a token that is not given, or it has none.
    """
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            address = canonicalize_bootstrap_address("auto") or ""
        except ConnectionError:
            raise UserError("RAY_ADDRESS=auto, but no Ray cluster runs on this machine; start one") from None
    scheme, _, location = address.rpartition("://")
    host, _, port = location.rstrip("/").rpartition(":")
    if scheme not in ("", "ray") or not host or not port.isdigit() or "@" in host:
        shown = hide_password(address if "://" in address else f"://{address}").removeprefix("://")
        raise UserError(f"{shown!r} is not an address of a Ray cluster; give host:port, e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at {address}: {reason}; check RAY_ADDRESS, start one, or use --local"
        ) from None
    # It was just reached without a proxy; Ray's client for ray:// addresses would take one from http_proxy.
    os.environ[NO_PROXY] = ",".join(filter(None, (os.environ.get(NO_PROXY), host.strip("[]"))))
    if not scheme:
        _agree_on_token(location.rstrip("/"))


def _agree_on_token(address: str) -> None:
    """Set RAY_AUTH_MODE to what the cluster does, unless it is set; refuse a cluster without a token."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    is_open = control_service_answers(address, with_token=False)
    if is_open and mode != "disabled":
        raise UserError(f"the cluster at {address} {OPEN_CLUSTER}")
    if is_open:
        return
    if not mode and private_session.find_token() is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
        private_session.reload_authentication()
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or not control_service_answers(address, with_token=True):
        raise UserError(
            f"the cluster at {address} needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to its token"
        )


def control_service_answers(address: str, *, with_token: bool) -> bool:
    """Make one call to the control service, in its own protocol; False where it wants a token, or another one.

    Raises:
        UserError: it is another service.
    """
    import grpc  # type: ignore[import-untyped]
    from ray._common.tls_utils import load_certs_from_env
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    # A proxy for web pages does not pass this protocol on.
    options = [("grpc.enable_http_proxy", 0)]
    if with_token:
        channel = init_grpc_channel(address, options=options)  # TLS and the token as RAY_* variables configure them
    elif os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        certificate, key, authority = load_certs_from_env()  # type: ignore[no-untyped-call]
        credentials = grpc.ssl_channel_credentials(
            certificate_chain=certificate, private_key=key, root_certificates=authority
        )
        channel = grpc.secure_channel(address, credentials, options=options)
    else:
        channel = grpc.insecure_channel(address, options=options)
    try:
        request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(request, timeout=TIMEOUT_S)  # type: ignore[no-untyped-call]
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return False
        raise UserError(
            f"the service at {address} is not Ray's control service; give its port (6379 by default), "
            "not the dashboard's"
        ) from None
    finally:
        channel.close()
    return True


def cpus() -> int:
    """CPUs of the connected cluster."""
    return int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]


def gpus() -> int:
    """GPUs of the connected cluster."""
    return int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]

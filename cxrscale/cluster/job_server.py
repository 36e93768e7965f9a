"""Connecting to the job server of a Ray cluster: its address, its token, and proxies that stand in the way."""

from __future__ import annotations

import logging
import os
import re
import socket
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cxrscale.cluster import private_session
from cxrscale.cluster.ray_session import OPEN_CLUSTER, hide_password
from cxrscale.types import UserError, last_line, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
"""The job server without --address and RAY_API_SERVER_ADDRESS."""
TIMEOUT_S = (8.0, 60.0)
"""Seconds for a connection, and for each answer; Ray's own client would wait for ever."""
JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What an id may be: it is a part of the job server's addresses and of the names of its files."""
EXAMPLE = "http://10.0.0.1:8265"


def check_id(name: str, option: str) -> str:
    """The id of a job, as given.

    Raises:
        UserError: it has characters that no address or file name should have.
    """
    if not JOB_ID.fullmatch(name):
        raise UserError(
            f"{option} {one_line(repr(name), limit=60)} is not a job's id; give letters, digits, '.', '_' and '-', "
            "128 at most, the first a letter or digit"
        )
    return name


def connect(address: str | None = None) -> JobSubmissionClient:
    """Connect to the job server at `address` (http://HEAD:8265), else at RAY_API_SERVER_ADDRESS, else on this machine.

    The address may be copied from a browser. A name and password in it are used, and never printed.

    Raises:
        UserError: there is none, it needs a token, or it has none and RAY_AUTH_MODE=disabled is not set.
    """
    address = normalize(address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS)
    shown = hide_password(address)
    _require_answer(address)
    _agree_on_token(address)
    # Ray prefers the address in the environment to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError

    for logger in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    try:
        return _client(address)
    except AuthenticationError:
        raise UserError(
            f"{shown} needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        ) from None
    except Exception as error:  # another service answers with whatever it likes
        raise UserError(f"{shown} is not a Ray job server: {hide_password(last_line(error))}") from None


def normalize(address: str) -> str:
    """A job server's address without what a browser adds: the page after `#`, a query, slashes at the end.

    Raises:
        UserError: it is no http address.
    """
    text = address.strip()
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        shown = one_line(re.sub(r"[^/@\s]*@", "", address))
        raise UserError(f"--address {shown} is not a job server; give the dashboard's address, e.g. {EXAMPLE}")
    name = f"[{host}]" if ":" in host else host
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{user}{name}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def _require_answer(address: str) -> None:
    """Check that something listens; take the direct way past a proxy where there is one."""
    parts, shown = urlsplit(address), hide_password(address)
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get(parts.scheme)
    try:
        socket.create_connection((host, port), TIMEOUT_S[0]).close()
    except (OSError, OverflowError) as error:
        if proxy is not None:  # it may reach what this machine does not
            return
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"no job server answers at {shown}: {reason}; give --address http://HEAD:8265, the dashboard's port"
        ) from None
    if proxy is not None:
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))


def _agree_on_token(address: str) -> None:
    """Set RAY_AUTH_MODE to the server's mode, unless it is set; refuse a server without tokens."""
    import requests

    shown = hide_password(address)
    try:
        answer = requests.get(f"{address}/api/authentication_mode", timeout=(TIMEOUT_S[0], 15))
        content = answer.json() if answer.ok else {}
    except requests.exceptions.ProxyError as error:
        raise UserError(
            f"no job server answers at {shown}: neither directly nor through the proxy of {_proxy_variable(shown)} "
            f"({hide_password(last_line(error))}); set no_proxy to the host, or unset the proxy"
        ) from None
    except requests.exceptions.JSONDecodeError:
        return
    except requests.exceptions.RequestException as error:
        raise UserError(
            f"the service at {shown} is not a Ray job server: {hide_password(last_line(error))}; give the dashboard's "
            "port, 8265 by default"
        ) from None
    # Servers before tokens were invented do not know the question.
    mode = content.get("authentication_mode") if isinstance(content, dict) else None
    own = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled" and own != "disabled":
        raise UserError(f"the cluster at {shown} {OPEN_CLUSTER}")
    if mode == "token" and not own and private_session.find_token() is not None:
        os.environ["RAY_AUTH_MODE"] = "token"


def _proxy_variable(address: str) -> str:
    scheme = urlsplit(address).scheme
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    return next((name for name in names if os.environ.get(name)), f"{scheme}_proxy")


def _client(address: str) -> JobSubmissionClient:
    """Ray's client with timeouts, and with the token of now: Ray's own has read it when it was imported."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **given: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **given})

    token = private_session.find_token() if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else None
    return Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)

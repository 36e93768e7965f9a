"""A Ray of this process's own: on loopback, behind a token, in a folder that goes with it."""

from __future__ import annotations

import atexit
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private import ray_constants

from cxrscale.config import PATIENT_KEY
from cxrscale.io import scratch
from cxrscale.types import UserError, last_line

LOOPBACK = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
"""Set to 0, as it is on desktops, nodes are at 127.0.0.1, and Ray binds there alone; else it takes all interfaces."""
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
VARIABLES = ("RAY_AUTH_MODE", *TOKEN_VARIABLES, LOOPBACK, "TMPDIR")


@dataclass(frozen=True, slots=True)
class _Session:
    folder: Path
    before: dict[str, str | None]
    """The environment variables as they were."""
    clusters: bool
    """Ray's own copy of one of them."""


_session: _Session | None = None


def start() -> None:
    """Start Ray on this machine for this process and its children; it ends with this process, or by `end`.

    Its token is 256 random bits in a file that only this user reads, unless RAY_AUTH_MODE=token and a token are given;
    RAY_AUTH_MODE=disabled does without. All temporary files of the session, those of its workers included, are in one
    folder, which is removed at the end; it is in RAY_TMPDIR or the temporary folder.

    Raises:
        UserError: the temporary folder cannot be written, or Ray does not start.
    """
    global _session
    end()
    folder = scratch.make(short=True)
    before = {name: os.environ.get(name) for name in VARIABLES}
    _session = _Session(folder, before, ray_constants.ENABLE_RAY_CLUSTER)
    atexit.unregister(end)
    atexit.register(end)
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode != "disabled" and not (mode == "token" and any(os.environ.get(name) for name in TOKEN_VARIABLES)):
        token = folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    reload_authentication()
    os.environ[LOOPBACK], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    # Workers are killed, not ended: what they leave in their temporary folder goes with the session's.
    temporary = folder / "tmp"
    temporary.mkdir(0o700)
    os.environ["TMPDIR"] = str(temporary)
    # Workers inherit this environment, and ids are hashed in this process alone.
    key = os.environ.pop(PATIENT_KEY, None)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    except (OSError, RuntimeError, ValueError) as error:
        end()
        raise UserError(
            f"Ray does not start on this machine: {last_line(error)}; use --local, or see `cxrscale doctor`"
        ) from None
    finally:
        _restore({"TMPDIR": before["TMPDIR"], PATIENT_KEY: key})


def end() -> None:
    """End the session of `start`, if there is one, and remove its folder."""
    global _session
    if _session is None:
        return
    session, _session = _session, None
    ray.shutdown()
    ray_constants.ENABLE_RAY_CLUSTER = session.clusters
    _restore(session.before)
    scratch.remove(session.folder)
    reload_authentication()


def find_token() -> str | None:
    """The token that is given, in Ray's order: in the environment, in a file that it names, in ~/.ray/auth_token."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")  # noqa: PTH111, needs no home
    try:
        return Path(path).read_text().strip() or None
    except OSError:
        return None


def reload_authentication() -> None:
    """Have this process take RAY_AUTH_MODE and the token from the environment again; Ray reads them once.

    Not while it is connected: the new configuration would lack what the cluster has set.
    """
    if ray.is_initialized():
        return
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

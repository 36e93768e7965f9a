"""Reaching files: what may pass is tried again; what does not pass is one line that names the file and the remedy."""

from __future__ import annotations

import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

from cxrscale.io.address import is_remote, normalize
from cxrscale.types import AccessError, UserError, one_line

Result = TypeVar("Result")

RETRY_SECONDS = (0.2, 1.0, 3.0, 5.0)
"""Pauses between attempts to read an image of a source; the store's own client retries within each attempt."""
STORE_SECONDS = 300.0
"""How long a store that no longer answers is asked again, where no recipe says so: the default of
scaling.store_seconds."""
FIRST_SECONDS = 5.0
"""The same for a store of which this process has never heard: its address may be wrong."""

SAY_SECONDS = 10.0
"""A wait of so long is said, and again each time that it has grown sixfold."""
LOG = logging.getLogger("cxrscale")

_MAY_PASS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
"""Errors of network disks that a second attempt may not see."""
_SILENT = frozenset(
    {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT}
    | {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}
)
"""Errors of a network that brings no answer; a store that refuses has answered."""
_SILENT_TYPES = re.compile("Connect|Timeout|Disconnected")
"""In the names of the errors of botocore, aiohttp and httpx that say the same."""


def store(address: str) -> tuple[Any, str]:
    """fsspec's file system of a remote address, and the path in it."""
    files, path = fsspec.core.url_to_fs(normalize(address))
    return files, path


class _Patience:
    """How long this process asks stores again that do not answer."""

    def __init__(self) -> None:
        self.seconds, self.is_given = STORE_SECONDS, False
        """Seconds, and whether a recipe has said so: its stores are known by then."""
        self.known: set[str] = set()
        """The stores that have answered."""

    def limit(self, address: str) -> float:
        """For this address, in seconds."""
        return self.seconds if self.is_given or _host(address) in self.known else min(FIRST_SECONDS, self.seconds)

    def words(self, address: str) -> str:
        """What ends the wait."""
        seconds = self.limit(address)
        return f"scaling.store_seconds={seconds:g}" if self.is_given else f"{seconds:g} s without an answer"


_patience = _Patience()


@contextmanager
def waiting_for_stores(seconds: float) -> Iterator[None]:
    """Inside, in all threads, a store that does not answer is asked for so long: a recipe's scaling.store_seconds.

    Only where the command's first requests have found it: a wrong address is to fail at once.
    """
    before = _patience.seconds, _patience.is_given
    _patience.seconds, _patience.is_given = seconds, True
    try:
        yield
    finally:
        _patience.seconds, _patience.is_given = before


def patiently(address: str, action: Callable[[], Result], *, listed: bool = False) -> Result:
    """The action's result; what may pass is tried again, and what does not pass is one line.

    A store that does not answer is asked for scaling.store_seconds, one that this process has never heard of for
    `FIRST_SECONDS`. What a store or a disk refuses is tried again after each of `RETRY_SECONDS`.

    Raises:
        AccessError: the file cannot be reached.
        UserError: the path is wrong; nothing would change that.
    """
    pauses, began = iter(RETRY_SECONDS), time.monotonic()
    with _said(address, began):
        while True:
            try:
                with user_errors(address):
                    result = action()
                _patience.known.add(_host(address))
                return result
            except UserError:
                raise
            except FileNotFoundError as error:
                if not listed:
                    raise UserError(f"{error.filename or address} does not exist; check the path") from None
                failure: Exception = error
            except Exception as error:  # a store's errors have types of their own
                failure = error
            pause = _pause(address, failure, next(pauses, None), time.monotonic() - began)
            if pause is None:
                remedy = "check the network, AWS_ENDPOINT_URL and the credentials"
                remedy = remedy if is_remote(address) else "check the disk"
                reason = (failure.strerror if isinstance(failure, OSError) else None) or failure
                raise AccessError(f"{address} cannot be reached ({one_line(reason, limit=200)}); {remedy}")
            time.sleep(pause)


def _pause(address: str, failure: Exception, planned: float | None, waited: float) -> float | None:
    """Seconds until the next attempt; None: none."""
    if not _may_pass(address, failure):
        return None
    if not (is_remote(address) and _is_silent(failure)):
        return planned
    left = _patience.limit(address) - waited
    return None if left <= 0 else min(RETRY_SECONDS[-1] if planned is None else planned, left)


def _is_silent(failure: BaseException) -> bool:
    """Whether nothing was heard of the store."""
    chain: list[BaseException] = []
    error: BaseException | None = failure
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return any(
        isinstance(one, ConnectionError | TimeoutError | socket.gaierror)
        or (isinstance(one, OSError) and one.errno in _SILENT)
        or bool(_SILENT_TYPES.search(type(one).__name__))
        for one in chain
    )


def _host(address: str) -> str:
    """The part of an address that says which store it is; empty for a disk."""
    return "/".join(address.split("/", 3)[:3]) if is_remote(address) else ""


class _Sayer:
    """Says of requests that take long what they wait for, from a thread: a silent connection returns nothing."""

    def __init__(self) -> None:
        self._open: dict[object, tuple[str, float]] = {}
        """The address of each request, and when it began."""
        self._say_at: dict[str, float] = {}
        """For each store that is waited for, after how many seconds that is said next."""
        self._thread: threading.Thread | None = None

    def begin(self, address: str, began: float) -> object:
        """A request begins; returns what `end` takes."""
        token = object()
        self._open[token] = address, began
        if self._thread is None or not self._thread.is_alive():  # a fork leaves it behind
            self._thread = threading.Thread(target=self._look, daemon=True, name="slow requests")
            self._thread.start()
        return token

    def end(self, token: object) -> None:
        """It has ended."""
        self._open.pop(token, None)

    def _look(self) -> None:
        while True:
            time.sleep(min(1.0, SAY_SECONDS / 2))
            # Many threads read from a store that is away: one word for all, of the request that waits longest.
            oldest: dict[str, tuple[float, str]] = {}
            for address, began in list(self._open.values()):
                oldest[_host(address)] = min(oldest.get(_host(address), (began, address)), (began, address))
            now = time.monotonic()
            waits = {host: one for host, one in oldest.items() if now - one[0] >= SAY_SECONDS}
            self._say_at = {host: self._say_at.get(host, SAY_SECONDS) for host in waits}
            for host, (began, address) in waits.items():
                if now - began >= self._say_at[host]:
                    self._say_at[host] *= 6
                    LOG.warning("waiting %.0f s for %s; ends at %s", now - began, address, _patience.words(address))


_sayer = _Sayer()


@contextmanager
def _said(address: str, began: float) -> Iterator[None]:
    """Inside, a request to a store is said when it takes long."""
    if not is_remote(address):
        yield
        return
    token = _sayer.begin(address, began)
    try:
        yield
    finally:
        _sayer.end(token)


def _may_pass(address: str, failure: Exception) -> bool:
    if type(failure).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return False
    return is_remote(address) or (isinstance(failure, OSError) and failure.errno in _MAY_PASS)


@contextmanager
def user_errors(address: str) -> Iterator[None]:
    """Turn errors that say what is wrong with a path into one line with the address and how to fix it."""
    try:
        yield
    except PermissionError as error:
        if is_remote(address):
            raise
        raise AccessError(f"{error.filename or address}: permission denied; choose a folder with permission") from None
    except IsADirectoryError:
        raise UserError(f"{address} is a folder; give a file") from None
    except (NotADirectoryError, FileExistsError):
        raise UserError(f"{address}: a part of this path is a file, not a folder") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{address}: no space left on the disk; free some, then re-run the command") from None
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise UserError(f"{address}: {(error.strerror or '').lower()}; correct the path") from None
        if error.errno == errno.EROFS:
            raise UserError(f"{address}: the disk is read-only; choose another folder") from None
        raise
    except ImportError as error:
        raise UserError(f"{address}: {error}; install cxrscale[s3] for s3:// addresses") from None

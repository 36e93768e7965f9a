"""Reaching files: what may pass is tried again; what does not pass is one line that names the file and the remedy."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

from cxrscale.io.address import is_remote, normalize
from cxrscale.types import AccessError, UserError, one_line

Result = TypeVar("Result")

RETRY_SECONDS = (0.2, 1.0, 3.0, 8.0)
"""Pauses between attempts to read an image of a source; the store's own client retries within each attempt."""

SAY_SECONDS = 10.0
"""A wait of so long is said."""
LOG = logging.getLogger("cxrscale")

_MAY_PASS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN})
"""Errors of network disks that a second attempt may not see."""


def store(address: str) -> tuple[Any, str]:
    """fsspec's file system of a remote address, and the path in it."""
    files, path = fsspec.core.url_to_fs(normalize(address))
    return files, path


def patiently(address: str, action: Callable[[], Result], *, listed: bool = False) -> Result:
    """The action's result; what may pass is tried again, and what does not pass is one line.

    Raises:
        AccessError: the file cannot be reached.
        UserError: the path is wrong; nothing would change that.
    """
    pauses, began, said = list(RETRY_SECONDS), time.monotonic(), False
    while True:
        try:
            with user_errors(address):
                return action()
        except UserError:
            raise
        except FileNotFoundError as error:
            if not listed:
                raise UserError(f"{error.filename or address} does not exist; check the path") from None
            failure: Exception = error
        except Exception as error:  # a store's errors have types of their own
            failure = error
        if not pauses or not _may_pass(address, failure):
            remedy = "check the network, AWS_ENDPOINT_URL and the credentials"
            remedy = remedy if is_remote(address) else "check the disk"
            reason = (failure.strerror if isinstance(failure, OSError) else None) or failure
            raise AccessError(f"{address} cannot be reached ({one_line(reason, limit=200)}); {remedy}")
        if not said and (waited := time.monotonic() - began) >= SAY_SECONDS:
            said = True
            reason = one_line(failure, limit=200)
            LOG.warning("waiting %.0f s for %s (%s); ends after %d attempts more", waited, address, reason, len(pauses))
        time.sleep(pauses.pop(0))


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

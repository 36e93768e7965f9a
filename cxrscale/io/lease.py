"""One writer per folder: a run or a dataset in the making has an owner, and who has lost it can publish nothing more.

The file `.lease` stands in the folder or bucket. Its owner renews it every few seconds; its age is by the store's own
clock, since those of two machines may differ by hours. A lease is stale when it has not been renewed for
`STALE_SECONDS`, or at once when its process was on this machine and is gone.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pydantic import ValidationError

from cxrscale.io import process, storage
from cxrscale.io.artifact import ArtifactPart
from cxrscale.types import AccessError, UserError

NAME = ".lease"
RENEW_SECONDS = 10.0
"""How often an owner renews its lease."""
STALE_SECONDS = 60.0
"""A lease that is older has lost its owner, who would have renewed it several times."""
LOG = logging.getLogger("cxrscale")


class BusyError(UserError):
    """Another process writes this run or dataset."""

    exit_code = 5


class Owner(ArtifactPart):
    """Who writes, as it stands in the lease."""

    id: str
    """Unique for each lease that was ever taken."""
    host: str
    place: str
    """The machine's boot and its namespace of process numbers: where `pid` means something."""
    pid: int
    started: str
    """The process's start in clock ticks since the boot: a later process may have the same number."""
    began: float
    """Unix seconds on the owner's clock, for people."""


@dataclass(slots=True)
class Lease:
    """The right to write a folder."""

    folder: str
    owner: str
    """`Owner.id`; what a worker needs to publish under this lease."""

    def check(self) -> None:
        """Raise BusyError unless the lease is still this one."""
        found = _read(self.folder)
        if found is None or found.id != self.owner:
            who = "nobody" if found is None else f"process {found.pid} on {found.host}"
            raise BusyError(
                f"{self.folder} belongs to {who} by now, since this process had stood still; nothing more is written"
            )


@contextmanager
def held(folder: str, what: str) -> Iterator[Lease]:
    """Hold the folder's lease: its files can be published by this process, and by those that `share` it.

    Args:
        folder: a run's or dataset's folder or address.
        what: its name in messages, e.g. "run chexnet14".

    Raises:
        BusyError: another process has it.
    """
    lease = _take(folder, what)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(lease, stop), daemon=True, name="lease")
    thread.start()
    try:
        with storage.fenced(folder, lease.check):
            yield lease
    finally:
        stop.set()
        thread.join(timeout=1.0)
        _release(lease)


@contextmanager
def share(folder: str, owner: str | None) -> Iterator[None]:
    """In a worker: publish under the lease that its driver holds; without an owner, unchecked."""
    if owner is None:
        yield
        return
    with storage.fenced(folder, Lease(folder, owner).check):
        yield


def _take(folder: str, what: str) -> Lease:
    mine = Owner(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        place=process.place(),
        pid=os.getpid(),
        started=process.started(os.getpid()) or "",
        began=round(time.time(), 1),
    )
    address = storage.join(folder, NAME)
    for _ in range(3):  # each time that another process was a moment sooner
        if storage.create(address, mine.model_dump_json()):
            return Lease(folder, mine.id)
        found, age = _read(folder), storage.age(address)
        if age is None:
            continue  # released since
        if found is None:
            if age > STALE_SECONDS:  # damaged, and nobody renews it
                storage.remove(address)
            continue
        if not _is_gone(found) and age < STALE_SECONDS:
            raise BusyError(
                f"{what} is being written by process {found.pid} on {found.host}; wait for it or stop it "
                f"(if that machine is gone: its lease ends {STALE_SECONDS:.0f} s after its last sign of life)"
            )
        LOG.warning("%s: its writer, process %d on %s, is gone; this process takes over", what, found.pid, found.host)
        storage.remove(address)
    raise BusyError(f"{what} is being taken by several processes at once; run the command again")


def _release(lease: Lease) -> None:
    with suppress(UserError, OSError):
        found = _read(lease.folder)
        if found is not None and found.id == lease.owner:
            storage.remove(storage.join(lease.folder, NAME))


def _renew(lease: Lease, stop: threading.Event) -> None:
    address = storage.join(lease.folder, NAME)
    while not stop.wait(RENEW_SECONDS):
        # A store that is away for a while costs a renewal, and perhaps the lease; the next publication finds out.
        with suppress(AccessError, OSError):
            found = _read(lease.folder)
            if found is None or found.id != lease.owner:
                return
            storage.touch(address)


def _read(folder: str) -> Owner | None:
    """The owner, or None where there is no lease that can be read."""
    address = storage.join(folder, NAME)
    try:
        return Owner.model_validate_json(storage.read(address))
    except AccessError:
        raise
    except (UserError, ValidationError):
        return None


def _is_gone(owner: Owner) -> bool:
    """Whether its process was on this machine and has ended."""
    return owner.place == process.place() and (process.started(owner.pid) != owner.started or not owner.started)

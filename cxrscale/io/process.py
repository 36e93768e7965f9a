"""Which process of which machine: who holds a lease, and whose unfinished files may be removed."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Identifies this boot of this machine and its namespace of process numbers; the host where neither is known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def started(pid: int) -> str | None:
    """When a process began, in clock ticks since the boot; None where there is none, or only its remains."""
    try:
        # The name, in brackets, may hold spaces: what follows it begins with the state.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]

"""The sockets on which a process and its children listen, from /proc."""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class Listener(NamedTuple):
    """One listening TCP socket."""

    process: str
    """The end of its command line."""
    host: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host.startswith("127.") or self.host in ("::1", "::ffff:127.0.0.1")


def of_process(pid: int) -> set[Listener]:
    """The listening sockets of a process and of all below it; of those that end meanwhile perhaps none."""
    found: set[Listener] = set()
    try:
        top = psutil.Process(pid)
        processes = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            inodes = set(_sockets(process.pid))
            name = " ".join(process.cmdline())[:120]
            for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
                for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
                    _, address, _, state, *rest = line.split()
                    if state == "0A" and rest[5] in inodes:
                        found.add(Listener(name, *_parsed(address, family)))
        except (OSError, psutil.NoSuchProcess):
            continue
    return found


def _sockets(pid: int) -> Iterator[str]:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(path.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _parsed(text: str, family: socket.AddressFamily) -> tuple[str, int]:
    """The kernel writes an address as hexadecimal words in the machine's byte order."""
    host, port = text.split(":")
    words = [int(host[start : start + 8], 16) for start in range(0, len(host), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)), int(port, 16)

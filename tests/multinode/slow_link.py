"""A slow link: every frame between two network interfaces comes late, and some never.

What `tc ... netem` does where the kernel has it. Run it in the network of the interfaces:
`python slow_link.py ONE OTHER SECONDS LOSS`; it says `ready`, and ends with its process.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Sequence

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
LARGEST = 2**17


def main(one: str, other: str, seconds: float, loss: float) -> None:
    """Pass frames on until the end, each `seconds` later; a part of them, `loss`, is dropped."""
    ends = [_open(one), _open(other)]
    late: tuple[deque[tuple[float, bytes]], ...] = (deque(), deque())
    numbers = random.Random(1)
    print("ready", flush=True)
    while True:
        due = min((queue[0][0] for queue in late if queue), default=time.monotonic() + 1)
        ready, _, _ = select.select(ends, [], [], max(0.0, due - time.monotonic()))
        for end in ready:
            frame = end.recv(LARGEST)
            if numbers.random() >= loss:
                late[1 - ends.index(end)].append((time.monotonic() + seconds, frame))
        _send(ends, late)


def _open(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    # With the header that says which checksums the kernel has left open, and how it would cut what it has not cut.
    end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
    end.bind((name, 0))
    return end


def _send(ends: Sequence[socket.socket], late: Sequence[deque[tuple[float, bytes]]]) -> None:
    for end, queue in zip(ends, late, strict=True):
        while queue and queue[0][0] <= time.monotonic():
            try:
                end.send(queue.popleft()[1])
            except OSError:
                continue  # a link that is down takes nothing


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

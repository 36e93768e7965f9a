"""Decoders that do harm, in a module that a child process imports in no time."""

from __future__ import annotations

import os
import signal
import time


def hang(*_: object) -> None:
    """Takes a minute."""
    time.sleep(60)


def crash(*_: object) -> None:
    """Ends its process."""
    os.kill(os.getpid(), signal.SIGSEGV)

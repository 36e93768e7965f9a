"""What a search waits for while none of its trials runs."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from cxrscale.cluster import groups
from cxrscale.config import Scaling
from cxrscale.training import waiting
from cxrscale.types import WaitLimitError

LOG = logging.getLogger("cxrscale")
RUNNING, PENDING = "RUNNING", "PENDING"
"""Ray Tune's words for a trial that has its room, and one that has not."""

watches: dict[str, RoomWatch] = {}
"""By the search's folder: Ray pickles callbacks for a later restore, and a search that is restored waits anew."""


class RoomWatch:
    """Says what a search waits for, and ends it at `scaling.start_seconds`, as a training is."""

    def __init__(self, run: str, scaling: Scaling) -> None:
        self._run, self._limit = run, scaling.start_seconds
        self._since: float | None = None
        self._say_at = waiting.SAY_SECONDS

    def see(self, states: Sequence[str], now: float | None = None) -> None:
        """Take note of the states of all trials at a time in seconds; None: now.

        Raises:
            WaitLimitError: for longer than the limit none has run of those that should.
        """
        now = time.monotonic() if now is None else now
        waits = PENDING in states and RUNNING not in states
        if not waits:
            if self._since is not None and now - self._since >= waiting.SAY_SECONDS:
                LOG.warning("a trial runs after %.0f s", now - self._since)
            self._since, self._say_at = None, waiting.SAY_SECONDS
            return
        self._since = now if self._since is None else self._since
        waited = now - self._since
        if waited >= self._limit:
            raise WaitLimitError(
                f"scaling.start_seconds={self._limit:g}: no trial of {self._run} has run for {waited:.0f} s, waiting "
                f"for {_what()}; free or add nodes and re-run to resume, or raise the limit"
            )
        if waited >= self._say_at:
            waiting.clear(lambda text: LOG.warning("%s", text))
            LOG.warning("waiting %.0f s for %s; ends at scaling.start_seconds=%g", waited, _what(), self._limit)
            self._say_at = waiting.next_word(self._say_at)


def _what() -> str:
    with suppress(Exception):  # the control service may be away for a moment
        if room := groups.waits_for():
            return f"{waiting.ROOM} {room}{waiting.free_room()}"
    return f"a process to start{waiting.free_room()}"

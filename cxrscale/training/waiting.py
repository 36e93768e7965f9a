"""A run on Ray as its driver sees it: what it waits for is said after a while, and what waits too long is ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cxrscale.cluster import nodes
from cxrscale.types import WaitLimitError

LOG = logging.getLogger("cxrscale")
LOOK_SECONDS = 1.0
SAY_SECONDS = 10.0
"""A wait of so long is said, and again each time that it has grown sixfold or by `AGAIN_SECONDS`."""
AGAIN_SECONDS = 60.0


def sign_of_life(run: str, now: float) -> None:
    """Tell the driver that the run's workers are there; called by rank 0 every second or so."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(run), repr(now))


class Watch:
    """Looks for signs of life of a run's workers while its driver waits for them."""

    def __init__(self, run: str, limit: float) -> None:
        """`limit` is the number of seconds without workers after which the run ends."""
        self._run, self._limit = run, limit
        self._controller: Any = None
        self._ended = threading.Event()
        self._error: WaitLimitError | None = None

    def hold(self, controller: Any) -> None:
        """Take the handle of Ray Train's controller, whose end is that of the workers."""
        self._controller = controller

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the run is watched.

        Raises:
            WaitLimitError: for longer than the limit no worker trained; the run's last checkpoint stays.
        """
        thread = threading.Thread(target=self._look, daemon=True, name="watch")
        thread.start()
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise
        finally:
            self._ended.set()
            thread.join(10)

    def _look(self) -> None:
        last, since, say_at = self._sign(), time.monotonic(), SAY_SECONDS
        while not self._ended.wait(LOOK_SECONDS):
            sign, waited = self._sign(), time.monotonic() - since
            if sign is not None and sign != last:
                if waited >= SAY_SECONDS:
                    LOG.warning("the workers train after %d s", waited)
                last, since, say_at = sign, time.monotonic(), SAY_SECONDS
            elif waited >= self._limit:
                self._error = WaitLimitError(
                    f"scaling.start_seconds={self._limit:g}: no worker of {self._run} has trained for {waited:.0f} s, "
                    f"waiting for {_cause()}; free or add nodes and re-run to resume, or raise the limit"
                )
                self._end()
                return
            elif waited >= say_at:
                LOG.warning(
                    "waiting %.0f s for %s; ends after %g s (scaling.start_seconds)", waited, _cause(), self._limit
                )
                say_at = min(say_at * 6, say_at + AGAIN_SECONDS)

    def _sign(self) -> bytes | None:
        from ray.experimental.internal_kv import _internal_kv_get

        # The control service may be away for a moment; that is no sign.
        with suppress(Exception):
            return _internal_kv_get(_key(self._run))
        return None

    def _end(self) -> None:
        import ray

        if self._controller is not None:
            actor = self._controller._actor_id.hex()
            ray.kill(self._controller)
            # What it has asked for would be given to it, and nobody would ever train there.
            nodes.remove_groups_of(actor)


def _cause() -> str:
    """What this job waits for, as far as it can be known."""
    import ray

    with suppress(Exception):
        if places := nodes.waits_for():
            free, total = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
            state = ", ".join(
                f"{kind} {free.get(kind, 0):g} of {total[kind]:g}" for kind in ("CPU", "GPU") if kind in total
            )
            return f"room for {places} (free: {state})"
    return "its workers to start"


def _key(run: str) -> str:
    return f"cxrscale-sign-of-life-{run}"

"""A run on Ray as its driver sees it: what it waits for is said after a while, and what waits too long is ended.

Driver and workers speak through the key-value store of Ray's control service. Rank 0 puts signs of life there; the
driver hands it what the run has waited for, for the training log, which only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from cxrscale import cluster
from cxrscale.config import Scaling
from cxrscale.training.tracking import Wait
from cxrscale.types import WaitLimitError

LOG = logging.getLogger("cxrscale")
LOOK_SECONDS = 1.0
SAY_SECONDS = 10.0
"""A wait of so long is said, and again each time that it has grown sixfold or by `AGAIN_SECONDS`."""
AGAIN_SECONDS = 60.0
SILENT_SECONDS = 5.0
"""Without a sign for so long, the workers are taken for gone; rank 0 gives one every half second."""
GONE_SECONDS = 60.0
"""Without a sign for so long, a run that was asked to stop ends without them."""
SLOWER = 3.0
"""A step is no wait until it has taken so many times as long as usual: the median of those before it."""
USUAL = 9
"""How many of them."""
ROOM = "room for"
END_TRIES = 10
_LIFE, _WAITS, _SAID, _BEGUN = "cxrscale-life", "cxrscale-waits", "cxrscale-said", "cxrscale-begun"


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life of a run's workers."""

    group: str
    """Another one after each restart."""
    steps: int
    """How far the group has come: it grows with every step, also of a validation."""
    doing: str
    """What rank 0 does, or waits for."""
    time: float
    """Unix seconds on rank 0's clock: two signs are never the same."""


def give_sign(run: str, sign: Sign) -> None:
    """Tell the driver that the run's workers are there; called by rank 0 every second or so."""
    _put(_LIFE, run, "", json.dumps(asdict(sign)))


def take_waits(run: str) -> list[Wait]:
    """What the driver has handed over for the training log since the last call."""
    return [Wait(**json.loads(text)) for text in _take_all(_WAITS, run)]


def say_to(run: str) -> Callable[[str], None]:
    """A function that says a line where `relayed` is entered for the run: on the console of the driver of a search."""
    return lambda text: _put(_SAID, run, uuid.uuid4().hex, text)


def begin(run: str, name: str) -> None:
    """Say that a task of a run has begun; called on its node."""
    _put(_BEGUN, run, name, name)


def take_begun(run: str) -> set[str]:
    """The tasks of a run that have begun since the last call."""
    with suppress(Exception):  # the control service may be away for a moment
        return set(_take_all(_BEGUN, run))
    return set()


@contextmanager
def relayed(run: str) -> Iterator[None]:
    """Inside, what other processes of the cluster say to the run is logged here."""
    ended = threading.Event()

    def relay() -> None:
        last = False
        while not last:
            last = ended.wait(LOOK_SECONDS)
            with suppress(Exception):  # the control service may be away for a moment
                for text in _take_all(_SAID, run):
                    LOG.warning("%s", text)

    thread = threading.Thread(target=relay, daemon=True, name="relay")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(10)


class Standstill:
    """How long a run stands still, from its signs of life; it knows no clock and no Ray."""

    def __init__(self, scaling: Scaling, sign: Sign | None, now: float) -> None:
        """`sign` is the last one, of whatever session; `now` in seconds, as always here."""
        self._scaling, self._sign = scaling, sign
        self.heard = False
        """Whether there was a sign since the beginning."""
        self._alive = self._moved = now
        self._steps_took: deque[float] = deque(maxlen=USUAL)
        self._say_at = SAY_SECONDS

    def seconds(self, now: float) -> float:
        """How long no step has ended."""
        return now - self._moved

    def see(self, sign: Sign | None, now: float) -> float:
        """Take note of a sign; returns how long the run has waited if it goes on with it, and 0 otherwise."""
        before, waited = self._sign, 0.0
        if sign is None or sign == before:
            return 0.0
        self._sign, self._alive, self.heard = sign, now, True
        restarted = before is None or before.group != sign.group
        if sign.steps and (restarted or before is None or before.steps != sign.steps):
            seconds = self.seconds(now)
            if seconds >= self._first_word():
                waited = seconds
            if before is not None and not restarted and before.steps:
                self._steps_took.append(seconds / (sign.steps - before.steps))
            self._moved, self._say_at = now, self._first_word()
        return waited

    def is_time_to_speak(self, now: float) -> bool:
        """Whether the wait has to be said, for the first time or again."""
        if self.seconds(now) < self._say_at:
            return False
        self._say_at = next_word(self._say_at)
        return True

    def activity(self, now: float) -> str | None:
        """What rank 0 does; None where nothing is heard of it."""
        return self._sign.doing if self._sign is not None and now - self._alive < SILENT_SECONDS else None

    def silence(self, now: float) -> float:
        """How long nothing was heard of the workers."""
        return now - self._alive

    def limit(self, now: float) -> str:
        """What will end the wait."""
        hang, start = self._scaling.hang_seconds, self._scaling.start_seconds
        return f"scaling.start_seconds={start:g}" if self.activity(now) is None else f"scaling.hang_seconds={hang:g}"

    def exceeded(self, now: float) -> str:
        """The limit that has passed, or an empty text.

        Past `scaling.hang_seconds` Ray restarts the workers. What it does not see (a disk that never answers) or cannot
        mend ends when there has been time for a restart too.
        """
        hang, start = self._scaling.hang_seconds, self._scaling.start_seconds
        if now - self._alive >= start:
            return f"scaling.start_seconds={start:g}"
        return f"scaling.hang_seconds={hang:g}" if self.seconds(now) >= hang + start else ""

    def _first_word(self) -> float:
        return max(SAY_SECONDS, SLOWER * statistics.median(self._steps_took or [0.0]))


class Watch:
    """Looks for signs of life of a run's workers while its driver waits for them."""

    def __init__(self, run: str, scaling: Scaling, say: Callable[[str], None] | None = None) -> None:
        """`say` says a line to the user; by default as a warning of this process."""
        self.waits: list[Wait] = []
        """What the run has waited for."""
        self._run, self._scaling, self._say = run, scaling, say or _warn
        self._controller: Any = None
        self._ended, self._asked = threading.Event(), threading.Event()
        self._error: WaitLimitError | None = None
        self._stopped = False

    def hold(self, controller: Any) -> None:
        """Take the handle of Ray Train's controller, whose end is that of the workers; None where it has ended."""
        self._controller = controller

    def stop(self) -> None:
        """The workers have been asked to stop: where there is none, nobody will, and the run ends here."""
        self._asked.set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the run is watched. However it ends, nothing stays of what it has asked the cluster for.

        Raises:
            WaitLimitError: for longer than a limit no worker trained; the run's last checkpoint stays.
        """
        clear(self._say)
        thread = threading.Thread(target=self._look, daemon=True, name="watch")
        thread.start()
        try:
            yield
        except Exception:
            if self._error is not None:
                raise self._error from None
            if not self._stopped:
                raise
        finally:
            self._ended.set()
            thread.join(cluster.groups.END_SECONDS)
            self._end()

    def _look(self) -> None:
        with suppress(Exception):
            _take_all(_WAITS, self._run)  # of a session that was killed
        still, causes, limit = Standstill(self._scaling, self._sign(), time.monotonic()), list[str](), ""
        while not self._ended.wait(LOOK_SECONDS):
            sign, now = self._sign(), time.monotonic()
            if waited := still.see(sign, now):
                self._say(f"the workers train after {waited:.0f} s")
                self._note(causes, limit, waited)
                causes = []
            elif field := still.exceeded(now):
                self._give_up(field, [*causes, self._cause(still, now)], still.seconds(now))
                return
            elif self._asked.is_set() and self._nobody_trains(still, now):
                self._say("no worker trains: the run ends with its last checkpoint")
                self._stopped = True
                self._end()
                return
            elif still.is_time_to_speak(now) or (causes and self._cause(still, now) != causes[-1]):
                cause, limit = self._cause(still, now), still.limit(now)
                if cause.startswith(ROOM):
                    clear(self._say)
                self._say(f"waiting {still.seconds(now):.0f} s for {cause}{_room(cause)}; ends at {limit}")
                causes += [cause] if causes[-1:] != [cause] else []

    def _nobody_trains(self, still: Standstill, now: float) -> bool:
        """Whether there is no worker that could write a checkpoint; on a busy machine one may be silent for a while."""
        return still.silence(now) >= GONE_SECONDS or (
            still.activity(now) is None and self._cause(still, now).startswith(ROOM)
        )

    def _note(self, causes: list[str], limit: str, seconds: float) -> None:
        """Keep a wait, and hand it over for the training log."""
        what = ", then ".join(dict.fromkeys(causes)) or "its workers"
        wait = Wait(what, limit, round(seconds, 1), began=round(time.time() - seconds, 3))
        self.waits.append(wait)
        # What is not taken is found missing at the end.
        with suppress(Exception):
            _put(_WAITS, self._run, repr(wait.began), json.dumps(asdict(wait)))

    def _give_up(self, field: str, causes: list[str], seconds: float) -> None:
        last = f"{causes[-1]}{_room(causes[-1])}"
        self._error = WaitLimitError(
            f"{field}: no worker of {self._run} has trained for {seconds:.0f} s, waiting for {last}; "
            "free or add nodes and re-run to resume, or raise the limit"
        )
        self._note(causes, field, seconds)
        self._end()

    def _sign(self) -> Sign | None:
        from ray.experimental.internal_kv import _internal_kv_get

        # The control service may be away for a moment; that is no sign.
        with suppress(Exception):
            text = _internal_kv_get(_key(_LIFE, self._run))
            return Sign(**json.loads(text)) if text is not None else None
        return None

    def _cause(self, still: Standstill, now: float) -> str:
        """What the run waits for, as far as it can be known."""
        with suppress(Exception):
            if self._controller is not None and (room := cluster.groups.waits_for(self._controller._actor_id.hex())):
                return f"{ROOM} {room}"
        return still.activity(now) or ("its workers to be heard of again" if still.heard else "its workers to start")

    def _end(self) -> None:
        """End a controller that has not come to its end, and with it the workers and what it has asked for."""
        # The control service may be away for a moment, or for ever.
        for _ in range(END_TRIES):
            if self._controller is None:
                return
            with suppress(Exception):
                cluster.groups.end_actor(self._controller)
                self._controller = None
                return
            time.sleep(LOOK_SECONDS)


def _warn(text: str) -> None:
    LOG.warning("%s", text)


def _room(cause: str) -> str:
    return free_room() if cause.startswith(ROOM) else ""


def free_room() -> str:
    """How much of the cluster nobody uses, and who holds what nobody will use, e.g. ` (free: CPU 1 of 2)`."""
    import ray

    with suppress(Exception):  # the control service may be away for a moment
        free, total = ray.available_resources(), ray.cluster_resources()  # type: ignore[no-untyped-call]
        kinds = ["CPU"] + ["GPU"] * ("GPU" in total)
        amounts = [f"{kind} {free.get(kind, 0):g} of {total.get(kind, 0):g}" for kind in kinds]
        orphans = [group.bundles for group in cluster.groups.find_orphans()]
        held = f"; ended jobs hold {', '.join(orphans)}: cxrscale doctor --remove-orphans" if orphans else ""
        return f" (free: {', '.join(amounts)}{held})"
    return ""


def next_word(seconds: float) -> float:
    """When a wait that was said after so many seconds is said again."""
    return min(seconds * 6, seconds + AGAIN_SECONDS)


def clear(say: Callable[[str], None]) -> None:
    """Give back what trainings hold, or have asked for, that are no more: this one would wait for it."""
    with suppress(Exception):  # the control service may be away for a moment
        for group in cluster.groups.remove_abandoned():
            say(f"removed {group.bundles} on the cluster, left behind by a training that was killed")


def _key(kind: str, run: str, name: str = "") -> str:
    return f"{kind}\n{run}\n{name}"


def _put(kind: str, run: str, name: str, text: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(kind, run, name), text)


def _take_all(kind: str, run: str) -> list[str]:
    """The texts of a kind for a run, in the order of their names, which are gone afterwards."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

    texts = []
    for key in sorted(_internal_kv_list(_key(kind, run))):
        text = _internal_kv_get(key)
        if text is not None and _internal_kv_del(key):
            texts.append(text.decode())
    return texts

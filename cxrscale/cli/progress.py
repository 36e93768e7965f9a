"""Progress on stderr: bars where a terminal is there, plain lines otherwise. Nothing here changes a result."""

from __future__ import annotations

import os
import pdb
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cxrscale.io import storage
from cxrscale.training import tracking

PLAIN_SECONDS = 10.0
"""Without a terminal, a line at most this often."""


class Bar:
    """Counts images or epochs; `unit` adds how many a second, the note whatever else is worth seeing."""

    def __init__(self, title: str, total: int | None, unit: str | None) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self._began, self._spoke = 0, time.monotonic(), time.monotonic()
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=False)
            self._task = self._progress.add_task(title, total=total)
            self._progress.start()

    def expect(self, total: int) -> None:
        """Say how many there will be in all, once that is known."""
        self.total = total
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def to(self, done: int, note: str = "") -> None:
        """Say how many are done by now."""
        self.done = done
        rate = done / max(1e-9, time.monotonic() - self._began)
        speed = f"  {rate:.0f} {self.unit}/s" if self.unit else ""
        text = f"{self.title}{speed}  {note}".rstrip()
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=text)
        elif time.monotonic() - self._spoke > PLAIN_SECONDS or done == self.total:
            self._spoke = time.monotonic()
            print(f"{text}  {done}/{self.total or '?'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def bar(title: str, total: int | None, unit: str | None) -> Iterator[Bar]:
    """A bar that is closed whatever happens, and ends at a breakpoint: it would draw over the debugger's prompt."""
    shown = Bar(title, total, unit)
    before = sys.breakpointhook

    def stop(*given: Any, **named: Any) -> Any:
        shown.close()
        if before is not sys.__breakpointhook__ or os.environ.get("PYTHONBREAKPOINT"):
            return before(*given, **named)
        # Python's own hook would stop here, one call too deep.
        return pdb.Pdb().set_trace(sys._getframe(1))

    sys.breakpointhook = stop
    try:
        yield shown
    finally:
        sys.breakpointhook = before
        shown.close()


@contextmanager
def watch_run(run: str) -> Iterator[None]:
    """Follow a run's metrics.jsonl while it trains, wherever its workers are."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _follow(run: str, stop: threading.Event) -> None:
    with bar(f"training {run.rsplit('/', 1)[-1]}", None, None) as shown:
        spoken = -1
        # Each look at an object store is a request.
        while not stop.wait(5 if storage.is_remote(run) else 0.5):
            spoken = _show(run, shown, spoken)
        _show(run, shown, spoken)


def _show(run: str, shown: Bar, spoken: int) -> int:
    lines = tracking.read_log(run)
    last: dict[str, dict[str, Any]] = {line["kind"]: line for line in lines}
    if "train" in last and len(lines) != spoken:
        # Early stopping may end sooner: the whole is what the recipe would take.
        shown.expect(last["train"]["steps"])
        shown.to(last["train"]["step"], _note(last))
    return len(lines)


def _note(last: dict[str, dict[str, Any]]) -> str:
    parts = []
    if "train" in last:
        line = last["train"]
        parts.append(f"epoch {line['epoch'] + 1} loss {line['loss']:.3f} {line['images_per_second']:.0f} images/s")
        parts.append(f"waiting for data {line['data_wait']:.0%}")
    if "val" in last:
        shown = [key for key in ("loss", "auroc", "dice_positives") if last["val"].get(key) is not None]
        parts.append("val " + " ".join(f"{key} {last['val'][key]:.3f}" for key in shown))
    return "  ".join(parts)

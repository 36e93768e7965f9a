"""Progress on stderr: bars where there is a terminal, plain lines otherwise. Nothing here changes a result."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cxrscale.io import storage, terminal
from cxrscale.types import AccessError

PLAIN_SECONDS = 10.0
"""Without a terminal, at most one line in this time."""
DRAW_SECONDS = 0.1
"""In a terminal, at most one redraw in this time."""


class Bar:
    """Counts images or epochs; `unit` adds the speed (units per second), the note whatever else is worth seeing.

    It redraws only when it is updated, never from a thread of its own: a debugger's prompt stays as it is.
    """

    def __init__(self, title: str, total: int | None, unit: str | None) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done, self._started = 0, time.monotonic()
        self._printed, self._drawn = self._started, 0.0
        self._progress: Progress | None = None
        console = terminal.console(stderr=True)
        if console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(
                *columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
            )
            self._task = self._progress.add_task(terminal.printable(title), total=total)
            self._progress.start()

    def set_total(self, total: int) -> None:
        """How many there will be, once that is known."""
        self.total = total
        if self._progress is not None:
            self._progress.update(self._task, total=total)

    def update(self, done: int, note: str = "") -> None:
        """How many are done by now."""
        self.done, now = done, time.monotonic()
        speed = f"  {done / max(1e-9, now - self._started):.0f} {self.unit}/s" if self.unit else ""
        text = f"{self.title}{speed}  {note}".rstrip()
        if self._progress is not None:
            self._progress.update(self._task, completed=done, description=terminal.printable(text))
            if now - self._drawn > DRAW_SECONDS or done == self.total:
                self._drawn = now
                self._progress.refresh()
        elif now - self._printed > PLAIN_SECONDS or done == self.total:
            self._printed = now
            print(f"{terminal.printable(text)}  {done}/{self.total or '?'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Stop drawing; the last state stays."""
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()


@contextmanager
def bar(title: str, total: int | None, unit: str | None) -> Iterator[Bar]:
    """A bar that is closed whatever happens."""
    opened = Bar(title, total, unit)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def watch_run(run: str) -> Iterator[None]:
    """Follow a run's train_log.jsonl while it trains, wherever its workers are."""
    stop = threading.Event()
    thread = threading.Thread(target=_follow, args=(run, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _follow(run: str, stop: threading.Event) -> None:
    with bar(f"training {run.rsplit('/', 1)[-1]}", None, None) as opened:
        shown = -1
        # Each read of an object store is a request.
        while not stop.wait(5 if storage.is_remote(run) else 0.5):
            with suppress(AccessError):  # a store that is away for a while: the run itself decides what that means
                shown = _show(run, opened, shown)
        with suppress(AccessError):
            _show(run, opened, shown)


def _show(run: str, opened: Bar, shown: int) -> int:
    """Update the bar if the log has more lines than were shown; returns how many it has."""
    from cxrscale.training import tracking  # only here: it brings OpenCV

    lines = tracking.read_log(run)
    last: dict[str, dict[str, Any]] = {line["kind"]: line for line in lines}
    if "train" in last and len(lines) != shown:
        # Early stopping may end sooner: the total is what the recipe would take.
        opened.set_total(last["train"]["steps"])
        opened.update(last["train"]["step"], run_note(last))
    return len(lines)


def run_note(last: dict[str, dict[str, Any]]) -> str:
    """The newest training line and validation line (kind -> line of the log) as text for a bar."""
    parts = []
    if "train" in last:
        line = last["train"]
        parts.append(f"epoch {line['epoch'] + 1} loss {line['loss']:.3f} {line['images_per_second']:.0f} images/s")
        parts.append(f"waiting for data {line['data_wait']:.0%}")
    if "val" in last:
        names = [key for key in ("loss", "auroc", "dice_positives") if last["val"].get(key) is not None]
        count = last["val"].get("findings")  # in the means, of those of a run with several
        over = "" if count is None else f" over {count:.0f} findings"
        parts.append("val " + " ".join(f"{key} {last['val'][key]:.3f}" for key in names) + over)
    return "  ".join(parts)

"""Bars in a terminal, plain lines elsewhere, and a training run followed by its log."""

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from cxrscale.cli import progress
from cxrscale.io import terminal
from cxrscale.types import AccessError


def test_without_a_terminal_the_last_line_has_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("packing", None, "images") as bar:
        bar.set_total(3)
        for done in (1, 2, 3):
            bar.update(done, "0 quarantined")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"packing  \d+ images/s  0 quarantined  3/3", line)


def test_without_a_terminal_lines_keep_their_distance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("cxrscale.cli.progress.time.monotonic", lambda: now[0])
    with progress.bar("packing", 100, None) as bar:
        for done in range(1, 51):
            now[0] += 1
            bar.update(done)
    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == [
        "11/100",
        "22/100",
        "33/100",
        "44/100",
    ]


def test_in_a_terminal_nothing_is_drawn_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "console", lambda **_: Console(file=stream, force_terminal=True, width=100))
    with progress.bar("training [red]x", 4, "steps") as bar:
        bar.update(4, "loss 0.5")
        assert bar._progress is not None
        # A thread that redraws would draw over a debugger's prompt.
        assert not bar._progress.live.auto_refresh
    assert "training [red]x" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_a_bar_is_closed_after_an_error() -> None:
    with pytest.raises(KeyError), progress.bar("packing", 1, None) as bar:
        raise KeyError
    assert bar._progress is None or not bar._progress.live.is_started


def test_a_run_is_followed_by_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"kind": "train", "step": 4, "time": 1.0, "steps": 4, "epoch": 0, "loss": 0.5, "images_per_second": 31.0}
        | {"data_wait": 0.02},
        {"kind": "val", "step": 4, "time": 2.0, "epoch": 1, "loss": 0.4, "auroc": 0.75, "findings": 3.0},
    ]
    with progress.watch_run(str(tmp_path)):
        (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = capsys.readouterr().err.splitlines()[-1]
    for part in (
        "epoch 1 loss 0.500 31 images/s",
        "waiting for data 2%",
        "val loss 0.400 auroc 0.750 over 3 findings",
        "4/4",
    ):
        assert part in last


def test_a_run_without_a_log_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.watch_run(str(tmp_path)):
        pass
    assert capsys.readouterr().err == ""


def test_a_store_that_is_away_ends_no_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def show(run: str, opened: progress.Bar, shown: int) -> int:  # noqa: ARG001
        asked.append(shown)
        if len(asked) == 1:
            raise AccessError(f"{run} cannot be reached")
        return shown

    monkeypatch.setattr(progress, "_show", show)
    with progress.watch_run(str(tmp_path)):
        while len(asked) < 2:
            time.sleep(0.05)
    assert capsys.readouterr().err == ""

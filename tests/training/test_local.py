"""Debugging: `train --local` is one process, on its main thread, so that a breakpoint gives a prompt."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import TINY_CLASSIFIER

STOPS = """
import torch
from cxrscale.cli import app

torch.set_num_threads(1)
backward = torch.autograd.backward

def stopping(loss):
    if loss.is_meta:  # the check of the recipe before the first step
        return backward(loss)
    torch.autograd.backward = backward
    breakpoint()
    backward(loss)

torch.autograd.backward = stopping
app.main()
"""


def until(terminal: int, mark: str, patience: float = 90.0) -> str:
    """What comes out of the terminal up to the mark."""
    text, end = "", time.monotonic() + patience
    while mark not in text:
        assert time.monotonic() < end, f"no {mark!r} in {text[-2000:]!r}"
        try:
            text += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # the other end has closed
            raise AssertionError(f"no {mark!r} in {text[-2000:]!r}") from None
    return text


@pytest.mark.smoke
def test_a_breakpoint_in_the_loop_is_a_prompt_in_the_very_process(nih_shards: str, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("train: {epochs: 1}\nsampler: {steps_per_epoch: 2}\n")
    words = [*TINY_CLASSIFIER, f"data.shards=[{nih_shards}]", f"tracking.runs_dir={tmp_path}", "tracking.name=debug"]
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONBREAKPOINT"}
    command = [sys.executable, "-c", STOPS, "train", str(recipe), *words, "--local"]
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        try:
            os.close(slave)
            # The frame is the caller's, and nothing draws over the prompt.
            # Python 3.13 stops at the call itself and shows its line, earlier ones at the line after it.
            assert re.search(r"stopping\(\)\r\n(-> [^\r]*\r\n)?\(Pdb\) ?$", until(master, "(Pdb)"))
            for asked, expected in (
                ("import os, threading; print('pid', os.getpid() or 0)", f"pid {process.pid}"),
                ("print(threading.current_thread() is threading.main_thread(), 'main')", "True main"),
                ("print('loss is', bool(loss.isfinite()))", "loss is True"),
                ("where", "cxrscale/training/loop.py"),
            ):
                os.write(master, f"{asked}\n".encode())
                assert expected in until(master, "(Pdb)")
            os.write(master, b"continue\n")
            until(master, str(tmp_path / "debug") + "\r\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(master)

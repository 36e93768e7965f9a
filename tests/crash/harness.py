"""Kills a command at its n-th effect on a disk or a bucket, for any n, and runs it again.

The process that imports cxrscale forks for each attempt: starting Python for each would take seconds. An effect is what
an audit event announces (a file opened for writing, a rename, link, removal, folder), an fsync, or a request to an
object store that changes it. The kill comes before the effect: that of n + 1 is after the n-th.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EFFECTS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate"}
CHANGES = ("put_", "delete_", "create_", "upload_", "complete_", "copy_")
"""How the requests to an object store begin that change it."""
LIMIT_SECONDS = 240
"""A command that takes longer shows where it hangs, and fails."""
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """Counts the effects under some folders, and kills this process at one of them."""

    def __init__(self, roots: Sequence[str], at: int | None, count_file: str) -> None:
        self.roots, self.at, self.count_file, self.count = tuple(roots), at, count_file, 0

    def install(self) -> None:
        """Watch this process from now on; there is no way back."""
        sys.addaudithook(self._audit)
        fsync = os.fsync

        def counted(fd: Any) -> None:
            self.effect()
            fsync(fd)

        os.fsync = counted
        if any(root.startswith("s3://") for root in self.roots):
            import s3fs

            call = s3fs.S3FileSystem._call_s3

            def counted_call(files: Any, method: str, *args: Any, **options: Any) -> Any:
                if method.startswith(CHANGES):
                    self.effect()
                return call(files, method, *args, **options)

            s3fs.S3FileSystem._call_s3 = counted_call

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITES and self._ours(path):
                self.effect()
        elif event in EFFECTS and any(self._ours(argument) for argument in args):
            self.effect()

    def _ours(self, path: object) -> bool:
        return isinstance(path, str | os.PathLike) and str(path).startswith(self.roots)

    def effect(self) -> None:
        """One more effect; perhaps the last."""
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def report(self) -> None:
        """Write the number of effects, unless killed before."""
        Path(self.count_file).write_text(str(self.count))


def run(words: Sequence[str], roots: Sequence[str], at: int | None, log: Path) -> tuple[int, int]:
    """Run `cxrscale words...` in a fork of this process.

    Args:
        words: the command line.
        roots: the folders and buckets whose effects count; [] for none.
        at: the effect before which the process is killed; None: it is not.
        log: where its output goes.

    Returns:
        (exit code, -9 after the kill; number of effects).
    """
    counted = log.with_suffix(".count")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            code = _command(words, Killer(roots, at, str(counted)) if roots else None)
        except BaseException:
            traceback.print_exc()
        finally:
            _remove_own_folders()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, int(counted.read_text()) if code == 0 and roots else -1


def _remove_own_folders() -> None:
    """What Python does at its end, which a fork must not reach: it would run its parent's exit functions too."""
    from cxrscale.io import scratch

    if scratch._created_by == os.getpid():
        for folder in list(scratch._open):
            scratch.remove(folder)


def _command(words: Sequence[str], killer: Killer | None) -> int:
    import torch

    from cxrscale.cli import app

    torch.set_num_threads(1)
    sys.argv = ["cxrscale", *words]
    if killer is not None:
        killer.install()
    try:
        app.main()
    except SystemExit as stop:
        if stop.code:
            return int(stop.code)
    if killer is not None:
        killer.at = None
        killer.report()
    return 0

"""Following a job: its log as it grows, and its end in words and as an exit code."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

from cxrscale.cluster.ray_session import hide_password
from cxrscale.types import UserError, last_line, one_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_WAIT_S = 120
"""Seconds between SIGTERM and SIGKILL when a job is stopped, for a checkpoint; Ray's default of 3 s is too short."""
SILENCE_S = 60.0
"""Seconds without an answer of the job server after which `follow` gives up."""
POLL_S = 2.0
"""Seconds between two looks at a log that the server does not stream; at least, for a long log takes its time."""
SILENT_STREAM_S = 10.0
"""Seconds after which a stream that brings nothing is not trusted without a look at the job's status."""
PENDING_S = 15.0
"""Seconds after which a job that waits is said to wait."""
STREAM_FAILURES = 2
"""Streams that may fail in a row, without a word in between, before the log is polled instead."""

NEVER_STARTED = 69
"""The exit code where the job's command never ran."""
NODE_DIED = 71
"""The exit code where the node or process that ran the command is lost."""
LOST = 75
"""The exit code where the job server no longer answers or no longer knows the job, which may go on."""
REFUSED = 77
"""The exit code where the job server does not take the job."""
STOPPED_WATCHING = 130
"""The exit code after Ctrl-C; the job goes on."""
STOPPED = 143
"""The exit code where the job was stopped, by whomever."""

DIED = ("JOB_SUPERVISOR_ACTOR_DIED", "JOB_SUPERVISOR_ACTOR_UNKNOWN_FAILURE")


class LostJobError(UserError):
    """The job cannot be followed any more; it may go on."""

    exit_code = LOST


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's log until the job ends. Ctrl-C asks whether to stop the job; without a terminal it stops watching.

    Returns:
        0 if the job's command succeeded, its exit code if it failed, else one of the exit codes above.

    Raises:
        UserError: no such job.
        LostJobError: the job server no longer answers, or has forgotten the job.
    """
    log, stopping = _Log(client, name), False
    while True:
        try:
            return _end(log.print_until_end())
        except KeyboardInterrupt:
            if stopping or not _ask_to_stop():
                print_stderr(f"no longer watching; the job continues. {how_to_follow(client, name)}")
                return STOPPED_WATCHING
            stopping = _stop(client, name)


def how_to_follow(client: JobSubmissionClient, name: str) -> str:
    """The commands that watch or stop a job from anywhere."""
    address = hide_password(client.get_address())
    return (
        f"Follow: cxrscale submit --follow {name} --address {address}   Stop: ray job stop {name} --address {address}"
    )


def print_stderr(line: str) -> None:
    """Print a line about the job; its log alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)


def describe(error: Exception) -> str:
    """The reason in an error of the job server or of a proxy before it, as one line without a password."""
    if type(error).__name__ == "AuthenticationError":
        return "it does not take the token, or a proxy before it forbids this"
    # The server puts the cause below a traceback, and ends with a full stop of its own.
    lines = [line.strip(".: \t") for line in str(error).splitlines()]
    return hide_password(one_line(next((line for line in reversed(lines) if line), type(error).__name__)))


class _Log:
    """A job's log, which is printed only once even if the connection is lost."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name, self._printed = client, name, 0
        self._known, self._failed_streams = False, 0
        self._started_at = self._last_answer = time.monotonic()
        self._waiting_said = False

    def print_until_end(self) -> JobDetails:
        """Print new text of the log until the job has ended; returns its last status."""
        self._last_answer = time.monotonic()
        while True:
            try:
                info = self._info()
                if info.status.is_terminal():
                    self._print_rest()
                    return info
                self._say_that_it_waits(info)
                if self._failed_streams < STREAM_FAILURES:
                    self._stream()
                else:
                    self._poll()
            except UserError:
                raise
            except Exception as error:  # proxies and servers answer with whatever they like; the job runs on
                if time.monotonic() - self._last_answer > SILENCE_S:
                    again = how_to_follow(self._client, self._name)
                    reason = describe(error)
                    raise LostJobError(f"the job server no longer answers ({reason}). {again}") from None
            time.sleep(0.3)

    def _info(self) -> JobDetails:
        address = hide_password(self._client.get_address())
        try:
            info = self._client.get_job_info(self._name)
        except RuntimeError as error:
            if f"Job {self._name} does not exist" not in str(error):
                raise
            if self._known:
                raise LostJobError(
                    f"{address} has forgotten job {self._name}: its head was started anew, which ends jobs; submit it "
                    "again to resume"
                ) from None
            raise UserError(f"there is no job {self._name} at {address}; see `ray job list`") from None
        self._known, self._last_answer = True, time.monotonic()
        return info

    def _stream(self) -> None:
        printed = self._printed
        try:
            asyncio.run(self._tail())
        except KeyboardInterrupt:
            raise
        except Exception:  # refused or cut; the status, asked for next, says whether the server is well
            self._failed_streams = 1 if self._printed > printed else self._failed_streams + 1

    async def _tail(self) -> None:
        # The server sends the log from its start to every new client.
        position, stream = 0, self._client.tail_job_logs(self._name)
        waiting = asyncio.ensure_future(anext(stream, None))
        try:
            while True:
                # A stream that a proxy has cut on the server's side alone stays silent for ever.
                done, _ = await asyncio.wait({waiting}, timeout=SILENT_STREAM_S)
                if not done:
                    if (await asyncio.to_thread(self._info)).status.is_terminal():
                        return
                    continue
                if (lines := waiting.result()) is None:
                    return
                self._print(lines, position)
                position += len(lines)
                waiting = asyncio.ensure_future(anext(stream, None))
        finally:
            waiting.cancel()

    def _poll(self) -> None:
        start = time.monotonic()
        self._print(self._client.get_job_logs(self._name), 0)
        time.sleep(max(POLL_S, 4 * (time.monotonic() - start)))

    def _print_rest(self) -> None:
        """Print the end of the log; a node that is lost has taken it along."""
        for attempt in range(3):
            try:
                # The job may have ended between two reads: now the log is complete.
                self._print(self._client.get_job_logs(self._name), 0)
                return
            except Exception as error:
                reason = describe(error)
            time.sleep(attempt * POLL_S)
        print_stderr(f"the rest of the log cannot be read: {reason}")

    def _print(self, text: str, start: int) -> None:
        """Print the part of a text that has not been printed yet; `start` is the text's position in the log."""
        new = text[max(0, self._printed - start) :]
        if start + len(text) > self._printed:
            self._printed = start + len(text)
            print(new, end="", flush=True)

    def _say_that_it_waits(self, info: JobDetails) -> None:
        waited = time.monotonic() - self._started_at
        if str(info.status.value) == "PENDING" and waited > PENDING_S and not self._waiting_said:
            self._waiting_said = True
            print_stderr(f"job {self._name} waits: {last_line(info.message or 'no node has taken it yet')}")


def _end(info: JobDetails) -> int:
    """Say how a job has ended; returns the exit code."""
    status, name = str(info.status.value), info.submission_id
    kind = str(getattr(info.error_type, "value", info.error_type) or "")
    message = last_line(info.message or "")
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        print_stderr(f"job {name} was stopped; submit it again to resume")
        return STOPPED
    if code := info.driver_exit_code:
        if code > 0:
            print_stderr(f"job {name} failed with exit code {code}")
            return code
        print_stderr(f"job {name} was killed by signal {-code}; signal 9 is often a node without memory left")
        return 128 - code
    if info.driver_node_id and kind in DIED:
        print_stderr(f"error: the node of job {name} died: {message}; submit it again to resume")
        return NODE_DIED
    print_stderr(f"error: job {name} never started: {message}")
    return NEVER_STARTED


def _stop(client: JobSubmissionClient, name: str) -> bool:
    try:
        client.stop_job(name)
    except Exception as error:
        print_stderr(f"{name} could not be stopped: {describe(error)}; it continues")
        return False
    print_stderr(f"stopping {name}: it has {STOP_WAIT_S} s for a checkpoint; Ctrl-C stops watching")
    return True


def _ask_to_stop() -> bool:
    if not sys.stdin.isatty():
        return False
    print("\nstop the job, or only stop watching? [s/w] (w) ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower().startswith("s")
    except KeyboardInterrupt:
        return False

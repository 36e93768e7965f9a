"""Any command as a job on a Ray cluster: ship the package, follow the log, return the exit code."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrscale import __version__
from cxrscale.cluster import job_package
from cxrscale.types import UserError, last_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
"""The job server without --address and RAY_API_SERVER_ADDRESS."""
STOP_WAIT_S = 120
"""Seconds between SIGTERM and SIGKILL when a job is stopped, for a checkpoint; Ray's default of 3 s is too short."""
SILENCE_S = 60.0
"""Seconds without an answer of the job server after which `follow` gives up."""
STOPPED_WATCHING = 130
"""The exit code after Ctrl-C."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """How a command is sent to the cluster."""

    working_dir: Path = Path()
    """The folder that becomes the job's folder: the checkout."""
    installed: bool = False
    """The nodes' image has cxrscale, so only recipes are shipped."""
    env: Sequence[str] = ()
    """Environment variables of the job, NAME or NAME=VALUE; never secrets."""
    name: str | None = None
    """The job's submission id; None: Ray chooses."""


def submit(command_line: Sequence[str], spec: JobSpec, address: str | None = None) -> str:
    """Start `cxrscale COMMAND_LINE...` as a job; returns its submission id.

    Raises:
        UserError: no job server at the address, an argument that looks like a secret, a path that the nodes cannot
            reach, or a package that is too large.
    """
    if not command_line:
        raise UserError("nothing to submit; give a command: cxrscale submit train jobs/chexnet14.yaml")
    root = spec.working_dir
    if not root.is_dir():
        raise UserError(f"--working-dir {root} is not a folder; give the checkout")
    job_package.refuse_secrets(command_line)
    sent = job_package.relative_to_package(command_line, root, spec.installed)
    environment = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        **job_package.environment_variables(spec.env),
    }
    recipes = [argument for argument in sent if job_package.is_recipe(argument)]
    shipped = [name for name in recipes if (root / name).is_file()]
    if not spec.installed:
        shipped = job_package.package_files(root, shipped)
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="cxrscale-") as folder:
        runtime: dict[str, Any] = {"env_vars": environment}
        if shipped:
            package = Path(folder) / "package.zip"
            size = job_package.pack(root, shipped, package)
            runtime["working_dir"] = str(package)
            _print_stderr(f"shipping {len(shipped)} files of {root.resolve()}, {size / 2**20:.1f} MiB")
        try:
            return client.submit_job(
                entrypoint=job_package.entrypoint(sent),
                submission_id=spec.name,
                runtime_env=runtime,
                metadata={"cxrscale": __version__, "command": command_line[0]},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise UserError(
                    f"a job named {spec.name} exists; give another --name, or --follow {spec.name}"
                ) from None
            raise UserError(f"the job was refused: {last_line(error)}") from None


def connect(address: str | None = None) -> JobSubmissionClient:
    """Connect to the job server at `address` (http://HEAD:8265), else at RAY_API_SERVER_ADDRESS, else on this machine.

    Raises:
        UserError: there is none, or it needs a token.
    """
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS).rstrip("/")
    address = address if "://" in address else f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address} is not a job server; give the dashboard's address, e.g. http://10.0.0.1:8265"
        )
    _check_http(address)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray prefers the address in the environment to its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for logger in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address} needs a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{address} is not a Ray job server: {last_line(error)}") from None


def _check_http(address: str) -> None:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=8).close()
    except urllib.error.HTTPError:
        return
    except http.client.HTTPException:
        raise UserError(
            f"the service at {address} does not use HTTP; give the dashboard's port, 8265 by default"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"no job server answers at {address}: {reason}; give --address http://HEAD:8265, the dashboard's port"
        ) from None


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's log until the job ends. Ctrl-C asks whether to stop the job; without a terminal it stops watching.

    Returns:
        The exit code of the job's command; 1 if the command never started; 130 if watching or the job was stopped.

    Raises:
        UserError: no such job, or the job server no longer answers.
    """
    log, stopping = _Log(client, name), False
    while True:
        try:
            log.print_until_end()
            return _exit_code(log.info(), stopping)
        except KeyboardInterrupt:
            if stopping or not _ask_to_stop():
                _print_stderr(f"no longer watching; the job continues. {how_to_follow(client, name)}")
                return STOPPED_WATCHING
            stopping = True
            client.stop_job(name)
            _print_stderr(f"stopping {name}: it has {STOP_WAIT_S} s for a checkpoint; Ctrl-C stops watching")


def how_to_follow(client: JobSubmissionClient, name: str) -> str:
    """The commands that watch or stop a job from anywhere."""
    address = client.get_address()
    return (
        f"Follow: cxrscale submit --follow {name} --address {address}   Stop: ray job stop {name} --address {address}"
    )


class _Log:
    """A job's log, which is printed only once even if the connection is lost."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name, self._printed = client, name, 0

    def info(self) -> JobDetails:
        """The job's status."""
        try:
            return self._client.get_job_info(self._name)
        except RuntimeError as error:
            if "does not exist" in str(error) or "404" in str(error):
                raise UserError(
                    f"there is no job {self._name} at {self._client.get_address()}; see `ray job list`"
                ) from None
            raise

    def print_until_end(self) -> None:
        """Print new text of the log until the job has ended."""
        last_answer = time.monotonic()
        while True:
            before = self._printed
            try:
                if self.info().status.is_terminal():
                    # The job may have ended between two reads: now the log is complete.
                    self._print(self._client.get_job_logs(self._name), 0)
                    return
                asyncio.run(self._tail())
                last_answer = time.monotonic()
            except UserError:
                raise
            except (OSError, RuntimeError) as error:  # aiohttp's and requests' errors are OSErrors
                last_answer = time.monotonic() if self._printed > before else last_answer
                if time.monotonic() - last_answer > SILENCE_S:
                    again = how_to_follow(self._client, self._name)
                    raise UserError(f"the job server no longer answers ({last_line(error)}). {again}") from None
            time.sleep(0.3)

    async def _tail(self) -> None:
        # The server sends the log from its start to every new client.
        position = 0
        async for lines in self._client.tail_job_logs(self._name):
            self._print(lines, position)
            position += len(lines)

    def _print(self, text: str, start: int) -> None:
        """Print the part of a text that has not been printed yet; `start` is the text's position in the log."""
        new = text[max(0, self._printed - start) :]
        if start + len(text) > self._printed:
            self._printed = start + len(text)
            print(new, end="", flush=True)


def _exit_code(info: JobDetails, stopping: bool) -> int:
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        _print_stderr(f"job {info.submission_id} was stopped")
        return STOPPED_WATCHING if stopping else 1
    code = info.driver_exit_code
    if not code:
        _print_stderr(f"error: job {info.submission_id} did not start: {last_line(info.message or '')}")
        return 1
    _print_stderr(f"job {info.submission_id} failed with exit code {code}")
    return code if code > 0 else 128 - code


def _ask_to_stop() -> bool:
    if not sys.stdin.isatty():
        return False
    print("\nstop the job, or only stop watching? [s/w] (w) ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower().startswith("s")
    except KeyboardInterrupt:
        return False


def _print_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

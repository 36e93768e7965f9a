"""Any command as a job on a Ray cluster: ships the package, follows the log, passes the exit code on."""

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
from cxrscale.types import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT_S = 120
"""Seconds between SIGTERM and SIGKILL when a job is stopped: time for a checkpoint. Ray's own 3 s are not."""
SILENCE_S = 60.0
"""Seconds without any answer of the job server after which following ends."""
STOPPED_WATCHING = 130


@dataclass(frozen=True, slots=True)
class JobSpec:
    """How a command goes to the cluster."""

    working_dir: Path = Path()
    """The folder that becomes the job's own: the checkout."""
    installed: bool = False
    """The nodes' image has cxrscale: only recipes are shipped."""
    env: Sequence[str] = ()
    """Variables to pass on, NAME or NAME=VALUE; never secrets."""
    name: str | None = None
    """The job's submission id; None: Ray chooses."""


def submit(words: Sequence[str], shipment: JobSpec, address: str | None = None) -> str:
    """Start `cxrscale WORDS...` as a job; returns its submission id.

    Raises:
        UserError: no job server at the address, a secret among the words, a path that the cluster will not have, or
            too large a package.
    """
    if not words:
        raise UserError("nothing to submit; give a command: cxrscale submit train jobs/chexnet14.yaml")
    root = shipment.working_dir
    if not root.is_dir():
        raise UserError(f"--working-dir {root} is no folder; give the checkout")
    job_package.refuse_secrets(words)
    sent = job_package.relative_to_package(words, root, shipment.installed)
    environment = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
        **job_package.environment_variables(shipment.env),
    }
    shipped = (
        [word for word in sent if job_package.is_recipe(word)]
        if shipment.installed
        else job_package.package_files(root)
    )
    shipped = [name for name in shipped if (root / name).is_file()]
    client = connect(address)
    with tempfile.TemporaryDirectory(prefix="cxrscale-") as folder:
        runtime: dict[str, Any] = {"env_vars": environment}
        if shipped:
            archive = Path(folder) / "package.zip"
            size = job_package.pack(root, shipped, archive)
            runtime["working_dir"] = str(archive)
            _say(f"shipping {len(shipped)} files of {root.resolve()}, {size / 2**20:.1f} MiB")
        try:
            return client.submit_job(
                entrypoint=job_package.entrypoint(sent),
                submission_id=shipment.name,
                runtime_env=runtime,
                metadata={"cxrscale": __version__, "command": words[0]},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                raise UserError(
                    f"a job named {shipment.name} exists; give another --name, or --follow {shipment.name}"
                ) from None
            raise UserError(f"the job was refused: {_last_line(str(error))}") from None


def connect(address: str | None = None) -> JobSubmissionClient:
    """The job server at http://HEAD:8265, else at RAY_API_SERVER_ADDRESS, else on this machine.

    Raises:
        UserError: there is none, or it wants a token.
    """
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS).rstrip("/")
    address = address if "://" in address else f"http://{address}"
    if not address.startswith(("http://", "https://")):
        raise UserError(f"--address {address} is no job server; give the dashboard's, e.g. http://10.0.0.1:8265")
    _answers(address)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    # Ray would take the environment's address before the one that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{address} is no Ray job server: {_last_line(str(error))}") from None


def _answers(address: str) -> None:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=8).close()
    except urllib.error.HTTPError:
        return
    except http.client.HTTPException:
        raise UserError(
            f"what answers at {address} speaks no HTTP; give the dashboard's port, 8265 by default"
        ) from None
    except (OSError, ValueError) as error:
        said = getattr(error, "reason", None) or error
        raise UserError(
            f"no job server answers at {address}: {said}; give --address http://HEAD:8265, the dashboard's port"
        ) from None


def follow(client: JobSubmissionClient, name: str) -> int:
    """Print a job's log until it ends. Ctrl-C asks whether to stop the job; without a terminal it only stops watching.

    Returns:
        The exit code of the job's command; 1 where the command never started; 130 where watching or the job was
        stopped.

    Raises:
        UserError: no such job, or the job server has gone.
    """
    log, stopping = _Log(client, name), False
    while True:
        try:
            log.until_the_end()
            return _verdict(log.info(), stopping)
        except KeyboardInterrupt:
            if stopping or not _wants_to_stop():
                _say(f"no longer watching; the job goes on. {how_to_follow(client, name)}")
                return STOPPED_WATCHING
            stopping = True
            client.stop_job(name)
            _say(f"stopping {name}: it has {STOP_WAIT_S} s for a checkpoint; Ctrl-C stops watching")


def how_to_follow(client: JobSubmissionClient, name: str) -> str:
    """The commands that take up or end a job from anywhere."""
    address = client.get_address()
    return (
        f"Follow: cxrscale submit --follow {name} --address {address}   Stop: ray job stop {name} --address {address}"
    )


class _Log:
    """A job's log, printed once however often the connection is lost."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self._client, self._name, self._printed = client, name, 0

    def info(self) -> JobDetails:
        try:
            return self._client.get_job_info(self._name)
        except RuntimeError as error:
            if "does not exist" in str(error) or "404" in str(error):
                raise UserError(
                    f"there is no job {self._name} at {self._client.get_address()}; see `ray job list`"
                ) from None
            raise

    def until_the_end(self) -> None:
        heard = time.monotonic()
        while True:
            before = self._printed
            try:
                if self.info().status.is_terminal():
                    # The job may have ended between two reads: this one has the whole log.
                    self._print(self._client.get_job_logs(self._name), 0)
                    return
                asyncio.run(self._tail())
                heard = time.monotonic()
            except UserError:
                raise
            except (OSError, RuntimeError) as error:  # aiohttp's and requests' errors are OSErrors
                heard = time.monotonic() if self._printed > before else heard
                if time.monotonic() - heard > SILENCE_S:
                    again = how_to_follow(self._client, self._name)
                    raise UserError(f"the job server no longer answers ({_last_line(str(error))}). {again}") from None
            time.sleep(0.3)

    async def _tail(self) -> None:
        # The server sends the log from its beginning to each new listener.
        seen = 0
        async for lines in self._client.tail_job_logs(self._name):
            self._print(lines, seen)
            seen += len(lines)

    def _print(self, text: str, start: int) -> None:
        """Print what of the text, which begins at character `start` of the log, has not been printed."""
        new = text[max(0, self._printed - start) :]
        if start + len(text) > self._printed:
            self._printed = start + len(text)
            print(new, end="", flush=True)


def _verdict(info: JobDetails, stopping: bool) -> int:
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        _say(f"job {info.submission_id} was stopped")
        return STOPPED_WATCHING if stopping else 1
    code = info.driver_exit_code
    if not code:
        _say(f"error: job {info.submission_id} did not start: {_last_line(info.message or '')}")
        return 1
    _say(f"job {info.submission_id} failed with exit code {code}")
    return code if code > 0 else 128 - code


def _wants_to_stop() -> bool:
    if not sys.stdin.isatty():
        return False
    print("\nstop the job, or only stop watching? [s/w] (w) ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower().startswith("s")
    except KeyboardInterrupt:
        return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"

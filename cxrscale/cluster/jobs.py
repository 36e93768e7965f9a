"""Any command as a job on a Ray cluster: ship the package, follow the log, return the exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cxrscale import __version__
from cxrscale.cluster import job_package
from cxrscale.cluster.job_log import REFUSED, STOP_WAIT_S, describe, print_stderr
from cxrscale.cluster.job_log import STOPPED as STOPPED
from cxrscale.cluster.job_log import STOPPED_WATCHING as STOPPED_WATCHING
from cxrscale.cluster.job_log import follow as follow
from cxrscale.cluster.job_log import how_to_follow as how_to_follow
from cxrscale.cluster.job_package import Parameter as Parameter
from cxrscale.cluster.job_server import check_id as check_id
from cxrscale.cluster.job_server import connect as connect
from cxrscale.io import scratch
from cxrscale.types import UserError


class RefusedJobError(UserError):
    """The job server does not take the job."""

    exit_code = REFUSED


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


def submit(
    command_line: Sequence[str], spec: JobSpec, address: str | None = None, parameters: Sequence[Parameter] = ()
) -> str:
    """Start `cxrscale COMMAND_LINE...` as a job; returns its submission id. Where its results go is printed first.

    Args:
        parameters: what the command makes of the command line.

    Raises:
        UserError: no job server at the address, an argument that looks like a secret, a path that the nodes cannot
            reach, a package that is too large, or a name that is taken.
        RefusedJobError: the job server does not take the job.
    """
    if not command_line:
        raise UserError("nothing to submit; give a command: cxrscale submit train jobs/chexnet14.yaml")
    root = spec.working_dir
    if not root.is_dir():
        raise UserError(f"--working-dir {root} is not a folder; give the checkout")
    if spec.name is not None:
        check_id(spec.name, "--name")
    job_package.refuse_secrets(command_line)
    command = job_package.prepare(command_line, parameters, root, spec.installed)
    given = job_package.environment_variables(spec.env)
    client = connect(address)
    # Only what the cluster cannot know: its own nodes have the mode that it was started with.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **given}
    if mode := os.environ.get("RAY_AUTH_MODE"):
        environment.setdefault("RAY_AUTH_MODE", mode)
    shipped = command.recipes if spec.installed else job_package.package_files(root, command.recipes)
    folder = scratch.make()
    try:
        runtime: dict[str, Any] = {"env_vars": environment}
        if shipped:
            package = folder / "package.zip"
            size = job_package.pack(root, shipped, package)
            runtime["working_dir"] = str(package)
            print_stderr(f"shipping {len(shipped)} files of {root.resolve()}, {size / 2**20:.1f} MiB")
        for result in command.results:
            print_stderr(f"results: {result}")
        try:
            return client.submit_job(
                entrypoint=job_package.entrypoint(command.words),
                submission_id=spec.name,
                runtime_env=runtime,
                metadata={"cxrscale": __version__, "command": command_line[0]},
            )
        except Exception as error:  # the server's own, or whatever a proxy before it answers
            raise _refusal(error, spec.name) from None
    finally:
        scratch.remove(folder)


def _refusal(error: Exception, name: str | None) -> UserError:
    text = str(error)
    if "already exists" in text:
        return UserError(f"a job named {name} exists; give another --name, or --follow {name}")
    if "413" in text[:60]:
        return RefusedJobError(
            "the job was refused: a proxy before the job server takes no package of this size (413); ship less with "
            "--installed, or go past the proxy"
        )
    return RefusedJobError(f"the job was refused: {describe(error)}")

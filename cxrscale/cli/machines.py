"""Commands about machines: doctor, submit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cxrscale.cli.group import app
from cxrscale.io import storage
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.cluster import jobs

NO_JOBS = frozenset({"submit", "serve"})
"""Commands that are none for a job: a service must be where its clients reach it."""

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command("doctor")
def doctor_command(
    address: Annotated[
        str | None, typer.Option(help="A cluster, host:6379; else RAY_ADDRESS, else this machine.")
    ] = None,
    shards: Annotated[list[str] | None, typer.Option(help="A dataset that every node must read.")] = None,
    root: Annotated[str | None, typer.Option(help="Where runs will go.")] = None,
    remove_orphans: Annotated[
        bool, typer.Option("--remove-orphans", help="Remove placement groups that killed searches left in the cluster.")
    ] = False,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write it as JSON.")] = None,
) -> None:
    """What this machine or cluster can do, and how to fix what it cannot; exit code 1 where something is wrong."""
    from cxrscale.cluster import doctor

    rows, facts = doctor.examine(address, shards or [], root, remove_orphans)
    doctor.show(rows)
    if out is not None:
        doctor.write(rows, facts, out)
        print(storage.absolute(out))
    if any(row.verdict == doctor.WRONG for row in rows):
        raise typer.Exit(1)


@app.command("submit", context_settings={"ignore_unknown_options": True})
def submit_command(
    words: Annotated[
        list[str] | None, typer.Argument(help="Any command and its arguments.", metavar="COMMAND ARGS...")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The head's dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The job's id; else Ray makes one.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id and leave; the job goes on.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Watch a job that was submitted before.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Pass a variable on, NAME or NAME=VALUE; no secrets.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="The checkout; it becomes the job's folder.")] = Path(),
    installed: Annotated[bool, typer.Option("--installed", help="The image has cxrscale: ship recipes alone.")] = False,
) -> None:
    """Run any command as a job on a Ray cluster and follow it: cxrscale submit train jobs/chexnet14.yaml --address URL.

    The exit code is that of the job's command. Others: 69 it never started, 71 its node died, 75 the job server does
    not answer any more, 77 the job was refused, 130 Ctrl-C stopped watching, 143 the job was stopped. Ctrl-C asks
    whether to stop the job (it writes a checkpoint) or only to stop watching.
    """
    from cxrscale.cluster import jobs

    if follow is None:
        spec = jobs.JobSpec(working_dir, installed, tuple(env or ()), name)
        follow = jobs.submit(words or [], spec, address, command_parameters(words or []))
        if detach:
            print(jobs.how_to_follow(jobs.connect(address), follow), file=sys.stderr)
            print(follow)
            return
        print(f"job {follow}", file=sys.stderr)
    raise typer.Exit(jobs.follow(jobs.connect(address), jobs.check_id(follow, "--follow")))


def command_parameters(words: list[str]) -> list[jobs.Parameter]:
    """What the command to submit makes of its words, so that its mistakes are found here.

    Raises:
        UserError: there is no such command, or it is not one for a job.
    """
    from cxrscale.cluster import jobs

    if not words:
        return []
    commands: Any = typer.main.get_command(app)
    command = None if words[0] in NO_JOBS else commands.commands.get(words[0])
    if command is None:
        names = ", ".join(sorted(set(commands.commands) - NO_JOBS))
        raise UserError(f"there is no command {words[0]!r} to submit; give one of {names}")
    context = command.make_context(words[0], list(words[1:]))
    return [
        jobs.Parameter(
            parameter.name,
            parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name.upper(),
            context.params[parameter.name],
            "DEFAULT" not in str(context.get_parameter_source(parameter.name)),
        )
        for parameter in command.params
        if parameter.name in context.params
    ]

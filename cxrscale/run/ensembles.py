"""Ensembles of trained runs, evaluated as runs of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.evaluation import Comparison
from cxrscale.io import lease, storage, write_artifact
from cxrscale.run.comparisons import compare_runs
from cxrscale.run.trained_run import RESAMPLES, Progress, Run
from cxrscale.types import UserError


def ensemble(
    runs: Sequence[str | Path],
    name: str,
    mean: Literal["probabilities", "logits"] = "probabilities",
    *,
    hflip: bool = False,
) -> Run:
    """Make a run of several trained runs: its score is the mean of theirs. It stands beside the first of them.

        cx.ensemble(["runs/a", "runs/b"], "both").choose_thresholds()

    Args:
        name: of the new run's folder; an ensemble of this name and these runs is opened.
        mean: of the runs' probabilities, or of their logits.
        hflip: each model also sees the image mirrored left to right (test-time augmentation).

    Raises:
        UserError: the runs differ in datasets or findings, or the name is taken or no name of a run.
    """
    from cxrscale.inference import Averaging, build_ensemble

    folder = _folder(runs, name)
    with lease.held(folder, f"ensemble {name}"):
        build_ensemble(runs, folder, Averaging(mean=mean, hflip=hflip))
    return Run(folder)


def ensemble_gains(run: Run, resamples: int = RESAMPLES, progress: Progress | None = None) -> dict[str, Comparison]:
    """An evaluated ensemble against each of its members on the test split; kept in its ensemble.json.

    Args:
        resamples: bootstrap resamples of the patients.

    Raises:
        UserError: it is no ensemble, or a member is gone or has changed.
    """
    from cxrscale.inference import ensemble as built

    info = built.read_ensemble(run.path)
    if info is None:
        raise UserError(f"{run.path} is no ensemble")
    gains = {}
    for member in info.members:
        trained = Run(member.run)
        trained.predictions("test", progress)
        gains[member.run] = compare_runs(run, trained, "test", resamples)
        if gains[member.run].b.checkpoint != member.checkpoint:
            raise UserError(f"{member.run} has other weights than when the ensemble was made; make it again")
    write_artifact(run.artifact(built.NAME), info.model_copy(update={"gains": gains}))
    return gains


def _folder(runs: Sequence[str | Path], name: str) -> str:
    config.parse(Recipe, {"tracking": {"name": name}}, where="--name")  # as of a run that is trained
    first = storage.absolute(str(runs[0])).rstrip("/") if runs else "runs/none"
    return storage.join(first.rpartition("/")[0], name)

"""Every way a run can end: what it leaves, and that all who ask how it stands get the same answer.

What makes a real process end in each of these ways is tested where it happens: `training/test_survival.py` (lost
workers, hung ones, a lost driver, a lost node, SIGTERM), `training/test_launch.py` (a limit, a signal without a worker,
what is not finite), `tuning/test_interrupted.py` and `multinode` (lost machines).
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.io import read_sealed_yaml, storage, write_artifact
from cxrscale.run import open_run
from cxrscale.training import resume, run_files, run_info
from cxrscale.training.run_info import Outcome
from cxrscale.tuning import results, trial
from cxrscale.tuning.trial import Study
from cxrscale.types import NonFiniteError, UserError, WaitLimitError


@dataclass(frozen=True)
class End:
    """How a session ends."""

    ending: str
    """What every command and page says."""
    outcome: bool | None = None
    """What rank 0 leaves: whether it came to the end; None: it was lost before."""
    error: BaseException | None = None
    """What ends the driver; a lost driver is one that writes nothing any more."""
    exit_code: int | None = None
    """Of the command."""
    driver_lost: bool = False


ENDS = {
    "finished": End("finished", outcome=True),
    "stopped by a signal": End("stopped", outcome=False),
    "stopped by a signal while no worker trained": End("stopped"),
    "Ctrl-C twice": End("stopped", error=KeyboardInterrupt()),
    "no room within the limit": End("failed", error=WaitLimitError("scaling.start_seconds=9: no worker"), exit_code=6),
    "a node lost, and no other came": End("failed", error=WaitLimitError("scaling.start_seconds=9"), exit_code=6),
    "workers lost too often": End("failed", error=UserError("training failed on a worker: it died"), exit_code=2),
    "a worker out of memory too often": End("failed", error=UserError("training failed: OutOfMemory"), exit_code=2),
    "out of memory in this process": End("failed", error=MemoryError()),
    "not finite": End("diverged", error=NonFiniteError("the loss is nan at step 3"), exit_code=4),
    "the driver lost": End("running, or killed", driver_lost=True),
    "the driver lost after its workers had finished": End("finished", outcome=True, driver_lost=True),
    "the driver lost after its workers had stopped": End("running, or killed", outcome=False, driver_lost=True),
    "the last worker lost after its outcome": End("finished", outcome=True, error=UserError("training failed")),
}


def leave(end: End, run: str) -> None:
    """Leave what a session that ends so leaves in a folder with the log and the checkpoints of its training."""
    old = run_info.read_run_info(run)
    inputs = run_info.RunInputs(manifest=old.manifest, shards=old.shards)
    storage.remove(storage.join(run, run_info.RUN_INFO))
    while_it_runs = b""
    with suppress(UserError, KeyboardInterrupt, MemoryError), run_info.record_session(run, inputs, 2, None):
        if end.outcome is not None:
            outcome = Outcome(finished=end.outcome, epochs=2, best=0.9, device="CPU", workers=2)
            write_artifact(storage.join(run, run_info.OUTCOME), outcome)
        while_it_runs = storage.read(storage.join(run, run_info.RUN_INFO))
        left = storage.read(storage.join(run, run_info.OUTCOME)) if end.outcome is not None else b""
        if end.error is not None:
            raise end.error
    if end.driver_lost:
        storage.write(storage.join(run, run_info.RUN_INFO), while_it_runs)
        if left:
            storage.write(storage.join(run, run_info.OUTCOME), left)


@pytest.fixture
def study(classifier_run: str, tmp_path: Path) -> Study:
    """A search of one trial, whose folder has a whole training."""
    tree = read_sealed_yaml(f"{classifier_run}/{resume.RECIPE}")
    recipe = config.parse(Recipe, config.override(tree, ["tune.baseline_seeds=0"]), where="test")
    inputs = run_info.RunInputs(manifest=run_info.read_run_info(classifier_run).manifest)
    study = Study(str(tmp_path / "search"), recipe.model_dump(mode="json"), inputs, use_gpu=False)
    shutil.copytree(classifier_run, study.folder(0))
    return study


def is_refused(run: str) -> bool:
    """Whether the same command would refuse to go on, since there is nothing left to do."""
    recipe = config.parse(Recipe, read_sealed_yaml(f"{run}/{resume.RECIPE}"), where="test")
    old = run_info.read_run_info(run)
    try:
        resume.prepare(recipe, run_info.RunInputs(manifest=old.manifest), run)
    except UserError as error:
        return "is finished" in str(error)
    return False


@pytest.mark.parametrize("how", ENDS)
def test_all_who_ask_how_a_run_stands_get_the_same_answer_and_the_next_session_ends_it(how: str, study: Study) -> None:
    end, run = ENDS[how], study.folder(0)
    leave(end, run)
    info = run_info.read_run_info(run)
    assert info.ending == end.ending
    finished = end.ending == "finished"
    ask: dict[str, Callable[[], bool]] = {
        "train": lambda: run_info.read_run_info(run).finished,
        "tune": lambda: trial.is_finished(run),
        "the table of a search": lambda: results.read_trials(study, {}, {study.name(0): 0.5})[0].status == "finished",
        "open_run": lambda: open_run(run).info.finished,
        "a resume": lambda: is_refused(run),
    }
    assert {who: answer() for who, answer in ask.items()} == dict.fromkeys(ask, finished)
    assert not run_files.verify(run).faults
    # The reason is there for every end that has one, and the session's time unless nobody was left to write it.
    expected = end.error if isinstance(end.error, Exception) else None
    assert (info.error is None) == (expected is None)
    assert (info.sessions[-1].ended is None) == end.driver_lost
    assert info.diverged == isinstance(expected, NonFiniteError)
    if isinstance(expected, UserError):
        assert info.error == str(expected)
        assert end.exit_code in (expected.exit_code, None)
    # Whatever it was, the next session can finish it.
    with run_info.record_session(run, run_info.RunInputs(manifest=info.manifest), 1, None):
        assert run_info.read_run_info(run).ending == "running, or killed"
        assert not storage.exists(storage.join(run, run_info.OUTCOME))
        outcome = Outcome(finished=True, epochs=2, best=0.9, device="CPU", workers=1)
        write_artifact(storage.join(run, run_info.OUTCOME), outcome)
    after = run_info.read_run_info(run)
    assert (after.ending, after.error, len(after.sessions)) == ("finished", None, 2)
    assert all(session.ended is not None for session in after.sessions)

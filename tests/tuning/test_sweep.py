"""Searches on a real Ray cluster: stopped early, killed and resumed, as a grid, with Optuna."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cxrscale import config
from cxrscale.cli import progress
from cxrscale.cluster import groups
from cxrscale.config import Recipe
from cxrscale.inference import load_model, predictions
from cxrscale.io import storage
from cxrscale.reporting import tuning_page
from cxrscale.training import run_files, run_info, tracking
from cxrscale.tuning import results, search_space, sweep, tuner
from cxrscale.tuning.search_info import read_search_info, write_search_info
from cxrscale.types import UserError, WaitLimitError
from tests.conftest import tiny
from tests.tiny import TINY_SEGMENTER

LR = 'tune.space={optim.lr: "loguniform(1e-4, 1e-2)", sampler.sampling: [all, balanced]}'
SHORT = (
    "train.epochs=3",
    "sampler.steps_per_epoch=3",
    "tune.baseline_seeds=2",
    "tune.trials=4",
    "tune.reduction_factor=2",
)


def rows(run: str | Path) -> list[dict[str, Any]]:
    trials: list[dict[str, Any]] = pq.read_table(io.BytesIO((Path(run) / results.PARQUET).read_bytes())).to_pylist()
    return trials


def search(recipe: Recipe) -> sweep.SearchResult:
    result = sweep.tune(recipe, "tiny", progress.bar, tuning_page.write)
    assert result.finished
    return result


@pytest.mark.usefixtures("ray_cluster")
def test_a_search_writes_a_recipe_a_checkpoint_a_table_and_a_page(nih_shards: str, tmp_path: Path) -> None:
    more = ("tracking.wandb=offline", "tracking.gpu_hour_price=3.6", "tune.max_concurrent_trials=1")
    # There is no such split: whatever looked at the test split would fail.
    recipe = tiny(nih_shards, tmp_path, LR, *SHORT, *more, "data.test_split=nowhere")
    run = Path(search(recipe).run)
    trials = rows(run)
    assert [row["trial"] for row in trials] == ["seed-0", "seed-1", *(f"trial-{n:03d}" for n in range(4))]
    for row in trials:
        lines = [line for line in tracking.read_log(row["run"]) if line["kind"] == "val"]
        assert row["curve"] == [line["auroc"] for line in lines]
        assert row["auroc"] == max(row["curve"])
        assert row["stopped_early"] == (row["epochs"] < 3) == (not run_info.read_run_info(row["run"]).finished)
        assert row["cost"] == pytest.approx(row["worker_hours"] * 3.6, abs=0.01)
        assert row["worker_hours"] == pytest.approx(row["seconds"] / 3600, abs=1e-4)
        assert 0 <= row["f1_at_own_thresholds"] <= 1
    assert not any(row["stopped_early"] for row in trials if row["seed"])
    # One after another, halving stops whatever is worse than the median of those before it.
    assert any(row["stopped_early"] for row in trials)
    seeds = [config.load_recipe(Path(row["run"]) / "recipe.yaml").sampler.seed for row in trials]
    assert seeds == [0, 1, 0, 0, 0, 0]
    best = max((row for row in trials if not row["seed"]), key=lambda row: row["auroc"])
    again = config.load_recipe(run / results.BEST)
    assert (again.optim.lr, again.sampler.sampling) == (best["optim.lr"], best["sampler.sampling"])
    weights = load_model(run, torch.device("cpu")).model.state_dict()
    of_trial = load_model(best["run"], torch.device("cpu")).model.state_dict()
    assert all(torch.equal(value, of_trial[name]) for name, value in weights.items())
    assert not list(run.rglob("predictions-test*"))
    assert "times the seed sd" in (run / "tune.html").read_text() or "no trial beats" in (run / "tune.html").read_text()
    logged = [path for row in trials for path in Path(row["run"]).glob("wandb/offline-run-*/*.wandb")]
    assert len(logged) == len(trials)
    # A trial that is stopped early may write its last files for a while, up to 20 s.
    for _ in range(600):
        if not list(run.rglob(f"{storage.TEMPORARY_PREFIX}*")):
            break
        time.sleep(0.05)
    files = run_files.verify(str(run))
    assert (files.faults, files.without) == ((), ())
    # A trial that is stopped early may leave before wandb has written its first record.
    ended = [Path(row["run"]) for row in trials if not row["stopped_early"]]
    assert all(b"tiny" in path.read_bytes() for run_ in ended for path in run_.glob("wandb/offline-run-*/*.wandb"))
    with pytest.raises(UserError, match=r"search tiny is finished, see .*tiny; give another tracking\.name"):
        sweep.tune(recipe, "tiny", progress.bar)


def killed_after(trials: int, recipe: Recipe, folder: Path) -> None:
    """Search in a driver of its own on this cluster; SIGKILL it once so many trainings are finished."""
    import ray

    (folder / "recipe.yaml").write_text(config.to_yaml(recipe))
    script = (
        "import sys\n"
        "from cxrscale import config\n"
        "from cxrscale.cli import progress\n"
        "from cxrscale.tuning import sweep\n"
        "sweep.tune(config.load_recipe(sys.argv[1]), 'tiny', progress.bar)\n"
    )
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "recipe.yaml")]
    with subprocess.Popen(command, env=environment) as driver:
        try:
            while len(finished(folder)) < trials:
                assert driver.poll() is None, "the search ended before it was killed"
                time.sleep(0.05)
        finally:
            driver.send_signal(signal.SIGKILL)
    assert not (folder / "tiny" / results.PARQUET).exists()


def finished(folder: Path) -> list[Path]:
    trials = (folder / "tiny" / "trials").glob("*/run.json")
    return [path.parent for path in trials if json.loads(path.read_text())["finished"]]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_search_resumes_and_keeps_what_is_finished(nih_shards: str, tmp_path: Path) -> None:
    more = (
        "tune.method=random",
        "tune.baseline_seeds=1",
        "tune.trials=2",
        "train.epochs=6",
        "sampler.steps_per_epoch=6",
    )
    recipe = tiny(nih_shards, tmp_path, LR, *SHORT, *more)
    killed_after(1, recipe, tmp_path)
    before = {path.name: (path / "best.pt").stat().st_mtime_ns for path in finished(tmp_path)}
    # A trial whose folder has no run.json yet had not begun to train.
    begun = {path.parent.name for path in (tmp_path / "tiny" / "trials").glob("*/run.json")} - set(before)
    with pytest.raises(
        UserError, match=r"search tiny was begun with another recipe: optim\.ema_decay=None before, 0\.9 now"
    ):
        sweep.tune(tiny(nih_shards, tmp_path, LR, *SHORT, *more, "optim.ema_decay=0.9"), "tiny", progress.bar)
    search(recipe)
    trials = rows(tmp_path / "tiny")
    assert [row["status"] for row in trials] == ["finished"] * 3
    for row in trials:
        steps = [line["step"] for line in tracking.read_log(row["run"])]
        assert steps == sorted(steps)
        assert [line["step"] for line in tracking.read_log(row["run"]) if line["kind"] == "val"] == list(
            range(6, 37, 6)
        )
        if row["trial"] in before:
            assert Path(row["run"], "best.pt").stat().st_mtime_ns == before[row["trial"]]
            assert len(run_info.read_run_info(row["run"]).sessions) == 1
    assert all(len(run_info.read_run_info(row["run"]).sessions) == 2 for row in trials if row["trial"] in begun)
    assert len(read_search_info(str(tmp_path / "tiny")).sessions) == 2


@pytest.mark.usefixtures("ray_cluster")
def test_a_grid_goes_on_when_a_trial_fails(siim_shards: str, tmp_path: Path) -> None:
    given = "tune.space={optim.lr: [1e-3, 1e30]}"
    more = ("tune.method=grid", "tune.baseline_seeds=0", "train.epochs=1", "sampler.steps_per_epoch=3")
    result = search(tiny(siim_shards, tmp_path, given, *more, base=TINY_SEGMENTER))
    trials = rows(result.run)
    assert [row["optim.lr"] for row in trials] == [1e-3, 1e30]
    assert [row["status"] for row in trials] == ["finished", "failed"]
    assert "the loss is" in trials[1]["reason"]
    assert "lower optim.lr" in trials[1]["reason"]
    assert math.isnan(trials[1]["dice_positives"])
    # The best mask rule is never worse than no mask at all, which is right for every image without a mask.
    scores = predictions.read_predictions(Path(trials[0]["run"], "predictions-val.parquet"))
    assert scores.maps is not None
    assert trials[0]["dice_at_own_thresholds"] >= float((scores.maps.true_NT.sum(axis=1) == 0).mean())
    assert "tune.baseline_seeds=3 would show" in result.verdict
    # Killed while it wrote its results, of which Ray had not saved that its trials were done.
    forget_the_end(Path(result.run))
    assert search(tiny(siim_shards, tmp_path, given, *more, base=TINY_SEGMENTER)).verdict == result.verdict
    assert str(rows(result.run)) == str(trials)


def forget_the_end(run: Path) -> None:
    """What a kill just after the last trial may leave."""
    state = max((run / tuner.RAY_FOLDER / "search").glob("experiment_state-*.json"))
    content = json.loads(state.read_text())
    for pair in content["trial_data"]:
        reports = json.loads(pair[1])
        reports["last_result"]["done"] = False  # Ray itself leaves this where it saves between the report and the end
        pair[1] = json.dumps(reports)
    state.write_text(json.dumps(content))
    info = read_search_info(str(run))
    write_search_info(str(run), info.model_copy(update={"finished": False, "verdict": ""}))
    (run / results.PARQUET).unlink()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_optuna_learns_from_trials_and_not_from_seeds(nih_shards: str, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    given = 'tune.space={optim.lr: "loguniform(1e-4, 1e-2)", sampler.positive_share: [[0.8, 0.4], [0.5, 0.5]]}'
    more = ("tune.method=tpe", "tune.baseline_seeds=1", "tune.trials=3", "train.epochs=1", "sampler.steps_per_epoch=2")
    trials = rows(search(tiny(nih_shards, tmp_path, given, *more, "sampler.sampling=ratio")).run)
    assert [row["trial"] for row in trials] == ["seed-0", "trial-000", "trial-001", "trial-002"]
    assert trials[0]["optim.lr"] == 1e-3
    assert len({row["optim.lr"] for row in trials[1:]}) == 3
    assert all(json.loads(row["sampler.positive_share"]) in ([0.8, 0.4], [0.5, 0.5]) for row in trials)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_search_can_be_kept_in_a_bucket(nih_shards: str, s3: str) -> None:
    more = (
        "tune.method=grid",
        "tune.baseline_seeds=0",
        "train.epochs=1",
        "sampler.steps_per_epoch=2",
        f"tracking.runs_dir={s3}/searches",
    )
    given = "tune.space={optim.lr: [1e-3, 1e-4]}"
    result = search(tiny(nih_shards, Path("/nowhere"), given, *more))
    assert result.run == f"{s3}/searches/tiny"
    trials = pq.read_table(io.BytesIO(storage.read(storage.join(result.run, results.PARQUET)))).to_pylist()
    assert [row["status"] for row in trials] == ["finished"] * 2
    assert storage.exists(storage.join(result.run, "tune.html"))
    assert load_model(result.run, torch.device("cpu")).recipe.optim.lr in (1e-3, 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_of_several_workers_without_room_ends_at_its_limit(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    cpus = int(ray.cluster_resources()["CPU"])  # type: ignore[no-untyped-call]
    taken = placement_group([{"CPU": 1}] * (cpus - 1))
    ray.get(taken.ready(), timeout=60)
    before = {group.id for group in groups.find_all()}
    more = (
        "tune.workers=2",
        "tune.trials=1",
        "tune.baseline_seeds=0",
        "tune.method=random",
        "scaling.start_seconds=40",
    )
    recipe = tiny(nih_shards, tmp_path, LR, *SHORT, *more, f"scaling.cpus_per_worker={cpus // 2}")
    try:
        with pytest.raises(
            UserError, match=r"no trial has a auroc: scaling\.start_seconds=40: no worker of .*trial-000 "
        ):
            sweep.tune(recipe, "tiny", progress.bar)
    finally:
        remove_placement_group(taken)
    trial = str(tmp_path / "tiny/trials/trial-000")
    assert "waiting for room for 2 x CPU 1 (free: CPU 1 of 2)" in storage.read(f"{trial}/failed.txt").decode()
    (wait,) = tracking.read_waits(trial)
    assert wait["limit"] == "scaling.start_seconds=40"
    # The search's console has it from the trial's process.
    assert "trial-000: waiting 1" in caplog.text
    # Nothing of it waits on for what it has asked for.
    time.sleep(1)
    assert {group.id for group in groups.find_all()} <= before


@pytest.mark.slow
def test_a_search_without_room_says_what_it_waits_for_and_ends_at_its_limit(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, full_cluster: Callable[[], None]
) -> None:
    more = ("tune.method=random", "tune.trials=1", "tune.baseline_seeds=0", "scaling.start_seconds=8")
    recipe = tiny(nih_shards, tmp_path, LR, *more, "train.epochs=1", "sampler.steps_per_epoch=2")
    with pytest.raises(
        WaitLimitError, match=r"^scaling\.start_seconds=8: no trial of .*tiny has run for 8 s, "
    ) as caught:
        sweep.tune(recipe, "tiny", progress.bar)
    assert "waiting for room for 1 x CPU 1 (free: CPU 0 of " in str(caught.value)
    assert re.search(r"waiting [2-7] s for room for 1 x CPU 1 .*; ends at scaling\.start_seconds=8", caplog.text)
    assert not read_search_info(str(tmp_path / "tiny")).finished
    full_cluster()
    patient = recipe.model_copy(update={"scaling": recipe.scaling.model_copy(update={"start_seconds": 600.0})})
    assert [row["status"] for row in rows(search(patient).run)] == ["finished"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_trials_of_several_workers_do_not_wait_for_each_other_forever(nih_shards: str, tmp_path: Path) -> None:
    # Two CPUs hold one trial of two workers: the other two must wait outside, holding nothing.
    more = ("tune.workers=2", "tune.trials=3", "tune.baseline_seeds=0", "train.epochs=1", "sampler.steps_per_epoch=2")
    result = search(tiny(nih_shards, tmp_path, LR, *more))
    assert [row["status"] for row in rows(result.run)] == ["finished"] * 3
    assert {run_info.read_run_info(row["run"]).sessions[0].workers for row in rows(result.run)} == {2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tune.grace_epochs=9"], "tune.grace_epochs=9 is more than train.epochs=3; lower it"),
        (["tune.space={model.arch: [densenet121, densnet]}"], "timm has no such model"),
        (["tune.space={sampler.dataset_weights: [[1], [1, 2]]}"], "sampler.dataset_weights"),
        (["data.shards=[/nowhere]"], "/nowhere/manifest.parquet does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    overrides: list[str], message: str, nih_shards: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        sweep.tune(tiny(nih_shards, tmp_path / "runs", LR, *SHORT, *overrides), "tiny", progress.bar)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_does_not_fit_the_cluster_is_a_one_line_error(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, LR, *SHORT, "tune.workers=800", "sampler.batch_size=800")
    with pytest.raises(UserError, match=r"tune\.workers=800 does not fit the cluster's \d+ CPUs"):
        sweep.tune(recipe, "tiny", progress.bar)


def test_a_search_that_does_not_exist_cannot_be_resumed(nih_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other is not a search; check --resume and tracking\.runs_dir"):
        sweep.resumed(tiny(nih_shards, tmp_path), "other")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "jobs").glob("tune-*.yaml")), ids=lambda p: p.stem)
def test_a_job_states_what_to_expect_and_its_space_fits_its_recipe(path: Path) -> None:
    recipe = config.load_recipe(path)
    search_space.check_space(search_space.parse_space(recipe.tune.space), recipe)
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    for word in ("Hardware:", "Time:", "Score to expect:", "Source", f"cxrscale tune jobs/{path.name}"):
        assert word in header
    # The unit or meaning of every field stands beside it.
    lines = path.read_text().splitlines()
    for name in recipe.tune.space:
        assert any(name in line and "#" in line for line in lines), name

"""Prediction by the workers of a real Ray cluster: the rows of one process, whoever is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cxrscale.inference import (
    ClusterPredictor,
    Explainer,
    Prediction,
    PredictorSpec,
    explain_files,
    find_inputs,
    journal,
    on_cluster,
    predict_files,
)
from cxrscale.run import Run
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.inference.test_ensemble import changed_copy
from tests.small_exports import write_export


@pytest.fixture(scope="module")
def paths(drawn: SyntheticPaths, nih_shards: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 images, five of them of a dataset, one that is none, and one that is not there."""
    broken = tmp_path_factory.mktemp("broken") / "broken.png"
    broken.write_bytes(b"no image")
    images = [*sorted(map(str, drawn.nih.rglob("*.png")))[:25], *find_inputs([nih_shards]).paths[:5]]
    return [*images[:5], str(broken), *images[5:], "not/there.png"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one batch of 8."""
    monkeypatch.setattr(journal, "ROWS", 4)


def test_workers_give_the_rows_of_one_process_also_when_they_and_the_driver_are_stopped(
    classifier_run: str, paths: list[str], tmp_path: Path, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del ray_cluster
    monkeypatch.chdir(Path(classifier_run).parent)
    spec = PredictorSpec((Path(classifier_run).name,))
    here = predict_files(spec.load("cpu"), paths, str(tmp_path / "here"), "csv")
    cluster, seen, killed = ClusterPredictor(spec, 2), 0, 0

    def stop(_prediction: Prediction) -> None:
        nonlocal seen, killed
        seen += 1
        if seen == 1:
            killed = kill_a_worker()
        if seen == 10:
            raise KeyboardInterrupt

    out = str(tmp_path / "there")
    with pytest.raises(KeyboardInterrupt):
        predict_files(cluster, paths, out, "csv", stop)
    assert killed == 1
    there = predict_files(cluster, paths, out, "csv")
    assert there.resumed >= 10
    assert (there.read, there.not_read) == (here.read, here.not_read) == (30, 2)
    assert Path(there.address).read_bytes() == Path(here.address).read_bytes()


def kill_a_worker() -> int:
    """Kill one of the actors that predict; returns how many were."""
    for process in psutil.Process().children(recursive=True):
        if is_actor(process):
            process.kill()
            return 1
    return 0


SCRIPT = (
    "import sys; from cxrscale.inference import journal; journal.ROWS = 4\n"
    "from cxrscale.cli import app; sys.argv[0] = 'cxrscale'; app.main()"
)


def command(run: str, out: Path, *words: str) -> list[str]:
    """A command with parts of one batch."""
    return [sys.executable, "-W", "ignore", "-c", SCRIPT, "predict", *words, "--run", run, "--out", str(out)]


@pytest.fixture(scope="module")
def large(nih_shards: str, paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files, one of which is none and one of which is not there, and a dataset: some 110 images."""
    listed = tmp_path_factory.mktemp("list") / "list.txt"
    listed.write_text("\n".join([*paths, nih_shards]))
    return [f"@{listed}"]


def test_workers_run_an_export(classifier_run: str, paths: list[str], tmp_path: Path, ray_cluster: Any) -> None:
    del ray_cluster
    spec = PredictorSpec((write_export(classifier_run, tmp_path / "exported"),))
    here, there = (
        predict_files(one, paths[:12], str(tmp_path / name), "csv")
        for name, one in (("here", spec.load("cpu")), ("there", ClusterPredictor(spec, 2)))
    )
    assert Path(there.address).read_bytes() == Path(here.address).read_bytes()
    assert there.read == 11


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_command_goes_on_after_its_process_is_killed(
    classifier_run: str, large: list[str], tmp_path: Path, ray_cluster: Any
) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": ray_cluster.address, "RAY_AUTH_MODE": "disabled"}
    words, out = [*large, "--format", "csv"], tmp_path / "there"
    there = command(classifier_run, out, *words, "--workers", "2")
    with subprocess.Popen(there, env=environment, stdout=subprocess.DEVNULL) as process:
        while len(list((out / "parts").glob("*.parquet"))) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    kept = len(list((out / "parts").glob("*.parquet")))
    here = command(classifier_run, tmp_path / "here", *words)
    ended = [subprocess.run(one, env=environment, capture_output=True, text=True, timeout=500) for one in (here, there)]
    assert [one.returncode for one in ended] == [3, 3], ended
    (told,) = re.findall(r"(\d+) of \d+ were predicted before", ended[1].stdout)
    assert int(told) >= 8 * (kept - 1)
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "here" / "predictions.csv").read_bytes()
    assert not (out / "parts").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_machine_that_is_lost_costs_no_row(
    classifier_run: str, large: list[str], tmp_path: Path, ray_cluster: Any
) -> None:
    spec, paths = PredictorSpec((classifier_run,)), find_inputs(large).paths
    here = predict_files(spec.load("cpu"), paths, str(tmp_path / "here"), "csv")
    second, seen = ray_cluster.add_node(num_cpus=2), 0
    ray_cluster.wait_for_nodes()

    def lose(_prediction: Prediction) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            workers = [process for process in psutil.Process().children(recursive=True) if is_actor(process)]
            assert len(workers) == 4
            ray_cluster.remove_node(second, allow_graceful=False)

    there = predict_files(ClusterPredictor(spec, 4), paths, str(tmp_path / "there"), "csv", lose)
    assert seen == len(paths)
    assert Path(there.address).read_bytes() == Path(here.address).read_bytes()


def is_actor(process: psutil.Process) -> bool:
    try:
        return "ray::_Actor" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_rows_stand_in_the_order_of_the_inputs_whoever_was_first(
    classifier_run: str, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = PredictorSpec((classifier_run,)).load("cpu")

    def backwards(self: Any, inputs: Sequence[str]) -> Iterator[Sequence[Prediction]]:
        pieces = [inputs[start : start + 8] for start in range(0, len(inputs), 8)]
        yield from (self.predict(piece) for piece in reversed(pieces))

    whole = predict_files(predictor, paths, str(tmp_path / "whole"), "json")
    monkeypatch.setattr(type(predictor), "groups", backwards)
    result = predict_files(predictor, paths, str(tmp_path / "out"), "json")
    assert Path(result.address).read_bytes() == Path(whole.address).read_bytes()


def test_workers_write_the_maps_of_one_process(
    classifier_run: str, paths: list[str], tmp_path: Path, ray_cluster: Any
) -> None:
    del ray_cluster
    here, there = tmp_path / "here", tmp_path / "there"
    explainer = Explainer(classifier_run, "cpu", ["Mass"])
    alone = explain_files(explainer, paths[:12], str(here))
    cluster = ClusterPredictor(PredictorSpec((classifier_run,), explained=("Mass",)), 2)
    shared = explain_files(explainer, paths[:12], str(there), predictor=cluster)
    assert (shared.read, shared.not_read, shared.without_object) == (alone.read, alone.not_read, 0) == (11, 1, 0)
    written = {path.name: path.read_bytes() for path in (here / "objects").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (there / "objects").iterdir()}
    assert len(written) == 22


def test_a_gate_is_loaded_in_workers_too(segmenter_run: str, classifier_run: str) -> None:
    spec = PredictorSpec((segmenter_run,), gate=classifier_run)
    assert asdict(spec)["gate"] == classifier_run
    with pytest.raises(UserError, match="does not know Pneumothorax"):
        spec.load("cpu")
    with pytest.raises(UserError, match="--gate takes one --run"):
        PredictorSpec((segmenter_run, segmenter_run), gate=classifier_run).load("cpu")


def test_a_worker_that_finds_another_run_is_one_line(classifier_run: str, tmp_path: Path) -> None:
    run = changed_copy(classifier_run, tmp_path / "run", 1.0)
    spec = PredictorSpec((run,))
    settings = journal.settings_of(spec.load("cpu").provenance)
    Run(run).choose_thresholds(resamples=20)
    with pytest.raises(UserError, match=r"a worker finds other weights or thresholds in .*run than are here"):
        on_cluster._worker(spec, settings)

"""Prediction by the workers of a real Ray cluster: the rows of one process, whoever is killed."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cxrscale.inference import ClusterPredictor, Prediction, PredictorSpec, journal, predict_files
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError


@pytest.fixture(scope="module")
def paths(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """30 images, one that is none, and one that is not there."""
    broken = tmp_path_factory.mktemp("broken") / "broken.png"
    broken.write_bytes(b"no image")
    images = sorted(map(str, drawn.nih.rglob("*.png")))[:30]
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
        if "ray::_Actor" in " ".join(process.cmdline()):
            process.kill()
            return 1
    return 0


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


def test_a_gate_is_loaded_in_workers_too(segmenter_run: str, classifier_run: str) -> None:
    spec = PredictorSpec((segmenter_run,), gate=classifier_run)
    assert asdict(spec)["gate"] == classifier_run
    with pytest.raises(UserError, match="does not know Pneumothorax"):
        spec.load("cpu")

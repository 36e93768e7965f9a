"""Two real Ray Train workers do what one process does; mistakes are found before or on the workers."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cxrscale.cli.progress import watch_run
from cxrscale.config import Pack
from cxrscale.shards import build
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import launch, run_info, tracking
from cxrscale.types import NonFiniteError, UserError, WaitLimitError
from tests.conftest import TWO_WORKERS, tiny


@pytest.mark.smoke
def test_two_ray_workers_train_and_validate_every_image_once(
    two_worker_run: str, nih_shards: str, tmp_path: Path
) -> None:
    more = (*TWO_WORKERS, "tracking.wandb=offline", "scaling.num_workers=1")
    run, alone = (
        Path(two_worker_run),
        Path(launch.launch(tiny(nih_shards, tmp_path, *more), "tiny", watch_run, local=True)),
    )
    for folder in (run, alone):
        assert (folder / "best.pt").is_file()
        assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    two, one = (
        [line for line in map(json.loads, (folder / "train_log.jsonl").read_text().splitlines()) if "loss" in line]
        for folder in (run, alone)
    )
    # The same images in the same steps and the same start: the first loss differs only by batch normalization,
    # which sees half the batch on each worker.
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.1)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    assert all(0 <= line["auroc"] <= 1 for line in two if line["kind"] == "val")


@pytest.mark.usefixtures("ray_cluster")
def test_more_workers_than_the_cluster_has_is_a_one_line_error(nih_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scaling.num_workers=8\d* does not fit the cluster's \d+ CPUs"):
        launch.launch(
            tiny(nih_shards, tmp_path, "scaling.num_workers=800", "sampler.batch_size=800"), "tiny", watch_run
        )


@pytest.mark.usefixtures("ray_cluster")
def test_a_mistake_that_only_workers_find_is_a_one_line_error_too(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, "optim.lr=1e30", "train.epochs=1", "sampler.steps_per_epoch=6")
    with pytest.raises(NonFiniteError, match=r"^the loss is (nan|inf) at step \d: lower optim\.lr or set"):
        launch.launch(recipe, "tiny", watch_run)
    info = run_info.read_run_info(str(tmp_path / "tiny"))
    assert (info.finished, info.diverged, len(info.sessions)) == (False, True, 1)


def test_a_run_without_room_says_what_it_waits_for_and_ends_at_its_limit(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, full_cluster: Callable[[], None]
) -> None:
    with pytest.raises(
        WaitLimitError, match=r"^scaling\.start_seconds=15: no worker of .*tiny has trained for [1-4]\d s"
    ) as caught:
        launch.launch(tiny(nih_shards, tmp_path, "scaling.start_seconds=15"), "tiny", watch_run)
    full_cluster()
    assert caught.value.exit_code == 6
    assert "waiting for room for 1 x CPU 1 (free: CPU 0 of " in str(caught.value)
    assert "waiting 2 s for" in caplog.text
    assert "ends at scaling.start_seconds=15" in caplog.text
    (wait,) = tracking.read_waits(str(tmp_path / "tiny"))
    assert wait["what"].endswith("room for 1 x CPU 1")
    assert (wait["step"], wait["limit"]) == (0, "scaling.start_seconds=15")
    assert 15 <= wait["seconds"] < 50
    info = run_info.read_run_info(str(tmp_path / "tiny"))
    assert (info.ending, info.error) == ("failed", str(caught.value))


@pytest.mark.usefixtures("full_cluster")
def test_a_signal_ends_a_run_that_has_no_worker_at_once(
    nih_shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop() -> None:
        while "for room for 1 x CPU 1" not in caplog.text:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    run = launch.launch(tiny(nih_shards, tmp_path), "tiny", watch_run)
    assert "no worker trains: the run ends with its last checkpoint" in caplog.text
    info = run_info.read_run_info(run)
    assert (info.ending, info.finished, info.error) == ("stopped", False, None)


def test_datasets_that_share_images_across_splits_are_refused(
    drawn: SyntheticPaths, nih_shards: str, tmp_path: Path
) -> None:
    # Without its NIH duplicates, SIIM's patients are unknown and its random split separates images of NIH's patients.
    siim = str(tmp_path / "siim")
    build.build_shards("siim", str(drawn.siim), Pack(size=64), siim, local=True)
    both = f"{nih_shards}, {siim}"
    more = ("data.findings=[Pneumothorax]", "train.epochs=1", "sampler.steps_per_epoch=1")
    with pytest.raises(UserError, match=r"\d+ patients are in more than one of train, val and test"):
        launch.launch(tiny(both, tmp_path, *more), "tiny", watch_run, local=True)
    allowed = tiny(both, tmp_path, *more, "data.allow_leaks=true")
    assert Path(launch.launch(allowed, "tiny", watch_run, local=True)).is_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.findings=[Fracture]", "no label 'Fracture'; they have Atelectasis"),
        ("augment.size=128", "augment.size=128"),
        ("data.train_split=trian", "split 'trian' has no images; the manifest has test"),
        ("model.arch=densnet121", "timm has no such model; it has"),
        ("model.options={growth: 3}", "growth"),
        ("model.weights=/nowhere/best.pt", "no such file"),
        ("data.shards=[/nowhere]", "/nowhere/manifest.parquet does not exist"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    override: str, message: str, nih_shards: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        launch.launch(tiny(nih_shards, tmp_path / "runs", override), "tiny", watch_run, local=True)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()

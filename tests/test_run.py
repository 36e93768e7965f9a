"""A trained run's thresholds and metrics as files: what chooses never sees test, mistakes are one line. Some 30 s."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxrscale.cli.progress import watch_run
from cxrscale.evaluation import calibration, metrics
from cxrscale.evaluation import thresholds as cuts
from cxrscale.inference import predictions
from cxrscale.inference.predictor import load_model
from cxrscale.io import storage
from cxrscale.loader.loader import evaluation_batches
from cxrscale.models.networks import build_model
from cxrscale.reporting import run_report
from cxrscale.run import choose_run_thresholds, evaluate_run
from cxrscale.shards import manifest
from cxrscale.training import checkpoint, launch, scoring
from cxrscale.training.distributed import LocalWorker
from cxrscale.types import UserError
from tests.conftest import TINY_CLASSIFIER, TINY_SEGMENTER, tiny

PATHS = {"checkpoint", "manifest", "recipe"}
"""What names the shards and with them the weights' file, in all that a run writes."""


@pytest.fixture
def run(classifier_run: str, tmp_path: Path) -> str:
    """A copy of the trained classifier to change at will."""
    return shutil.copytree(classifier_run, tmp_path / "run").as_posix()


def read(run: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(run) / name).read_text())
    return found


def test_thresholds_are_chosen_on_validation_alone(run: str) -> None:
    told: list[int] = []
    path = choose_run_thresholds(run, ["threshold.goal=recall", "threshold.min_rate=0.8"], 20, told.append)
    found = json.loads(Path(path).read_text())
    assert not Path(predictions.predictions_path(run, "test")).exists()
    scores = predictions.read_predictions(predictions.predictions_path(run, "val"))
    assert sum(told) == found["images"] == len(scores.image_id)
    assert found["rule"]["at_least"] == 0.8
    assert found["rule"]["report_at"] == [0.25]  # of the recipe
    there = [f for f in range(4) if (scores.label_NF[:, f] == 1).any()]
    assert len(there) >= 2
    for f in there:
        cut = found["thresholds"][scores.findings[f]]
        called = (scores.score_NF[:, f] >= cut["value"])[scores.label_NF[:, f] == 1]
        assert cut["at"]["recall"]["value"] == pytest.approx(called.mean())
        assert called.mean() >= 0.8
    assert found["thresholds"]["Hernia"]["reason"] == "no image with the finding in validation"
    assert (Path(run) / "plots" / "thresholds.png").stat().st_size > 5_000


def test_metrics_hold_what_the_predictions_say(run: str, nih_shards: str) -> None:
    choose_run_thresholds(run, [], 20)
    found = json.loads(Path(evaluate_run(run, 20)).read_text())
    data = manifest.load(nih_shards)
    test = data.split == "test"
    assert found["images"] == test.sum() == found["data"]["parts"]["test"]["images"]
    assert found["data"]["parts"]["train"]["patients"] == len(set(data.patient[data.split == "train"]))
    assert found["data"]["leaks"]["patients_in_two_splits"] == 0
    assert found["data"]["sets"][0]["pack"]["split"] == "official"
    row = found["findings"]["Effusion"]
    assert row["positives"] == (data.labels(["Effusion"])[test] == 1).sum()
    assert row["report_at"][0]["threshold"] == 0.25
    women = row["subgroups"]["sex"]["F"]
    assert women["images"] == (data.column("sex")[test] == "F").sum()
    assert sum(each["images"] for each in row["subgroups"]["age"].values()) == test.sum()
    assert found["findings"]["Hernia"]["auroc"]["reason"] == "no image with the finding"
    assert found["findings_in_mean"] == 3
    assert evaluate_run(run, 20)  # from the kept scores
    assert read(run, "metrics.json") == found


# What chooses never sees the test split


def planted(shards: str, out: Path) -> str:
    """The same shards with another test split: every label turned round, every mask another image's."""
    shutil.copytree(shards, out)
    path = out / manifest.NAME
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"cxrscale"])
    test = np.array(table["split"].to_pylist()) == "test"
    masks = [name for name in table.column_names if name.startswith("mask_")]
    for place, name in enumerate(table.column_names):
        values = np.array(table[name].to_pylist(), dtype=object)
        if name.startswith(manifest.LABEL):
            values[test] = [None if value is None else 1 - value for value in values[test]]
        elif name in masks:
            values[test] = np.roll(values[test], 1)
        else:
            continue
        table = table.set_column(place, name, pa.array(values.tolist(), table.schema.field(name).type))
    manifest.write(str(path), table, about)
    return str(out)


def chosen(shards: str, root: Path, base: tuple[str, ...]) -> str:
    """A run over the shards with all that is chosen in it, then evaluated."""
    rates = ("optim.schedule=plateau", "optim.lr=3e-3")
    recipe = tiny(shards, root, "train.epochs=3", "train.keep_checkpoints=3", *rates, base=base)
    run = launch.launch(recipe, "tiny", watch_run, local=True)
    choose_run_thresholds(run, ["threshold.calibration=platt"], 20)
    evaluate_run(run, 20)
    return run


def on_test(run: str, name: str) -> float:
    """What the weights of a checkpoint would reach on the test split."""
    state = checkpoint.read(storage.read(storage.join(run, checkpoint.FOLDER, name)), name)
    trained = load_model(run, torch.device("cpu"))
    recipe = trained.recipe
    net = build_model(recipe.model, recipe.data)
    net.load_state_dict(state["model"])
    data = manifest.load(*recipe.data.shards)
    batches = evaluation_batches(data, ("test",), recipe.data, recipe.sampler, recipe.augment)
    rows = scoring.score(net, batches, recipe.train, LocalWorker())
    return metrics.macro_auroc(rows.score_NF, data.labels(recipe.data.findings)[rows.row_N])


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_another_test_split_changes_nothing_that_is_chosen(
    task: str, nih_shards: str, siim_shards: str, tmp_path: Path
) -> None:
    """Checkpoints, best weights, thresholds, calibrators: the same to the bit, though choosing on test would differ."""
    shards, base = (nih_shards, TINY_CLASSIFIER) if task == "classify" else (siim_shards, TINY_SEGMENTER)
    other_shards = planted(shards, tmp_path / "planted")
    one, other = chosen(shards, tmp_path / "one", base), chosen(other_shards, tmp_path / "other", base)

    def lines(run: str) -> list[dict[str, Any]]:
        kept = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("time", "images_per_second", "data_wait")} for line in kept]

    assert lines(one) == lines(other)
    names = [sorted(path.name for path in (Path(run) / checkpoint.FOLDER).iterdir()) for run in (one, other)]
    assert len(names[0]) == 3
    pairs = [*zip(*([f"{checkpoint.FOLDER}/{n}" for n in each] for each in names), strict=True), ("best.pt", "best.pt")]
    for mine, theirs in pairs:
        states = [checkpoint.read((Path(r) / n).read_bytes(), n) for r, n in ((one, mine), (other, theirs))]
        assert same(*({k: v for k, v in state.items() if k not in PATHS} for state in states))
    left, right = ({k: v for k, v in read(run, "thresholds.json").items() if k not in PATHS} for run in (one, other))
    assert left == right

    # The plant would have changed every one of them.
    a, b = (predictions.read_predictions(predictions.predictions_path(run, "test")) for run in (one, other))
    np.testing.assert_array_equal(a.score_NF, b.score_NF)
    for f in range(len(a.findings)):
        pair = [(scores.score_NF[:, f], scores.label_NF[:, f]) for scores in (a, b)]
        assert cuts.best_f1_threshold(*pair[0]).value != cuts.best_f1_threshold(*pair[1]).value
        assert calibration.fit("platt", *pair[0]) != calibration.fit("platt", *pair[1])
    if a.maps is not None and b.maps is not None:
        assert cuts.best_mask_rule(a.maps) != cuts.best_mask_rule(b.maps)
    else:
        ranked = [
            np.argsort([on_test(run, name) for name in each]) for run, each in zip((one, other), names, strict=True)
        ]
        assert ranked[0][-1] != ranked[1][-1]
    assert read(one, "metrics.json")["findings"] != read(other, "metrics.json")["findings"]


def same(a: Any, b: Any) -> bool:
    """Whether two states of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


# Mistakes


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("optim.lr=1", ["optim.lr=1", "threshold.* alone"]),
        ("threshold.gaol=f1", ["threshold.gaol", "threshold.goal"]),
        ("threshold.min_rate=2", ["threshold.min_rate=2"]),
        ("threshold.priors={Mess: 0.1}", ["Mess", "Cardiomegaly, Effusion, Mass"]),
        ("threshold.prior_shift=known", ["threshold.priors={FINDING: 0.1}"]),
    ],
)
def test_an_override_that_cannot_be_names_itself(override: str, fragments: list[str], run: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_run_thresholds(run, [override], 20)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_scores_that_no_metric_can_be_made_of(run: str) -> None:
    """One patient, a NaN score, a file of something else: one line that names the file."""
    choose_run_thresholds(run, [], 20)
    evaluate_run(run, 20)
    path = predictions.predictions_path(run, "test")
    scores, about = predictions.read_predictions(path), predictions.read_metadata(path)
    bad = scores.score_NF.copy()
    bad[3, 1] = np.nan
    predictions.write_predictions(path, replace(scores, score_NF=bad), about)
    with pytest.raises(UserError, match=rf"{path}: the score of Effusion of image {scores.image_id[3]} is nan"):
        evaluate_run(run, 20)
    alone = np.array(["one"] * len(scores.patient), dtype=object)
    predictions.write_predictions(path, replace(scores, patient=alone), about)
    with pytest.raises(UserError, match=rf"{path}: all {len(alone)} images are of one patient"):
        evaluate_run(run, 20)
    Path(path).write_text("no table")
    with pytest.raises(UserError, match=rf"{path} is no Parquet file; remove it"):
        evaluate_run(run, 20)
    pq.write_table(pa.table({"image_id": ["a"]}), path)
    with pytest.raises(UserError, match=rf"{path} does not say whose scores"):
        evaluate_run(run, 20)


def over(run: str, shards: str) -> None:
    """Let a run believe that it was trained on shards that lie elsewhere."""
    path = Path(run) / checkpoint.BEST
    state = checkpoint.read(path.read_bytes(), "best.pt")
    state["recipe"]["data"]["shards"] = [shards]
    path.write_bytes(checkpoint.dump(state))


def test_shards_that_changed_are_refused_even_where_scores_are_kept(run: str, nih_shards: str, tmp_path: Path) -> None:
    copy = shutil.copytree(nih_shards, tmp_path / "copy")
    over(run, str(copy))
    choose_run_thresholds(run, [], 20)
    evaluate_run(run, 20)
    shutil.rmtree(copy)
    planted(nih_shards, copy)
    for verb in (choose_run_thresholds, evaluate_run):
        with pytest.raises(UserError, match=f"{copy}: not the shards that {run} was trained on"):
            verb(run)
    shutil.rmtree(copy)
    choose_run_thresholds(run, [], 20)  # thresholds need no more than the kept scores
    with pytest.raises(UserError, match=r"manifest\.parquet does not exist"):
        evaluate_run(run, 20)


def test_what_does_not_belong_together_is_refused(run: str) -> None:
    with pytest.raises(UserError, match=r"thresholds\.json does not exist"):
        evaluate_run(run, 20)
    choose_run_thresholds(run, [], 20)
    with pytest.raises(UserError, match=r"metrics\.json does not exist"):
        run_report.write(run)
    evaluate_run(run, 20)
    choose_run_thresholds(run, ["threshold.goal=youden"], 20)
    with pytest.raises(UserError, match=r"other thresholds than thresholds\.json"):
        run_report.write(run)
    old = read(run, "thresholds.json")
    del old["rule"]
    (Path(run) / "thresholds.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="of an earlier version"):
        evaluate_run(run, 20)
    over(run, "elsewhere")
    with pytest.raises(UserError, match=r"other weights than best\.pt"):
        evaluate_run(run, 20)


def test_a_run_in_a_bucket(run: str, s3: str) -> None:
    address = storage.join(s3, "runs", "evaluated")
    for name in ("best.pt", "recipe.yaml", "run.json", "metrics.jsonl"):
        storage.write(storage.join(address, name), (Path(run) / name).read_bytes())
    assert choose_run_thresholds(address, [], 20) == f"{address}/thresholds.json"
    assert evaluate_run(address, 20) == f"{address}/metrics.json"
    page = run_report.write(address)
    assert page == f"{address}/report.html"
    assert b"</html>" in storage.read(page)
    assert "roc.png" in storage.listing(storage.join(address, "plots"))

"""A trained run: its files, that nothing is chosen on the test split, and mistakes in one line. Some 30 s."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxrscale.config import Pack
from cxrscale.evaluation import calibration, metrics
from cxrscale.evaluation import thresholds as searches
from cxrscale.inference import predictions
from cxrscale.io import storage
from cxrscale.loader.loader import evaluation_batches
from cxrscale.models.networks import build_model
from cxrscale.reporting import tables
from cxrscale.run import Run, open_run, train
from cxrscale.shards import build, leakage, manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.training import checkpoint, scoring, tracking
from cxrscale.training.distributed import LocalWorker
from cxrscale.types import UserError
from tests.conftest import tiny
from tests.small_datasets import rewrite_manifest
from tests.tiny import TINY_CLASSIFIER, TINY_SEGMENTER

PATHS = {"run", "checkpoint", "manifest", "recipe", "seal"}
"""Fields of a run's files that depend on the paths of the run and its datasets."""


@pytest.fixture
def run(classifier_run: str, tmp_path: Path) -> Run:
    """A copy of the trained classifier to change at will."""
    return open_run(shutil.copytree(classifier_run, tmp_path / "run"))


def read(run: Run, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(run.artifact(name)).read_text())
    return content


def test_a_run_is_opened_by_its_folder(classifier_run: str, tmp_path: Path) -> None:
    run = open_run(classifier_run)
    assert run.recipe.data.findings == ("Cardiomegaly", "Effusion", "Mass", "Hernia")
    assert run.name == Path(classifier_run).name
    assert Path(run.artifact("best.pt")).exists()
    with pytest.raises(UserError, match=r"recipe\.yaml does not exist; give the folder that `cxrscale train` printed"):
        open_run(tmp_path)


def test_a_recipe_is_trained_from_python(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path, "train.epochs=1", "sampler.steps_per_epoch=2")
    run = train(recipe, name="from-python", local=True)
    assert run.path == str(tmp_path / "from-python")
    assert run.predictions("val").findings == run.recipe.data.findings
    with pytest.raises(UserError, match="run from-python is finished"):
        train(recipe, name="from-python", local=True)


def test_thresholds_are_chosen_on_validation_alone(run: Run) -> None:
    scored: list[int] = []
    chosen = run.choose_thresholds(["threshold.goal=recall", "threshold.min_rate=0.8"], 20, scored.append)
    assert run.thresholds().model_dump_json() == chosen.model_dump_json()
    assert not Path(run.artifact("predictions-test.parquet")).exists()
    scores = run.predictions("val")
    assert sum(scored) == chosen.images == len(scores.image_id)
    assert (chosen.split, chosen.run, chosen.recipe) == ("val", run.path, run.recipe)
    assert chosen.rule.min_rate == 0.8
    assert chosen.rule.report_at == (0.25,)  # of the recipe
    with_positives = [f for f in range(4) if (scores.label_NF[:, f] == 1).any()]
    assert len(with_positives) >= 2
    for f in with_positives:
        row = chosen.thresholds[scores.findings[f]]
        called = (scores.probability_NF[:, f] >= row.threshold.value)[scores.label_NF[:, f] == 1]
        assert row.on_validation is not None
        assert row.on_validation.recall.value == pytest.approx(called.mean())
        assert called.mean() >= 0.8
    assert chosen.thresholds["Hernia"].threshold.reason == "no image with the finding in validation"
    assert Path(run.artifact("plots", "thresholds.png")).stat().st_size > 5_000


def test_a_finding_that_cannot_be_calibrated_says_why(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = run.choose_thresholds(["threshold.calibration=temperature"], 20)
    tables.print_thresholds(chosen, "run")
    line = "Hernia is not calibrated: no image with the finding in validation"
    assert line in capsys.readouterr().out.splitlines()
    assert isinstance(chosen.calibration["Hernia"].calibrator, calibration.Unchanged)


def test_metrics_agree_with_the_predictions(run: Run, nih_shards: str) -> None:
    run.choose_thresholds(resamples=20)
    result = run.evaluate(20)
    data = manifest.load(nih_shards)
    test = data.split == "test"
    assert result.images == test.sum() == result.data.parts["test"].images
    assert result.data.parts["train"].patients == len(set(data.patient[data.split == "train"]))
    assert result.data.leaks.patients_in_two_splits == 0
    assert result.data.datasets[0].pack["split"] == "official"
    row = result.findings["Effusion"]
    assert row.positives == (data.labels(["Effusion"])[test] == 1).sum()
    assert row.report_at[0].threshold == 0.25
    women = row.subgroups["sex"]["F"]
    assert women.images == (data.column("sex")[test] == "F").sum()
    assert sum(group.images for group in row.subgroups["age"].values()) == test.sum()
    assert result.findings["Hernia"].auroc.reason == "no image with the finding"
    assert result.findings_in_mean == 3
    written = Path(run.artifact("test_metrics.json")).read_text()
    run.evaluate(20)  # from the stored scores
    assert Path(run.artifact("test_metrics.json")).read_text() == written
    assert run.test_metrics().model_dump_json() == result.model_dump_json()


def test_intervals_resample_persons_where_the_audit_knows_them(
    nih_shards: str, drawn: SyntheticPaths, tmp_path: Path
) -> None:
    """SIIM's images are NIH's under other patients: an image that is in both sets makes two patients one."""
    strangers = str(tmp_path / "siim")
    build.build_shards("siim", str(drawn.siim), Pack(size=64, samples_per_shard=20), strangers, local=True)
    given = (f"data.shards=[{nih_shards}, {strangers}]", "data.findings=[Pneumothorax]", "data.allow_leaks=true")
    steps = ("train.epochs=1", "sampler.steps_per_epoch=2", "train.monitor=loss")
    run = train(tiny(nih_shards, tmp_path / "runs", *given, *steps), local=True)
    joined = leakage.join_datasets(nih_shards, strangers)
    persons = dict(zip(joined.data.image_id.tolist(), leakage.persons(joined).tolist(), strict=True))
    scores, ids = run.predictions("test"), dict(zip(joined.data.image_id, joined.data.patient, strict=True))
    assert scores.patient.tolist() == [persons[name] for name in scores.image_id.tolist()]
    known = {ids[name] for name in scores.image_id.tolist()}
    assert len(set(scores.patient.tolist())) < len(known)
    chosen = run.choose_thresholds(resamples=20)
    assert chosen.patients == len(set(run.predictions("val").patient.tolist()))
    result = run.evaluate(20)
    assert result.patients == result.data.parts["test"].patients == len(set(scores.patient.tolist()))
    # Within one namespace the ids stay as they are.
    alone = leakage.join_datasets(nih_shards)
    assert leakage.persons(alone).tolist() == alone.data.patient.tolist()


def test_scores_of_an_earlier_version_are_read_with_a_line(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """They are float32 probabilities; nothing but their ties near 0 and 1 tells them from logits."""
    run.choose_thresholds(resamples=20)
    new = run.evaluate(20)
    path = Path(run.artifact("predictions-test.parquet"))
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[predictions.INFO])
    columns = {}
    for name in table.column_names:
        values = table[name].to_numpy(zero_copy_only=False)
        if name.startswith("logit."):
            columns[name.replace("logit.", "score.")] = torch.from_numpy(values.copy()).sigmoid().numpy()
        else:
            columns[name] = values
    older = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    content = {predictions.INFO: json.dumps({**metadata, "schema_version": 1}).encode()}
    pq.write_table(older.replace_schema_metadata(content), path)
    scores = run.predictions("test")
    assert "holds float32 probabilities, as earlier versions wrote them" in caplog.text
    assert caplog.text.count("\n") == 1
    expected = predictions.read_predictions(path)
    np.testing.assert_array_equal(scores.logit_NF, expected.logit_NF)
    stored = columns["score.Effusion"].astype(np.float64)
    np.testing.assert_allclose(scores.probability_NF[:, 1], stored, rtol=1e-12)
    again = run.evaluate(20)
    assert again.mean_auroc == new.mean_auroc
    assert again.findings["Effusion"].at_threshold == new.findings["Effusion"].at_threshold
    assert caplog.text.count("\n") == 1


# Nothing is chosen on the test split


def with_other_test_split(shards: str, out: Path) -> str:
    """The same shards with another test split: every label inverted, every mask another image's."""
    shutil.copytree(shards, out)
    path = out / manifest.NAME
    table = pq.read_table(path)
    metadata = json.loads(table.schema.metadata[b"cxrscale"])
    test = np.array(table["split"].to_pylist()) == "test"
    masks = [name for name in table.column_names if name.startswith("mask_")]
    for column, name in enumerate(table.column_names):
        values = np.array(table[name].to_pylist(), dtype=object)
        if name.startswith(manifest.LABEL):
            values[test] = [None if value is None else 1 - value for value in values[test]]
        elif name in masks:
            values[test] = np.roll(values[test], 1)
        else:
            continue
        table = table.set_column(column, name, pa.array(values.tolist(), table.schema.field(name).type))
    rewrite_manifest(out, table, metadata)
    return str(out)


def train_and_evaluate(shards: str, root: Path, base: tuple[str, ...]) -> Run:
    """A run with everything that is chosen in it, then evaluated."""
    optim = ("optim.schedule=plateau", "optim.lr=3e-3")
    run = train(tiny(shards, root, "train.epochs=3", "train.keep_checkpoints=3", *optim, base=base), local=True)
    run.choose_thresholds(["threshold.calibration=platt"], 20)
    run.evaluate(20)
    return run


def auroc_on_test(run: Run, name: str) -> float:
    """The mean AUROC of a checkpoint's weights on the test split."""
    state = checkpoint.read(storage.read(run.artifact(checkpoint.FOLDER, name)), name)
    recipe = run.recipe
    model = build_model(recipe.model, recipe.data)
    model.load_state_dict(state["model"])
    data = manifest.load(*recipe.data.shards)
    batches = evaluation_batches(data, ("test",), recipe)
    rows = scoring.score(model, batches, recipe, LocalWorker().dist)
    return metrics.macro_auroc(rows.logit_NF, data.labels(recipe.data.findings)[rows.row_N])


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_another_test_split_changes_nothing_that_is_chosen(
    task: str, nih_shards: str, siim_shards: str, tmp_path: Path
) -> None:
    """Checkpoints, best weights, thresholds, calibrators: equal to the bit, though a choice on test would differ."""
    shards, base = (nih_shards, TINY_CLASSIFIER) if task == "classify" else (siim_shards, TINY_SEGMENTER)
    other_shards = with_other_test_split(shards, tmp_path / "changed")
    one = train_and_evaluate(shards, tmp_path / "one", base)
    other = train_and_evaluate(other_shards, tmp_path / "other", base)

    def lines(run: Run) -> list[dict[str, Any]]:
        times = ("time", "images_per_second", "data_wait")
        return [{k: v for k, v in line.items() if k not in times} for line in tracking.read_log(run.path)]

    assert lines(one) == lines(other)
    names = [storage.listing(run.artifact(checkpoint.FOLDER)) for run in (one, other)]
    assert len(names[0]) == 3
    pairs = [*zip(*([f"{checkpoint.FOLDER}/{n}" for n in each] for each in names), strict=True), ("best.pt", "best.pt")]
    for mine, theirs in pairs:
        states = [checkpoint.read(storage.read(r.artifact(n)), n) for r, n in ((one, mine), (other, theirs))]
        assert same(*({k: v for k, v in state.items() if k not in PATHS} for state in states))
    left, right = ({k: v for k, v in read(run, "thresholds.json").items() if k not in PATHS} for run in (one, other))
    assert left == right

    # Chosen on the test split, every one of them would differ.
    a, b = (run.predictions("test") for run in (one, other))
    np.testing.assert_array_equal(a.logit_NF, b.logit_NF)
    for f in range(len(a.findings)):
        pair = [(scores.logit_NF[:, f], scores.label_NF[:, f]) for scores in (a, b)]
        assert searches.best_f1_threshold(*pair[0]).value != searches.best_f1_threshold(*pair[1]).value
        assert calibration.fit("platt", *pair[0]) != calibration.fit("platt", *pair[1])
    if a.maps is not None and b.maps is not None:
        assert searches.best_mask_rule(a.maps) != searches.best_mask_rule(b.maps)
    else:
        ranked = [
            np.argsort([auroc_on_test(run, name) for name in each])
            for run, each in zip((one, other), names, strict=True)
        ]
        assert ranked[0][-1] != ranked[1][-1]
    assert read(one, "test_metrics.json")["findings"] != read(other, "test_metrics.json")["findings"]


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
def test_a_wrong_override_is_named(override: str, fragments: list[str], run: Run) -> None:
    with pytest.raises(UserError) as caught:
        run.choose_thresholds([override], 20)
    assert "\n" not in str(caught.value)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_scores_without_a_metric_are_refused(run: Run) -> None:
    """One patient, a NaN score, another kind of file: one line that names the file."""
    run.choose_thresholds(resamples=20)
    run.evaluate(20)
    path = run.artifact("predictions-test.parquet")
    scores, info = predictions.read_predictions(path), predictions.read_info(path)
    bad = scores.logit_NF.copy()
    bad[3, 1] = np.nan
    predictions.write_predictions(path, replace(scores, logit_NF=bad), info)
    with pytest.raises(UserError, match=rf"{path}: the score of Effusion of image {scores.image_id[3]} is nan"):
        run.evaluate(20)
    alone = np.array(["one"] * len(scores.patient), dtype=object)
    predictions.write_predictions(path, replace(scores, patient=alone), info)
    with pytest.raises(UserError, match=rf"{path}: all {len(alone)} images are of one patient"):
        run.evaluate(20)
    Path(path).write_text("no table")
    with pytest.raises(UserError, match=rf"{path} is not a Parquet file .*; remove it"):
        run.evaluate(20)
    pq.write_table(pa.table({"image_id": ["a"]}), path)
    with pytest.raises(UserError, match=rf"{path} does not say whose scores"):
        run.evaluate(20)


def set_shards(run: Run, shards: str) -> None:
    """Change the path of the dataset in a run's weights."""
    path = Path(run.artifact(checkpoint.BEST))
    state = checkpoint.read(path.read_bytes(), "best.pt")
    state["recipe"]["data"]["shards"] = [shards]
    path.write_bytes(checkpoint.dump(state))


def test_shards_that_changed_are_refused_even_with_stored_scores(run: Run, nih_shards: str, tmp_path: Path) -> None:
    copy = shutil.copytree(nih_shards, tmp_path / "copy")
    set_shards(run, str(copy))
    run.choose_thresholds(resamples=20)
    run.evaluate(20)
    shutil.rmtree(copy)
    with_other_test_split(nih_shards, copy)
    for method in (run.choose_thresholds, run.evaluate):
        with pytest.raises(UserError, match=f"{copy}: not the shards that {run.path} was trained on"):
            method()
    shutil.rmtree(copy)
    run.choose_thresholds(resamples=20)  # thresholds need only the stored scores
    with pytest.raises(UserError, match=r"manifest\.parquet does not exist"):
        run.evaluate(20)


def test_files_that_do_not_belong_together_are_refused(run: Run) -> None:
    with pytest.raises(UserError, match=r"thresholds\.json does not exist"):
        run.evaluate(20)
    run.choose_thresholds(resamples=20)
    with pytest.raises(UserError, match=r"test_metrics\.json does not exist; run `cxrscale evaluate"):
        run.report()
    run.evaluate(20)
    run.choose_thresholds(["threshold.goal=youden"], 20)
    with pytest.raises(UserError, match=r"other thresholds than thresholds\.json"):
        run.report()
    set_shards(run, "elsewhere")
    with pytest.raises(UserError, match=r"other weights than best\.pt"):
        run.evaluate(20)


Edit = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("thresholds.json", lambda tree: tree.pop("rule"), "field rule is missing"),
        ("thresholds.json", lambda tree: tree.pop("schema_version"), "field schema_version is missing"),
        ("thresholds.json", lambda tree: tree.update(schema_version=0), "schema_version is 0"),
        ("thresholds.json", lambda tree: tree["rule"].update(goal="luck"), "field rule.goal is 'luck'"),
        (
            "thresholds.json",
            lambda tree: tree["thresholds"]["Mass"]["threshold"].update(value="high"),
            "field thresholds.Mass.threshold.value is 'high'",
        ),
        (
            "thresholds.json",
            lambda tree: tree["calibration"]["Mass"]["calibrator"].update(kind="spline"),
            "field calibration.Mass.calibrator is ",
        ),
        ("test_metrics.json", lambda tree: tree.update(dise=None), "field dise is unknown"),
        (
            "test_metrics.json",
            lambda tree: tree["findings"]["Mass"].pop("auroc"),
            "field findings.Mass.auroc is missing",
        ),
    ],
)
def test_a_damaged_or_older_file_is_one_line_with_file_field_and_remedy(
    name: str, edit: Edit, message: str, run: Run
) -> None:
    run.choose_thresholds(resamples=20)
    run.evaluate(20)
    tree = read(run, name)
    edit(tree)
    del tree["seal"]  # as in a file of an earlier version; else the digest would be what does not fit
    Path(run.artifact(name)).write_text(json.dumps(tree))
    command = {"thresholds.json": "threshold", "test_metrics.json": "evaluate"}[name]
    with pytest.raises(UserError) as caught:
        run.report()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{run.artifact(name)}: {message}")
    assert str(caught.value).endswith(f"run `cxrscale {command} {run.path}`")


def test_a_run_in_a_bucket(run: Run, s3: str) -> None:
    address = storage.join(s3, "runs", "evaluated")
    for name in ("best.pt", "recipe.yaml", "run.json", "train_log.jsonl"):
        storage.write(storage.join(address, name), storage.read(run.artifact(name)))
    remote = open_run(address)
    assert remote.choose_thresholds(resamples=20).run == address
    remote.evaluate(20)
    page = remote.report()
    assert page == f"{address}/report.html"
    assert b"</html>" in storage.read(page)
    assert set(storage.listing(address, ".json")) >= {"thresholds.json", "test_metrics.json"}
    assert "roc.png" in storage.listing(remote.artifact("plots"))

"""Figures that others have published of scores that others have published: each must come out again."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score

from cxrscale.evaluation import metrics

CASP = ("densenet121", "searched_nonrec")
SEEDS = range(5)


def test_reproduce_chexnets_14_aurocs_to_the_last_digit(real: Path) -> None:
    """Scores of 22,433 images by jrzech/reproduce-chexnet, against the labels of NIH's table."""
    with (real / "scores/reproduce_chexnet_preds.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (real / "nih/Data_Entry_2017_v2020.csv").open() as file:
        labels = {row["Image Index"]: set(row["Finding Labels"].split("|")) for row in csv.DictReader(file)}
    with (real / "scores/reproduce_chexnet_aucs.csv").open() as file:
        published = {row["label"]: row["auc"] for row in csv.DictReader(file)}
    assert (len(rows), len(published)) == (22_433, 14)
    found = {}
    for name in published:
        score_N = [float(row[f"prob_{name}"]) for row in rows]
        label_N = [float(name in labels[row["Image Index"]]) for row in rows]
        found[name] = repr(float(metrics.auroc(score_N, label_N).value))
    assert found == published


def casp_scores(real: Path, model: str) -> list[np.ndarray]:
    """The logits of each of the five seeds; (25596, 14) each."""
    return [np.load(real / f"scores/{model}_seed{seed}.npz")["test_logits"] for seed in SEEDS]


def casp_published(real: Path) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = json.loads((real / "scores/nih_bootstrap.json").read_text())
    return found


@pytest.mark.parametrize("model", CASP)
def test_the_mean_auroc_of_casps_five_seeds(model: str, real: Path) -> None:
    label_NF = np.load(real / f"scores/{model}_seed0.npz")["test_labels"]
    value = [metrics.macro_auroc(logit_NF, label_NF) for logit_NF in casp_scores(real, model)]
    published = casp_published(real)["models"][model]
    assert round(float(np.mean(value)), 4) == published["auc"]
    assert round(float(np.std(value)), 4) == published["seed_sd"]


@pytest.mark.slow
def test_casps_intervals_over_patients_and_its_paired_difference(real: Path) -> None:
    """2,000 resamples of 2,797 patients, of the mean over five seeds; one CPU minute.

    Our p-value is two-sided, 2 / (R + 1) where every resample agrees; theirs is 1 / (R + 1).
    """
    first = np.load(real / "scores/densenet121_seed0.npz")
    label_NF, patient_N = first["test_labels"], first["test_patient"].astype(str)
    weights_RN = metrics.bootstrap_weights(patient_N, 2000, seed=0)
    value, resampled = {}, {}
    for model in CASP:
        seeds = casp_scores(real, model)
        value[model] = float(np.mean([metrics.macro_auroc(logit_NF, label_NF) for logit_NF in seeds]))
        auroc_SFR = [
            [metrics.bootstrap_auroc(logit_NF[:, f], label_NF[:, f], weights_RN) for f in range(label_NF.shape[1])]
            for logit_NF in seeds
        ]
        resampled[model] = np.mean(auroc_SFR, axis=(0, 1))
        published = casp_published(real)["models"][model]
        ours = metrics.interval(value[model], resampled[model])
        assert (ours.low, ours.high) == pytest.approx((published["ci_lo"], published["ci_hi"]), abs=1e-3)
    published = casp_published(real)["paired"]["searched_nonrec__vs__densenet121"]
    gap_R = resampled["searched_nonrec"] - resampled["densenet121"]
    ours = metrics.interval(value["searched_nonrec"] - value["densenet121"], gap_R)
    assert round(ours.value, 4) == published["delta"]
    assert (ours.low, ours.high) == pytest.approx((published["ci_lo"], published["ci_hi"]), abs=1e-3)
    assert metrics.bootstrap_p(gap_R) == pytest.approx(2 / 2001)
    assert published["p"] == round(1 / 2001, 4)


def read_study_labels(path: Path) -> dict[str, dict[str, float]]:
    with path.open() as file:
        return {row.pop("Study"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}


def test_chexperts_truth_is_the_majority_of_five_radiologists_and_the_other_three_are_measured(real: Path) -> None:
    """Irvin et al. 2019, section 5: five of eight radiologists make the truth of the 500 test studies."""
    folder = real / "tables/chexpert_test_radiologists"
    truth = read_study_labels(real / "tables/chexpert_test_groundtruth.csv")
    five = [read_study_labels(path) for path in sorted(folder.glob("*_gt.csv"))]
    three = [read_study_labels(folder / f"bc{number}.csv") for number in (4, 6, 8)]
    assert (len(five), len(truth)) == (5, 500)
    studies = sorted(truth)
    weights_RN = metrics.bootstrap_weights(studies, 200, seed=0)
    for name in ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"):
        votes_N = np.sum([[reader[study][name] for study in studies] for reader in five], axis=0)
        truth_N = np.array([truth[study][name] for study in studies])
        assert (truth_N == (votes_N >= 3)).all(), name
        reader_NA = np.array([[reader[study][name] for reader in three] for study in studies])
        result = metrics.annotator_f1(truth_N, reader_NA, weights_RN)
        own = [f1_score(truth_N, reader_NA[:, a]) for a in range(3)]
        assert result.model.value == pytest.approx(np.mean(own))
        others = [f1_score(reader_NA[:, 0], other) for other in (truth_N, reader_NA[:, 1], reader_NA[:, 2])]
        assert result.annotators[0].value == pytest.approx(np.mean(others))
        assert result.model.low < result.model.value < result.model.high


def test_procs_example_of_a_grade_and_an_outcome() -> None:
    """pROC's data set aSAH of 113 hemorrhages (Turck et al. 2010), as counts of WFNS grade and outcome.

    AUC, DeLong's variance and interval of aSAH$wfns as pROC's manual and tests print them.
    """
    good, poor = (37, 20, 3, 8, 4), (2, 12, 1, 8, 18)
    grade = np.repeat([1, 2, 3, 4, 5] * 2, good + poor)
    outcome = np.repeat([0.0, 1.0], [sum(good), sum(poor)])
    area, covariance = metrics.delong(grade[None], outcome)
    assert area[0] == pytest.approx(0.823678861788618, abs=1e-15)
    assert covariance[0, 0] == pytest.approx(0.00146991470882363, rel=1e-12)
    assert metrics.auroc(grade, outcome).value == pytest.approx(0.823678861788618, abs=1e-15)
    half = 1.959963984540054 * covariance[0, 0] ** 0.5
    assert (area[0] - half, area[0] + half) == pytest.approx((0.7485, 0.8988), abs=5e-5)

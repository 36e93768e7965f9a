"""Published results stand beside a run's own only where the images are the same. Milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cxrscale import config
from cxrscale.config import NIH14, PublishedFigure, Threshold
from cxrscale.evaluation import Estimate, metrics, summary
from cxrscale.evaluation.artifacts import DataInfo, DatasetInfo, LeakInfo, PartInfo
from cxrscale.reporting import published
from cxrscale.types import Scores, logits_of

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def data(policy: str, test: int, others: int, source: str = "nih", limit: int | None = None) -> DataInfo:
    images = {"train": others, "val": 0, "test": test}
    pack = {"split": policy, "limit": limit}
    return DataInfo(
        parts={role: PartInfo(splits=(role,), images=count, patients=count) for role, count in images.items()},
        datasets=(DatasetInfo(shards="shards/nih", source=source, input={}, pack=pack),),
        leaks=LeakInfo(verdict=(), not_checked=(), patients_in_two_splits=0, images_in_two_splits=0),
    )


@pytest.mark.parametrize(
    ("where", "split"),
    [
        (data("official", 25_596, 86_524), "official"),
        (data("official", 25_500, 86_524), "official"),  # some were unreadable
        (data("random", 22_424, 89_696), "random"),
        (data("chexnet", 420, 111_700), "random"),
    ],
)
def test_published_results_of_the_same_split(where: DataInfo, split: str) -> None:
    results, why_none = published.comparable_results(NIH14, where)
    assert not why_none
    assert {result.split for result in results} == {split}


@pytest.mark.parametrize(
    "where",
    [
        data("official", 103, 297),  # synthetic data in NIH's format
        data("official", 25_596, 86_524, limit=112_000),
        data("random", 1_000, 9_000),
        data("official", 25_596, 86_524, source="rsna"),
        data("lists", 25_596, 86_524),
    ],
)
def test_no_published_results_of_other_images(where: DataInfo) -> None:
    results, why_none = published.comparable_results(NIH14, where)
    assert results == []
    assert why_none.endswith(".")


def test_chexnets_mean_is_that_of_its_findings() -> None:
    paper = next(result for result in published.NIH_RESULTS if result.findings)
    assert list(paper.findings) == list(NIH14)
    assert sum(paper.findings.values()) / 14 == pytest.approx(paper.mean[0], abs=5e-5)


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipes_reference_names_its_images_and_known_metrics(path: Path) -> None:
    reference = config.load_recipe(path).reference
    assert bool(reference.system) == bool(reference.data) == bool(reference.figures)
    known = {"", "mean_auroc", "auroc", "npv", "f1", "accuracy", "precision", "recall"}
    assert {figure.metric for figure in reference.figures} <= known


def test_a_published_figure_finds_our_estimate() -> None:
    # 6 of 19 images are positive; at 0.5, 5 are found, 4 are false positives.
    label = np.repeat([1.0, 0.0], [6, 13]).astype(np.float32)
    score = np.repeat([0.9, 0.4, 0.8, 0.1], [5, 1, 4, 9]).astype(np.float32)
    names = np.array([f"image-{number}" for number in range(19)], dtype=object)
    scores = Scores(names, names, logits_of(score)[:, None], label[:, None], ("Pneumonia",))
    rule = Threshold(goal="fixed", value=0.5, report_at=(0.25,))
    weights_RN = metrics.bootstrap_weights(names, 10, seed=0)
    test = summary.evaluate_scores(scores, summary.choose_thresholds(scores, rule, weights_RN), weights_RN, {})
    row = test.findings["Pneumonia"]
    assert row.at_threshold is not None

    def own(metric: str, threshold: float | None = None) -> Estimate | None:
        figure = PublishedFigure(name="a figure", value=1.0, metric=metric, threshold=threshold)
        return published.own_estimate(figure, test)

    assert own("auroc") == row.auroc
    assert own("recall") == row.at_threshold.recall
    assert own("recall", 0.25) == row.report_at[0].recall
    assert own("recall", 0.7) is None
    assert own("mean_auroc") == test.mean_auroc
    npv = own("npv")
    assert npv is not None
    assert npv.value == pytest.approx(9 / 10)
    assert own("") is None


def test_rsnas_figures_agree_with_its_confusion_matrices() -> None:
    (tn, fp), (fn, tp) = (1936, 143), (271, 334)
    figures = config.load_recipe(JOBS / "rsna-resnet18.yaml").reference.figures
    value = {figure.name: figure.value for figure in figures}
    assert value["accuracy at 0.5"] == pytest.approx((tp + tn) / (tp + tn + fp + fn), abs=5e-4)
    assert value["precision at 0.5"] == pytest.approx(tp / (tp + fp), abs=5e-4)
    assert value["recall at 0.5"] == pytest.approx(tp / (tp + fn), abs=5e-4)
    assert value["precision at 0.25 (469 of 823)"] == pytest.approx(469 / 823, abs=5e-5)
    assert value["recall at 0.25 (469 of 605)"] == pytest.approx(469 / 605, abs=5e-5)


def test_a_figure_may_be_a_number_or_text() -> None:
    figures = config.load_recipe(JOBS / "chexnet-pneumonia.yaml").reference.figures
    assert [figure.value for figure in figures] == [0.768, "0.435 (0.387-0.481)", "0.387 (0.330-0.442)"]

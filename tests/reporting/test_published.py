"""Figures of others stand beside ours only where the images are the same. Milliseconds."""

from __future__ import annotations

from typing import Any

import pytest

from cxrscale.config.findings import NIH14
from cxrscale.reporting import published


def data(policy: str, test: int, others: int, source: str = "nih", limit: int | None = None) -> dict[str, Any]:
    parts = {"train": {"images": others}, "val": {"images": 0}, "test": {"images": test}}
    return {"parts": parts, "sets": [{"source": source, "pack": {"split": policy, "limit": limit}}]}


@pytest.mark.parametrize(
    ("where", "split"),
    [
        (data("official", 25_596, 86_524), "official"),
        (data("official", 25_500, 86_524), "official"),  # some were unreadable
        (data("random", 22_424, 89_696), "random"),
        (data("chexnet", 420, 111_700), "random"),
    ],
)
def test_figures_of_the_same_split(where: dict[str, Any], split: str) -> None:
    figures, why = published.of_split(NIH14, where)
    assert not why
    assert {each.split for each in figures} == {split}


@pytest.mark.parametrize(
    "where",
    [
        data("official", 103, 297),  # a synthetic archive in the archive's clothes
        data("official", 25_596, 86_524, limit=112_000),
        data("random", 1_000, 9_000),
        data("official", 25_596, 86_524, source="rsna"),
        data("lists", 25_596, 86_524),
    ],
)
def test_no_figures_of_other_images(where: dict[str, Any]) -> None:
    figures, why = published.of_split(NIH14, where)
    assert figures == []
    assert why.endswith(".")


def test_chexnets_mean_is_that_of_its_findings() -> None:
    paper = next(each for each in published.NIH if each.findings)
    assert list(paper.findings) == list(NIH14)
    assert sum(paper.findings.values()) / 14 == pytest.approx(paper.mean[0], abs=5e-5)


def test_systems_go_by_the_recipes_name() -> None:
    hard = published.system("siim-classifier-hard")
    assert hard is not None
    assert hard.headlines[0].theirs == 0.77
    assert published.system("siim-classifier-hard-20260101-120000") is hard
    assert published.system("siim-classifier-20260101-120000") is published.SYSTEMS["siim-classifier"]
    assert published.system("my-own") is None


def test_a_headline_finds_our_number() -> None:
    row = {
        "auroc": {"value": 0.9, "low": 0.8, "high": 1.0},
        "confusion": {"tp": 5, "fp": 4, "fn": 1, "tn": 9},
        "report_at": [{"threshold": 0.25, "recall": {"value": 0.7, "low": 0.6, "high": 0.8}}],
    }
    found = {"mean_auroc": {"value": 0.8}, "findings": {"Pneumonia": row}}
    line = published.Headline
    assert published.ours(line("", 1.0, "auroc"), found) == row["auroc"]
    assert published.ours(line("", 1.0, "recall", 0.25), found) == row["report_at"][0]["recall"]  # type: ignore[index]
    assert published.ours(line("", 1.0, "recall", 0.5), found) is None
    assert published.ours(line("", 1.0, "mean_auroc"), found) == {"value": 0.8}
    npv = published.ours(line("", 1.0, "npv"), found)
    assert npv is not None
    assert npv["value"] == pytest.approx(0.9)
    assert published.ours(line("", "words"), found) is None


def test_rsna_headlines_agree_with_its_confusion_matrices() -> None:
    (tn, fp), (fn, tp) = (1936, 143), (271, 334)
    theirs = {each.what: each.theirs for each in published.SYSTEMS["rsna-resnet18"].headlines}
    assert theirs["accuracy at 0.5"] == pytest.approx((tp + tn) / (tp + tn + fp + fn), abs=5e-4)
    assert theirs["precision at 0.5"] == pytest.approx(tp / (tp + fp), abs=5e-4)
    assert theirs["recall at 0.5"] == pytest.approx(tp / (tp + fn), abs=5e-4)

"""Every figure can be drawn, also from almost no data; warnings are errors here. Some 10 s."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from cxrscale.evaluation import MaskRule, metrics
from cxrscale.evaluation.artifacts import SubgroupMetrics
from cxrscale.evaluation.metrics import Estimate
from cxrscale.evaluation.summary import DiceCurve
from cxrscale.reporting import plots
from cxrscale.reporting.style import INK, LINE, WIDE, png, svg
from cxrscale.training.overfit import LearningCurve

RNG = np.random.default_rng(0)
LABEL = (RNG.random(60) < 0.3).astype(float)
SCORE = np.clip(0.3 * LABEL + 0.6 * RNG.random(60), 0, 1)
NONE = np.zeros(60)
ESTIMATE = Estimate(0.4, 0.3, 0.5)
UNDEFINED = metrics.undefined("no image with the finding")
CELLS = {"tp": 3, "fp": 1_200, "fn": 0, "tn": 7}


def history(lines: int) -> Figure:
    train = [{"kind": "train", "step": n, "epoch": n // 5, "loss": 1 / (n + 1)} for n in range(1, 5 * lines)]
    val = [{"kind": "val", "step": 5 * n, "epoch": n, "loss": 0.5, "auroc": None} for n in range(1, lines + 1)]
    return plots.history([*train, *val], best=1 if lines else None)


def learning_curve(steps: int) -> LearningCurve:
    return LearningCurve(
        losses=tuple(1 / (n + 1) for n in range(steps)),
        metric="auroc",
        scores=(0.5, 0.9)[: steps + 1],
        eval_loss=0.5,
        steps=steps,
        weight_change=0.1,
        gradient_norm=1.0,
        trainable=1.0,
        diverged=False,
    )


FIGURES: dict[str, Callable[[], Figure]] = {
    "threshold_curves": lambda: plots.threshold_curves(
        {"Mass": metrics.pr_curve(SCORE, LABEL), "Hernia": metrics.pr_curve(SCORE, NONE)},
        {"Mass": ESTIMATE, "Hernia": UNDEFINED},
    ),
    "mask_threshold_curve": lambda: plots.mask_threshold_curve(
        DiceCurve((0, 0.5), (0.1, 0.8), (np.nan, np.nan)), MaskRule(0.7, 9, 0.3, 0.8)
    ),
    "roc": lambda: plots.roc(
        {"Mass": metrics.roc_curve(SCORE, LABEL), "Hernia": metrics.roc_curve(SCORE, NONE)},
        {"Mass": (0.1, 0.8)},
        {"Mass": "0.9"},
    ),
    "precision_recall": lambda: plots.precision_recall(
        {"Mass": metrics.pr_curve(SCORE, LABEL)}, {"Mass": (0.5, 0.5)}, {"Mass": 0.3}, {}
    ),
    "calibration": lambda: plots.calibration(
        {
            "Mass": {
                "raw": metrics.reliability(SCORE, LABEL, 10, equal_mass=True),
                "calibrated": metrics.reliability(SCORE / 2, LABEL, 10, equal_mass=True),
            },
            "Hernia": {"raw": metrics.reliability(SCORE, np.full(60, np.nan))},
        }
    ),
    "confusion": lambda: plots.confusion({f"finding {n}": CELLS for n in range(6)}, columns=3),
    "forest": lambda: plots.forest(
        {
            "Mass": {
                "sex F": SubgroupMetrics(images=9, positives=3, auroc=ESTIMATE, auprc=ESTIMATE),
                "sex M": SubgroupMetrics(images=5, positives=0, auroc=UNDEFINED, auprc=UNDEFINED),
                "sex unknown": SubgroupMetrics(images=5, positives=2, auroc=Estimate(0.5), auprc=UNDEFINED),
            }
        },
        {"Mass": ESTIMATE},
    ),
    "overlap": lambda: plots.overlap([0.0, 0.3, 1.0]),
    "learning_curve": lambda: plots.learning_curve(learning_curve(6)),
    "learning_curve of nothing yet": lambda: plots.learning_curve(learning_curve(0)),
    "history": lambda: history(3),
    "history of nothing yet": lambda: history(0),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_becomes_a_png_and_an_svg_in_the_pages_colors(name: str) -> None:
    figure = FIGURES[name]()
    first = png(figure)
    assert first == png(FIGURES[name]())  # the same every time
    image = cv2.imdecode(np.frombuffer(first, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    assert image.min() < 128  # something is drawn
    assert image.max() == 255  # on white paper
    text = svg(figure, name)
    assert text.startswith("<svg")
    assert "currentColor" in text
    assert INK not in text
    assert LINE not in text
    assert "http" not in text


def test_an_empty_panel_has_the_reason() -> None:
    text = svg(FIGURES["roc"](), "roc")
    assert "no image" in text
    assert "with the finding" in text


def test_a_single_finding_gets_a_small_figure_and_many_a_wide_one() -> None:
    curve = metrics.roc_curve(SCORE, LABEL)
    assert plots.roc({"Mass": curve}, {}, {}).get_size_inches()[0] < WIDE / 2
    many = plots.roc({f"finding {n}": curve for n in range(14)}, {}, {})
    assert many.get_size_inches()[0] == WIDE
    assert len(many.axes) == 14

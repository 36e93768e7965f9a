"""What others have reported on ChestX-ray14, and when it may stand beside a run's own test metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cxrscale.config import NIH14, PublishedFigure
from cxrscale.evaluation import Estimate, artifacts, metrics

Split = Literal["official", "random"]


@dataclass(frozen=True, slots=True)
class PublishedResult:
    """AUROC on a test split of ChestX-ray14."""

    name: str
    source: str
    split: Split
    """official: NIH's own test list; random: patients assigned at random, differently in each publication."""
    mean: tuple[float, float]
    """Mean over the 14 findings: the lowest and highest that is reported; equal where it is one number."""
    findings: Mapping[str, float] = field(default_factory=dict)


_CHEXNET_AUROC = (
    *(0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680),
    *(0.8887, 0.7901, 0.8878, 0.9371, 0.8047, 0.8062, 0.9164),
)
_CHEXNET_SOURCE = "Rajpurkar et al. 2017, arXiv 1711.05225v3"

NIH_RESULTS: tuple[PublishedResult, ...] = (
    PublishedResult(
        "CheXNet", _CHEXNET_SOURCE, "random", (0.8414, 0.8414), dict(zip(NIH14, _CHEXNET_AUROC, strict=True))
    ),
    PublishedResult("CheXNet, reproduced", "public reimplementations", "random", (0.838, 0.851)),
    PublishedResult("DenseNet-121", "reimplementations that use the official split", "official", (0.805, 0.811)),
    PublishedResult("Swin-T", "published, one model", "official", (0.818, 0.818)),
    PublishedResult("best ensemble", "published, several models", "official", (0.822, 0.822)),
)
NIH_TEST_IMAGES = 25_596
"""Images of the official test list."""
NIH_IMAGES = 112_120
"""Images of ChestX-ray14."""
SIIM_WINNER = 0.8679
"""Dice over all images of the private test set, where an empty prediction for an empty mask counts 1."""
MISSING_SHARE = 0.01
"""Up to this share of the images may be missing (unreadable, unlabeled) in a split that still counts as the same."""
SEED_SD = 0.003
"""Standard deviation of the mean AUROC between seeds of one recipe."""


def comparable_results(findings: Sequence[str], data: artifacts.DataInfo) -> tuple[list[PublishedResult], str]:
    """The results on the same split as a run's, or none and the reason.

    Args:
        findings: what the run predicts.
        data: the datasets with their packing, and the images of each part.
    """
    if all(dataset.source == "siim" for dataset in data.datasets):
        return [], f"The SIIM-ACR winner's Dice over all, {SIIM_WINNER}, is of a test set whose masks are not public."
    if not set(findings) & set(NIH14) or any(dataset.source != "nih" for dataset in data.datasets):
        return [], "There are published results for ChestX-ray14's 14 findings only."
    policy, limit = (data.datasets[0].pack[name] for name in ("split", "limit"))
    test_images, all_images = data.parts["test"].images, sum(part.images for part in data.parts.values())
    if policy == "official" and limit is None and _nearly(test_images, NIH_TEST_IMAGES):
        return [result for result in NIH_RESULTS if result.split == "official"], ""
    if policy in ("random", "chexnet", "kfold") and limit is None and _nearly(all_images, NIH_IMAGES):
        return [result for result in NIH_RESULTS if result.split == "random"], ""
    return [], (
        f"No published result is comparable: those are of the {NIH_TEST_IMAGES:,} images of ChestX-ray14's test list, "
        f"or of a random split of its {NIH_IMAGES:,}; these are {test_images:,} of {all_images:,} (split {policy})."
    )


def own_estimate(figure: PublishedFigure, test: artifacts.SplitMetrics) -> Estimate | None:
    """The run's estimate that a recipe's published figure is to be compared with; None without one."""
    if figure.metric == "mean_auroc":
        return test.mean_auroc
    row = next(iter(test.findings.values()))
    if figure.metric in ("auroc", "auprc"):
        return row.auroc if figure.metric == "auroc" else row.auprc
    point = row.at_threshold
    if figure.threshold is not None:
        point = next((other for other in row.report_at if other.threshold == figure.threshold), None)
    if point is None or not figure.metric:
        return None
    if figure.metric == "npv":
        return Estimate(metrics.ratio(point.confusion["tn"], point.confusion["fn"]))
    estimate: Estimate | None = getattr(point, figure.metric, None)
    return estimate


def _nearly(count: int, total: int) -> bool:
    return (1 - MISSING_SHARE) * total <= count <= total

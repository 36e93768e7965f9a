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


@dataclass(frozen=True, slots=True)
class PublishedLocalization:
    """Boxes that were drawn from heat maps on ChestX-ray14."""

    name: str
    source: str
    boxes: int
    """What they were measured on."""
    accuracy: Mapping[str, Mapping[str, float]]
    """T of the IoBB -> finding -> share of the boxes that are found."""
    false_positives: Mapping[str, Mapping[str, float]]
    """The same of false boxes; all are multiples of 1/984, so an average over the boxes of all findings."""


_BOXED = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
_WANG_ACCURACY = {
    "0.1": (0.7277, 0.9931, 0.7124, 0.7886, 0.4352, 0.1645, 0.7500, 0.4591),
    "0.25": (0.5500, 0.9794, 0.5424, 0.5772, 0.2823, 0.0506, 0.5583, 0.3469),
    "0.5": (0.2833, 0.8767, 0.3333, 0.4227, 0.1411, 0.0126, 0.3833, 0.1836),
    "0.75": (0.1666, 0.7260, 0.2418, 0.3252, 0.1176, 0.0126, 0.2583, 0.1020),
    "0.9": (0.1333, 0.6849, 0.2091, 0.2520, 0.0588, 0.0126, 0.2416, 0.0816),
}
_WANG_FALSE_POSITIVES = {
    "0.1": (0.8323, 0.3506, 0.7998, 0.5589, 0.6423, 0.6047, 0.9055, 0.4776),
    "0.25": (0.9167, 0.4553, 0.8598, 0.6077, 0.6707, 0.6158, 0.9614, 0.5000),
    "0.5": (1.0203, 0.5630, 0.9268, 0.6585, 0.6941, 0.6189, 1.0132, 0.5285),
    "0.75": (1.0619, 0.6616, 0.9603, 0.6921, 0.7043, 0.6199, 1.0569, 0.5396),
    "0.9": (1.0752, 0.7226, 0.9797, 0.7124, 0.7144, 0.6199, 1.0732, 0.5437),
}
WANG_LOCALIZATION = PublishedLocalization(
    "Wang et al.",
    "Wang et al. 2017, arXiv 1705.02315, table 4 (ResNet-50)",
    984,
    {t: dict(zip(_BOXED, row, strict=True)) for t, row in _WANG_ACCURACY.items()},
    {t: dict(zip(_BOXED, row, strict=True)) for t, row in _WANG_FALSE_POSITIVES.items()},
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

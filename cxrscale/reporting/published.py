"""Figures that others have published, for the page to set beside ours where the images are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cxrscale.config import NIH14

Split = Literal["official", "random"]


@dataclass(frozen=True, slots=True)
class Figure:
    """AUROC on ChestX-ray14's test part."""

    who: str
    source: str
    split: Split
    """official: the archive's own test list; random: patients drawn at random, no two alike."""
    mean: tuple[float, float]
    """Mean over the 14 findings: lowest and highest that is reported; equal where it is one number."""
    findings: Mapping[str, float] = field(default_factory=dict)


_CHEXNET = (
    *(0.8094, 0.9248, 0.8638, 0.7345, 0.8676, 0.7802, 0.7680),
    *(0.8887, 0.7901, 0.8878, 0.9371, 0.8047, 0.8062, 0.9164),
)
CHEXNET = "Rajpurkar et al. 2017, arXiv 1711.05225v3"

NIH: tuple[Figure, ...] = (
    Figure("CheXNet", CHEXNET, "random", (0.8414, 0.8414), dict(zip(NIH14, _CHEXNET, strict=True))),
    Figure("CheXNet again", "public reimplementations", "random", (0.838, 0.851)),
    Figure("DenseNet-121", "reimplementations that keep to the official split", "official", (0.805, 0.811)),
    Figure("Swin-T", "published, one model", "official", (0.818, 0.818)),
    Figure("best ensemble", "published, several models", "official", (0.822, 0.822)),
)
NIH_TEST = 25_596
"""Images of the official test list."""
NIH_ALL = 112_120
SIIM_WINNER = 0.8679
"""Dice over all images of the private test set, empty against empty = 1."""
LOST = 0.01
"""Up to this share of them may be missing (unreadable, no label) and the images still be the same."""
NOISE = 0.003
"""Standard deviation of the mean AUROC between seeds of one recipe."""


@dataclass(frozen=True, slots=True)
class Headline:
    """A number that the description of a system gives, on images of its own."""

    what: str
    theirs: float | str
    metric: str = ""
    """Which of our metrics it is beside: a key of the first finding's row, mean_auroc, or npv; empty for none."""
    cut: float | None = None
    """The threshold that it holds at; None: the stored one, or it has none."""


@dataclass(frozen=True, slots=True)
class System:
    """What a recipe was made after."""

    name: str
    data: str
    """The images that its numbers are of."""
    headlines: tuple[Headline, ...]


_SIIM = "SIIM-ACR pneumothorax, an engineering blog"
_OWN = "validation images of its own"
_KERMANY = "Kermany, two ways of transfer learning"
SYSTEMS: Mapping[str, System] = {
    "siim-classifier": System(
        _SIIM, _OWN, (Headline("AUC, all images", 0.69, "auroc"), Headline("threshold that favors recall", 0.38))
    ),
    "siim-classifier-hard": System(
        _SIIM,
        _OWN,
        (Headline("AUC, hard images repeated", 0.77, "auroc"), Headline("threshold that favors recall", 0.38)),
    ),
    "effusion-resnet": System("Effusion against No Finding, a tutorial", _OWN, (Headline("AUC", 0.86, "auroc"),)),
    "rsna-resnet18": System(
        "RSNA pneumonia, a notebook",
        "2,684 validation images of its own",
        (
            Headline("accuracy at 0.5", 0.846, "accuracy", 0.5),
            Headline("precision at 0.5", 0.700, "precision", 0.5),
            Headline("recall at 0.5", 0.552, "recall", 0.5),
            Headline("precision at 0.25 (469 of 823)", 469 / 823, "precision", 0.25),
            Headline("recall at 0.25 (469 of 605)", 469 / 605, "recall", 0.25),
        ),
    ),
    "chexnet14": System(
        f"CheXNet, 14 findings ({CHEXNET})",
        "a random patient split, 70/10/20%",
        (Headline("mean AUROC of 14", 0.8414, "mean_auroc"),),
    ),
    "chexnet-pneumonia": System(
        f"CheXNet, pneumonia ({CHEXNET})",
        "420 images labeled by four radiologists",
        (
            Headline("AUROC (of the 14-finding model)", 0.7680, "auroc"),
            Headline("F1 against the radiologists", "0.435 (0.387-0.481)", "f1"),
            Headline("F1 of the radiologists", "0.387 (0.330-0.442)"),
        ),
    ),
    "kermany-finetune": System(
        _KERMANY, "the archive's test part", (Headline("right among called normal (118 of 119)", 118 / 119, "npv"),)
    ),
    "kermany-frozen": System(
        _KERMANY, "the archive's test part", (Headline("right among called normal (144 of 155)", 144 / 155, "npv"),)
    ),
}


def of_split(findings: Sequence[str], data: Mapping[str, Any]) -> tuple[list[Figure], str]:
    """The figures of the very split that a run was tested on, or none and why.

    Args:
        data: `data` of metrics.json: the datasets with their packing, images of each part.
    """
    sets, parts = data["sets"], data["parts"]
    if all(each["source"] == "siim" for each in sets):
        return [], f"The SIIM-ACR winner's Dice over all, {SIIM_WINNER}, is of a test set whose masks are not public."
    if not set(findings) & set(NIH14) or any(each["source"] != "nih" for each in sets):
        return [], "Published figures are known for ChestX-ray14's 14 findings alone."
    policy, limit = sets[0]["pack"]["split"], sets[0]["pack"]["limit"]
    images, everything = parts["test"]["images"], sum(part["images"] for part in parts.values())
    if policy == "official" and limit is None and _nearly(images, NIH_TEST):
        return [each for each in NIH if each.split == "official"], ""
    if policy in ("random", "chexnet", "kfold") and limit is None and _nearly(everything, NIH_ALL):
        return [each for each in NIH if each.split == "random"], ""
    return [], (
        f"Nothing is set beside these: published figures are of the {NIH_TEST:,} images of ChestX-ray14's test list, "
        f"or of a random split of its {NIH_ALL:,}; these are {images:,} of {everything:,} (split {policy})."
    )


def system(recipe_name: str) -> System | None:
    """The system that a recipe of `jobs/` was made after, by the recipe's name or that of a run named after it."""
    known = [name for name in SYSTEMS if recipe_name == name or recipe_name.startswith(name + "-2")]
    return SYSTEMS[max(known, key=len)] if known else None


def ours(headline: Headline, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The estimate of metrics.json that a headline is to be read beside; None where there is none."""
    if headline.metric == "mean_auroc":
        mean: dict[str, Any] = found["mean_auroc"]
        return mean
    row = next(iter(found["findings"].values()))
    if headline.cut is not None:
        row = next((each for each in row["report_at"] if each["threshold"] == headline.cut), {})
    if headline.metric == "npv" and "confusion" in row:
        missed, right = row["confusion"]["fn"], row["confusion"]["tn"]
        return {"value": right / (missed + right) if missed + right else None, "low": None, "high": None}
    estimate: dict[str, Any] | None = row.get(headline.metric)
    return estimate


def _nearly(count: int, whole: int) -> bool:
    return (1 - LOST) * whole <= count <= whole

"""Two runs on the same images: where they differ, and whether by more than chance."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import metrics
from cxrscale.evaluation.artifacts import (
    ComparedRun,
    Comparison,
    DiceDifference,
    Difference,
    FindingDifference,
    MeanDifference,
)
from cxrscale.evaluation.metrics import BootstrapWeights, Floats
from cxrscale.evaluation.thresholds import DEFAULT_MASK_RULE, MaskRule
from cxrscale.types import Scores, UserError

UNDEFINED = float("nan")


def compare_scores(
    run_a: Scores,
    run_b: Scores,
    resamples: int = 2000,
    seed: int = 0,
    names: tuple[str, str] = ("A", "B"),
    mask_rules: tuple[MaskRule, MaskRule] = (DEFAULT_MASK_RULE, DEFAULT_MASK_RULE),
) -> Comparison:
    """The metrics of run A minus those of run B, on the same images.

    Per finding: both AUROCs and their difference. Its 95% interval and `p_bootstrap` come from resampled patients, the
    same ones for both runs; `p_delong` treats images as independent (DeLong et al. 1988), `p_delong_patients` only
    patients (Obuchowski 1997), and `p_holm` adjusts the latter for the number of findings (Holm 1979). The mean over
    findings and, for segmentation, Dice over all images and on positives have interval and `p_bootstrap`. What is
    undefined is NaN, with the reason.

    Args:
        names: the runs' names in messages and in the result.
        mask_rules: each run's own.

    Raises:
        UserError: the runs do not hold the same images and labels, share no finding, a score is NaN, or there are
            fewer than two patients.
    """
    for scores, name in ((run_a, names[0]), (run_b, names[1])):
        metrics.require(scores, name)
    common = [name for name in run_a.findings if name in run_b.findings]
    if not common:
        lists = f"{', '.join(run_a.findings)} and {', '.join(run_b.findings)}"
        raise UserError(f"{names[0]} and {names[1]} share no finding ({lists}); compare runs of one task")
    row_b_N = rows_in_b(run_a, run_b, names)
    weights_RN = metrics.bootstrap_weights(run_a.patient, resamples, seed)
    rows: dict[str, FindingDifference] = {}
    auroc_2FR = np.empty((2, len(common), resamples))
    for f, name in enumerate(common):
        a, b = run_a.findings.index(name), run_b.findings.index(name)
        label_N = run_a.label_NF[:, a]
        _refuse_other_labels(run_a, label_N, run_b.label_NF[row_b_N, b], name, names)
        score_2N = np.stack([run_a.logit_NF[:, a], run_b.logit_NF[row_b_N, b]]).astype(np.float64)
        auroc_2FR[:, f] = [metrics.bootstrap_auroc(score_N, label_N, weights_RN) for score_N in score_2N]
        rows[name] = _finding(score_2N, label_N, run_a.patient, auroc_2FR[:, f])
    adjusted = metrics.holm([row.p_delong_patients for row in rows.values()]).tolist()
    return Comparison(
        a=ComparedRun(name=names[0]),
        b=ComparedRun(name=names[1]),
        images=len(run_a.image_id),
        patients=len(set(run_a.patient.tolist())),
        resamples=resamples,
        seed=seed,
        findings={
            name: row.model_copy(update={"p_holm": p}) for (name, row), p in zip(rows.items(), adjusted, strict=True)
        },
        only_in_a=tuple(name for name in run_a.findings if name not in common),
        only_in_b=tuple(name for name in run_b.findings if name not in common),
        mean_auroc=_mean(rows, auroc_2FR),
        dice=(
            None if run_a.maps is None or run_b.maps is None else _dice(run_a, run_b, row_b_N, mask_rules, weights_RN)
        ),
    )


def rows_in_b(run_a: Scores, run_b: Scores, names: tuple[str, str]) -> npt.NDArray[np.intp]:
    """(N,) the row of run B that holds each image of run A."""
    row_of = {image: row for row, image in enumerate(run_b.image_id.tolist())}
    images_a = set(run_a.image_id.tolist())
    not_in_b = [image for image in run_a.image_id.tolist() if image not in row_of]
    not_in_a = [image for image in row_of if image not in images_a]
    if not_in_b or not_in_a:
        parts = [
            f"{len(images)} images of {one} are missing from {other} (e.g. {images[0]})"
            for images, one, other in ((not_in_b, *names), (not_in_a, *names[::-1]))
            if images
        ]
        raise UserError(f"{' and '.join(parts)}; compare runs on the same split of the same shards")
    return np.array([row_of[image] for image in run_a.image_id.tolist()], dtype=np.intp)


def _refuse_other_labels(
    run_a: Scores, label_a_N: npt.ArrayLike, label_b_N: npt.ArrayLike, finding: str, names: tuple[str, str]
) -> None:
    a, b = np.asarray(label_a_N, dtype=np.float64), np.asarray(label_b_N, dtype=np.float64)
    different = np.flatnonzero(~((a == b) | (np.isnan(a) & np.isnan(b))))
    if len(different):
        row = different[0]
        raise UserError(
            f"{finding} of image {run_a.image_id[row]} is {a[row]:g} in {names[0]} and {b[row]:g} in {names[1]} "
            f"({len(different)} such labels); compare runs over the same shards"
        )


def _finding(
    score_2N: Floats, label_N: npt.ArrayLike, patient_N: npt.NDArray[np.object_], auroc_2R: Floats
) -> FindingDifference:
    a, b = (metrics.auroc(score_N, label_N) for score_N in score_2N)
    labels = np.asarray(label_N)
    p_images, reason_images = metrics.delong_test(score_2N[0], score_2N[1], label_N)
    p_patients, reason_patients = metrics.delong_test(score_2N[0], score_2N[1], label_N, patient_N)
    return FindingDifference(
        **dict(_difference(a.value, b.value, auroc_2R[0] - auroc_2R[1], a.reason)),
        positives=int((labels == 1).sum()),
        negatives=int((labels == 0).sum()),
        p_delong=p_images,
        p_delong_patients=p_patients,
        p_reason=reason_images or reason_patients,
    )


def _mean(rows: Mapping[str, FindingDifference], auroc_2FR: Floats) -> MeanDifference:
    defined = [f for f, row in enumerate(rows.values()) if np.isfinite(row.a)]
    if not defined:
        difference = _difference(UNDEFINED, UNDEFINED, np.zeros(0), "no finding has both classes")
        return MeanDifference(**dict(difference), findings=0)
    chosen = [row for row in rows.values() if np.isfinite(row.a)]
    a, b = float(np.mean([row.a for row in chosen])), float(np.mean([row.b for row in chosen]))
    mean_2R = auroc_2FR[:, defined].mean(axis=1)
    return MeanDifference(**dict(_difference(a, b, mean_2R[0] - mean_2R[1])), findings=len(defined))


def _dice(
    run_a: Scores,
    run_b: Scores,
    row_b_N: npt.NDArray[np.intp],
    mask_rules: tuple[MaskRule, MaskRule],
    weights_RN: BootstrapWeights,
) -> DiceDifference:
    """Dice of both runs, each by its own mask rule and on its own grid."""
    assert run_a.maps is not None
    assert run_b.maps is not None
    if run_a.maps.own_size != run_b.maps.own_size:
        raise UserError(
            "one run has Dice at the images' own size, the other at its input size; remove predictions-*.parquet of "
            "both and run `cxrscale threshold` and `cxrscale evaluate` again"
        )
    a_N, b_N = (
        metrics.map_dice(run.maps, rule.top, rule.min_area, rule.bottom)
        for run, rule in ((run_a, mask_rules[0]), (run_b, mask_rules[1]))
        if run.maps is not None
    )
    b_N = b_N[row_b_N]
    # A tiny mask can vanish on the coarser grid of one run: then the image is a positive of neither.
    positive_N = metrics.has_mask(run_a.maps) & metrics.has_mask(run_b.maps)[row_b_N]
    parts = {}
    for part, selected_N in (("all", np.ones(len(a_N), dtype=bool)), ("on_positives", positive_N)):
        if not selected_N.any():
            parts[part] = _difference(UNDEFINED, UNDEFINED, np.zeros(0), "no image with a mask")
            continue
        difference_R = metrics.weighted_means(np.where(selected_N, a_N - b_N, np.nan), weights_RN)
        parts[part] = _difference(float(a_N[selected_N].mean()), float(b_N[selected_N].mean()), difference_R)
    return DiceDifference(positives=int(positive_N.sum()), all=parts["all"], on_positives=parts["on_positives"])


def _difference(a: float, b: float, resampled_R: Floats, reason: str = "") -> Difference:
    estimate = metrics.undefined(reason) if reason else metrics.interval(a - b, resampled_R)
    return Difference(a=a, b=b, difference=estimate, p_bootstrap=metrics.bootstrap_p(resampled_R))

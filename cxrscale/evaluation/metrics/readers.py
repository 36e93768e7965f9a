"""A model compared with annotators of the same images, as in the CheXNet paper."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation.metrics.bootstrap import Estimate, Floats, divide, interval, weighted_sums


@dataclass(frozen=True, slots=True)
class Raters:
    """Mean F1 of each rater (the model, each annotator) against all others, with intervals."""

    model: Estimate
    """Against each annotator, averaged."""
    annotators: tuple[Estimate, ...]
    """Each against the other annotators and the model, averaged."""
    annotator_mean: Estimate
    """The mean of `annotators`."""
    difference: Estimate
    """model - annotator_mean, on the same resamples; significant where the interval excludes 0."""


def annotator_f1(called_N: npt.ArrayLike, label_NA: npt.ArrayLike, weights_RN: npt.NDArray[np.integer]) -> Raters:
    """The F1 protocol of CheXNet (Rajpurkar et al. 2017, arXiv 1711.05225v3, section 3).

    There is no ground truth, only raters. The model's F1 is computed against each annotator's labels and averaged;
    each annotator's against those of the other annotators and of the model. The paper's 420 images had four annotators
    and 10,000 resamples of the images: model 0.435 (0.387-0.481), annotators 0.387 (0.330-0.442).

    Args:
        called_N: the model's calls, 0 or 1.
        label_NA: the labels of A >= 2 annotators, 0 or 1; images that one of them did not label (NaN) are left out.
        weights_RN: `bootstrap_weights(image_ids, ...)` resamples images as the paper did; with patient ids it
            resamples patients.
    """
    rater = np.column_stack([np.asarray(called_N, dtype=np.float64), np.asarray(label_NA, dtype=np.float64)])
    complete = np.flatnonzero(np.isfinite(rater).all(axis=1))
    rater_NM = rater[complete]
    value_M = _mean_f1(rater_NM, np.ones((1, len(complete)), dtype=np.uint8))[0]
    value_RM = _mean_f1(rater_NM, weights_RN[:, complete])
    mean, mean_R = float(value_M[1:].mean()), value_RM[:, 1:].mean(axis=1)
    raters = tuple(interval(float(value), value_RM[:, m]) for m, value in enumerate(value_M))
    return Raters(
        raters[0],
        raters[1:],
        interval(mean, mean_R),
        interval(float(value_M[0]) - mean, value_RM[:, 0] - mean_R),
    )


def _mean_f1(rater_NM: Floats, weights_RN: npt.NDArray[np.integer]) -> Floats:
    """(R, M) each rater's mean F1 against the others; F1 = 2 both / (one + other) is symmetric."""
    raters = rater_NM.shape[1]
    both_NMM = rater_NM[:, :, None] * rater_NM[:, None, :]
    both_RMM = weighted_sums(both_NMM.reshape(len(rater_NM), -1), weights_RN).reshape(-1, raters, raters)
    called_RM = np.diagonal(both_RMM, axis1=1, axis2=2)
    f1_RMM = divide(2 * both_RMM, called_RM[:, :, None] + called_RM[:, None, :])
    others = ~np.eye(raters, dtype=bool)
    return np.asarray(f1_RMM[:, others].reshape(-1, raters, raters - 1).mean(axis=2), dtype=np.float64)

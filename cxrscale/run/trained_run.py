"""A trained run as an object: its recipe, its files, and everything that can be computed from them.

Also the Python API for what makes runs: `train` and `tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cxrscale import config
from cxrscale.config import Recipe, Threshold
from cxrscale.evaluation import (
    TestMetrics,
    Thresholds,
    artifacts,
    metrics,
    summary,
)
from cxrscale.io import read_sealed_yaml, storage, write_artifact
from cxrscale.types import Scores, UserError

# Methods import what brings torch, Ray or matplotlib: whoever only reads a run's recipe need not wait for them.
if TYPE_CHECKING:
    from cxrscale.inference import Predictor
    from cxrscale.shards import JoinedDatasets
    from cxrscale.training import RunInfo

RECIPE = "recipe.yaml"
RESAMPLES = 1000
"""Bootstrap resamples of the patients, for thresholds and for metrics."""
Progress = Callable[[int], None]
"""Called with the number of images that were scored since the last call."""


class Run:
    """A trained run: a folder or an address that `cxrscale train` has filled. `open_run` checks that it is one."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        """The folder or address."""

    def __repr__(self) -> str:
        return f"Run({self.path!r})"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rstrip("/").rpartition("/")[2]

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was trained with.

        Raises:
            UserError: the folder is not a run, or its recipe is of another version.
        """
        address = self.artifact(RECIPE)
        if not storage.exists(address):
            raise UserError(f"{address} does not exist; give the folder that `cxrscale train` printed")
        return config.parse(Recipe, read_sealed_yaml(address), where=address)

    @property
    def info(self) -> RunInfo:
        """What it was made from, its sessions, and how it stands: `info.ending` is what every command says of it.

        Raises:
            UserError: there is no run.json, or it is damaged.
        """
        from cxrscale.training import run_info

        return run_info.read_run_info(self.path)

    def artifact(self, *names: str) -> str:
        """The path or address of one of its files: run.artifact("plots", "roc.png")."""
        return storage.join(self.path, *names)

    def predictor(self, device: str | None = None) -> Predictor:
        """Its model, loaded once, for any number of images.

        Args:
            device: cpu, cuda, cuda:1, ...; None: the GPU where there is one.

        Raises:
            UserError: nothing has been trained yet, or its thresholds belong to other weights.
        """
        from cxrscale.inference import Predictor

        return Predictor(self.path, device)

    def predictions(self, split: str, progress: Progress | None = None) -> Scores:
        """Its scores of every image of a split, computed once and stored in the run.

        Args:
            split: train, val or test.

        Raises:
            UserError: nothing has been trained yet, or the datasets are missing or have changed.
        """
        from cxrscale.inference import split_scores

        return split_scores.predict_split(self.path, split, progress)

    def choose_thresholds(
        self, overrides: Sequence[str] = (), resamples: int = RESAMPLES, progress: Progress | None = None
    ) -> Thresholds:
        """Choose thresholds and fit calibrators on the validation split; writes thresholds.json and plots.

        Args:
            overrides: `threshold.field=value` over the recipe's own section.
            resamples: bootstrap resamples of the patients.

        Raises:
            UserError: an override of another section, a prior of an unknown finding, fewer than two patients, a NaN
                score.
        """
        from cxrscale.inference import refresh_contract
        from cxrscale.reporting import run_report

        scores = self._scores("val", progress)
        provenance = self.provenance("val")
        rule = _rule(provenance.recipe, overrides, scores.findings)
        weights_RN = metrics.bootstrap_weights(scores.patient, resamples, seed=0)
        thresholds = Thresholds(
            **dict(summary.choose_thresholds(scores, rule, weights_RN)),
            **dict(provenance),
            images=len(scores.image_id),
            patients=len(set(scores.patient.tolist())),
            resamples=resamples,
        )
        run_report.write_plots(self.path, run_report.threshold_plots(scores, thresholds))
        write_artifact(self.artifact(artifacts.THRESHOLDS), thresholds)
        refresh_contract(self.path, thresholds)
        return thresholds

    def evaluate(self, resamples: int = RESAMPLES, progress: Progress | None = None) -> TestMetrics:
        """Metrics of the test split at the stored thresholds, with 95% intervals; writes test_metrics.json.

        Args:
            resamples: bootstrap resamples of the patients.

        Raises:
            UserError: no thresholds yet, or they belong to other weights; the datasets have changed; fewer than two
                patients; a NaN score.
        """
        from cxrscale.inference import refresh_contract
        from cxrscale.shards import leakage

        thresholds = self.thresholds()
        scores = self._scores("test", progress)
        provenance = self.provenance("test")
        joined = leakage.join_datasets(*provenance.recipe.data.shards)
        weights_RN = metrics.bootstrap_weights(scores.patient, resamples, seed=0)
        split_metrics = summary.evaluate_scores(
            scores, thresholds, weights_RN, summary.subgroups_of(scores, joined.data)
        )
        test = TestMetrics(
            **dict(split_metrics),
            **dict(provenance),
            data=_data_info(joined, provenance.recipe),
            thresholds=storage.digest(storage.read(self.artifact(artifacts.THRESHOLDS))),
        )
        write_artifact(self.artifact(artifacts.TEST_METRICS), test)
        refresh_contract(self.path, thresholds)
        return test

    def thresholds(self) -> Thresholds:
        """What `choose_thresholds` stored.

        Raises:
            UserError: there is nothing, it is damaged or of another version, or it belongs to other weights.
        """
        from cxrscale.inference import stored_thresholds

        return stored_thresholds(self.path)

    def test_metrics(self) -> TestMetrics:
        """What `evaluate` stored.

        Raises:
            UserError: there is nothing, it is damaged or of another version, or the thresholds have changed since.
        """
        from cxrscale.reporting import run_report

        return run_report.stored_test_metrics(self.path)

    def report(self) -> str:
        """Write report.html and plots of the evaluated run; returns the page's path or address.

        Raises:
            UserError: the run has not been evaluated, or its files belong to other weights, thresholds or datasets.
        """
        from cxrscale.reporting import run_report

        return run_report.write(self.path)

    def _scores(self, split: str, progress: Progress | None) -> Scores:
        """The scores of a split, refused where no metric can be computed from them."""
        from cxrscale.inference import predictions

        scores = self.predictions(split, progress)
        metrics.require(scores, predictions.predictions_path(self.path, split))
        return scores

    def provenance(self, split: str) -> artifacts.ScoresProvenance:
        """Of the stored scores of a split.

        Raises:
            UserError: there are none.
        """
        from cxrscale.inference import predictions

        info = predictions.read_info(predictions.predictions_path(self.path, split))
        return artifacts.ScoresProvenance(
            run=storage.absolute(self.path),
            split=info.split,
            checkpoint=info.checkpoint,
            manifest=info.manifest,
            unreadable=info.unreadable,
            recipe=info.recipe,
        )


def open_run(path: str | Path) -> Run:
    """Open a trained run by its folder or address.

        run = cx.open_run("runs/chexnet14")
        run.recipe.data.findings
        run.predictor(device="cpu")("a.dcm").probabilities
        run.choose_thresholds()
        run.evaluate().mean_auroc.value

    Raises:
        UserError: it is not a run, or its recipe is of another version.
    """
    run = Run(path)
    _ = run.recipe
    return run


def _rule(recipe: Recipe, overrides: Sequence[str], findings: Sequence[str]) -> Threshold:
    for item in overrides:
        if not item.startswith("threshold."):
            raise UserError(f"override {item!r}: a trained run takes threshold.* alone, e.g. threshold.goal=recall")
    tree = config.override({"threshold": recipe.threshold.model_dump(mode="json")}, overrides)
    rule = config.parse(Recipe, tree, where="threshold").threshold
    unknown = [name for name in rule.priors if name not in findings]
    if unknown:
        raise UserError(f"threshold.priors: the run has no finding {unknown[0]!r}; it has {', '.join(findings)}")
    if rule.prior_shift == "known" and not rule.priors:
        raise UserError("threshold.prior_shift=known needs the prevalences: threshold.priors={FINDING: 0.1}")
    return rule


def _data_info(joined: JoinedDatasets, recipe: Recipe) -> artifacts.DataInfo:
    """The datasets, the images and patients of each part, and what parts share."""
    from cxrscale.loader import usable_rows
    from cxrscale.shards import leakage

    roles = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    rows = {role: usable_rows(joined.data, splits, recipe.data) for role, splits in roles.items()}
    leaks, person_N = leakage.find_leaks(joined), leakage.persons(joined)
    return artifacts.DataInfo(
        parts={
            role: artifacts.PartInfo(
                splits=splits,
                images=len(rows[role]),
                patients=len(set(person_N[rows[role]].tolist())),
            )
            for role, splits in roles.items()
        },
        datasets=tuple(
            artifacts.DatasetInfo(shards=root, source=info["source"], input=info["input"], pack=info["pack"])
            for root, info in zip(joined.roots, joined.data.metadata, strict=True)
        ),
        leaks=artifacts.LeakInfo(
            verdict=leaks.verdict,
            not_checked=leaks.not_checked,
            patients_in_two_splits=len(leaks.patients_in_two_splits),
            images_in_two_splits=len(leaks.duplicates.between_splits),
        ),
    )

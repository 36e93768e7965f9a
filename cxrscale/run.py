"""A trained run as an object: its recipe, its files, and everything that can be computed from them.

Also the Python API for what makes runs: `train` and `tune`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cxrscale import config
from cxrscale.config import Recipe, Threshold
from cxrscale.evaluation import (
    DEFAULT_MASK_RULE,
    Comparison,
    MaskRule,
    ReaderComparison,
    TestMetrics,
    Thresholds,
    artifacts,
    calls,
    comparison,
    metrics,
    reader_comparison,
    summary,
)
from cxrscale.io import read_sealed_yaml, storage, write_artifact
from cxrscale.types import Scores, UserError

# Methods import what brings torch, Ray or matplotlib: whoever only reads a run's recipe need not wait for them.
if TYPE_CHECKING:
    from cxrscale.inference import Predictor
    from cxrscale.shards import JoinedDatasets
    from cxrscale.tuning import SearchResult

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
        from cxrscale.inference import predictions

        return predictions.predict_split(self.path, split, progress)

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
        from cxrscale.reporting import run_report

        scores = self._scores("val", progress)
        provenance = self._provenance("val")
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
        return thresholds

    def evaluate(self, resamples: int = RESAMPLES, progress: Progress | None = None) -> TestMetrics:
        """Metrics of the test split at the stored thresholds, with 95% intervals; writes test_metrics.json.

        Args:
            resamples: bootstrap resamples of the patients.

        Raises:
            UserError: no thresholds yet, or they belong to other weights; the datasets have changed; fewer than two
                patients; a NaN score.
        """
        from cxrscale.shards import leakage

        thresholds = self.thresholds()
        scores = self._scores("test", progress)
        provenance = self._provenance("test")
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

    def _provenance(self, split: str) -> artifacts.ScoresProvenance:
        """Of the stored scores of a split."""
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


def compare_runs(
    run_a: Run | str | Path, run_b: Run | str | Path, split: str = "test", resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Whether two runs differ on the images of a split by more than chance; scores the split where that is yet to do.

    Masks follow each run's own mask rule, or the threshold 0.5 where it has no thresholds.json.

    Args:
        split: val or test.
        resamples: bootstrap resamples of the patients.
        seed: of the bootstrap.

    Raises:
        UserError: a folder is not a trained run, its thresholds belong to other weights, or the runs do not fit (see
            `evaluation.comparison.compare_scores`).
    """
    from cxrscale.inference import predictions

    a, b = (run if isinstance(run, Run) else Run(run) for run in (run_a, run_b))
    names = (a.name, b.name) if a.name != b.name else (a.path, b.path)
    scores_a, scores_b = a.predictions(split), b.predictions(split)
    mask_rules = _mask_rule(a), _mask_rule(b)
    result = comparison.compare_scores(scores_a, scores_b, resamples, seed, names, mask_rules)
    sides = {}
    for side, run, name in (("a", a, names[0]), ("b", b, names[1])):
        info = predictions.read_info(predictions.predictions_path(run.path, split))
        sides[side] = artifacts.ComparedRun(name=name, run=run.path, checkpoint=info.checkpoint, manifest=info.manifest)
    return result.model_copy(update={"split": split, **sides})


def compare_with_readers(
    run: Run | str | Path, tables: Sequence[str], split: str = "test", resamples: int = 2000, seed: int = 0
) -> ReaderComparison:
    """A run's calls at its thresholds against readers who labeled images of a split: F1 by the protocol of CheXNet.

    Args:
        tables: CSV tables, as `evaluation.reader_comparison.read_tables` describes them.
        split: val or test.
        resamples: bootstrap resamples of the patients.
        seed: of the bootstrap.

    Raises:
        UserError: the run has no thresholds; a table cannot be used, or fits no image or finding of the run.
    """
    from cxrscale.inference import predictions
    from cxrscale.shards import ids, manifest

    trained = run if isinstance(run, Run) else Run(run)
    readers = reader_comparison.read_tables(tables)
    thresholds, scores = trained.thresholds(), trained.predictions(split)
    called = calls.call_split(scores.logit_NF, scores.findings, thresholds)
    metadata = manifest.load(*trained.recipe.data.shards).metadata
    row_of = ids.row_finder(scores.image_id.tolist(), metadata, config.Pack())
    result = reader_comparison.compare_with_readers(scores, called, readers, row_of, resamples, seed)
    info = predictions.read_info(predictions.predictions_path(trained.path, split))
    side = artifacts.ComparedRun(
        name=trained.name, run=trained.path, checkpoint=info.checkpoint, manifest=info.manifest
    )
    return result.model_copy(update={"split": split, "run": side})


def train(recipe: Recipe | str | Path, name: str | None = None, *, local: bool = False) -> Run:
    """Train a recipe; an unfinished run of the same name is resumed.

        run = cx.train(cx.load_recipe("jobs/chexnet14.yaml", ["data.shards=[shards/nih]"]), name="first")

    Args:
        recipe: a recipe, or the path of one.
        name: of the run's folder under tracking.runs_dir; None: the recipe's, or one with the time.
        local: train in this process, without Ray.

    Raises:
        UserError: datasets, weights, the cluster or an earlier run of that name do not fit the recipe.
    """
    from cxrscale.training import launch

    resolved, stem = _named(recipe, name)
    return Run(launch.launch(resolved, stem, _no_watcher, local=local))


def tune(recipe: Recipe | str | Path, name: str | None = None) -> SearchResult:
    """Search the fields of a recipe's `tune.space`; an unfinished search of the same name is resumed.

        search = cx.tune("jobs/tune-chexnet14.yaml", name="search")
        recipe = cx.load_recipe(f"{search.run}/best.yaml")

    Args:
        recipe: a recipe, or the path of one.
        name: of the search's folder under tracking.runs_dir; None: the recipe's, or one with the time.

    Raises:
        UserError: space, datasets or cluster do not fit the recipe, or an earlier search of that name was another.
    """
    from cxrscale.reporting import tuning_page
    from cxrscale.tuning import sweep

    resolved, stem = _named(recipe, name)
    return sweep.tune(resolved, stem, _no_bar, tuning_page.write)


def _named(recipe: Recipe | str | Path, name: str | None) -> tuple[Recipe, str]:
    """The recipe with the name set, and the stem for the name of a new run."""
    stem = "run" if isinstance(recipe, Recipe) else Path(recipe).stem
    resolved = recipe if isinstance(recipe, Recipe) else config.load_recipe(recipe)
    if name is not None:
        resolved = resolved.model_copy(update={"tracking": resolved.tracking.model_copy(update={"name": name})})
    return resolved, stem


class _NoBar:
    def update(self, done: int, note: str = "") -> None:
        """Show nothing."""


@contextmanager
def _no_bar(title: str, total: int | None, unit: str | None) -> Iterator[Any]:  # noqa: ARG001 - a bar's arguments
    yield _NoBar()


@contextmanager
def _no_watcher(run: str) -> Iterator[None]:  # noqa: ARG001 - a watcher's argument
    yield


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


def _mask_rule(run: Run) -> MaskRule:
    stored = run.thresholds().mask_rule if storage.exists(run.artifact(artifacts.THRESHOLDS)) else None
    return stored or DEFAULT_MASK_RULE


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

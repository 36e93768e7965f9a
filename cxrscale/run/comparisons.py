"""Two trained runs, or a run and readers, on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cxrscale import config
from cxrscale.evaluation import (
    DEFAULT_MASK_RULE,
    Comparison,
    MaskRule,
    ReaderComparison,
    artifacts,
    calls,
    comparison,
    reader_comparison,
)
from cxrscale.io import storage
from cxrscale.run.trained_run import Run


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


def _mask_rule(run: Run) -> MaskRule:
    stored = run.thresholds().mask_rule if storage.exists(run.artifact(artifacts.THRESHOLDS)) else None
    return stored or DEFAULT_MASK_RULE

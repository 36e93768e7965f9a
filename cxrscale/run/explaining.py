"""A trained run's maps against the boxes of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cxrscale.evaluation import EXPLAIN, ExplainReport, Occlusion, Sanity, localization, metrics
from cxrscale.io import storage, write_artifact
from cxrscale.run.trained_run import RESAMPLES, Run
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.inference import Explainer
    from cxrscale.shards import Manifest

FEW_PATIENTS = 30
"""With boxes of fewer patients an interval says little."""
Progress = Callable[[str, int, int], None]
"""Called with (what is done, images since the last call, images in all)."""


def _silent(_what: str, _count: int, _total: int) -> None:
    """No progress."""


def report_path(run: str, split: str) -> str:
    """Where a run keeps what its maps of a split are worth: explain.json, of other splits than test with its name."""
    return storage.join(run, EXPLAIN if split == "test" else EXPLAIN.replace(".json", f"-{split}.json"))


def page_path(run: str, split: str) -> str:
    """The page beside `report_path`."""
    return report_path(run, split).removesuffix(".json") + ".html"


def explain_split(
    run: Run | str | Path,
    split: str = "test",
    findings: Sequence[str] = (),
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
    *,
    sanity: bool = False,
    occlusion: bool = False,
) -> ExplainReport:
    """Score a run's maps against the boxes of a split; writes explain.json and explain.html.

        cx.explain_split("runs/chexnet14").mean.map.pointing

    Args:
        split: train, val or test.
        findings: whose maps; none: all that have boxes.
        resamples: bootstrap resamples of the patients.
        sanity: also compare the maps with those of randomized weights.
        occlusion: also occlude the boxes, and as large areas elsewhere.

    Raises:
        UserError: no boxes in the split, no such finding, a run without maps, datasets that are missing or have
            changed.
    """
    from cxrscale.inference import Explainer, boxed_rows, map_tests, read_exported, read_maps
    from cxrscale.reporting import explain_page

    trained = run if isinstance(run, Run) else Run(run)
    tell = progress or _silent
    if sanity and (info := read_exported(trained.path)) is not None:
        raise UserError(f"--sanity draws weights anew, which an export does not have; give the run itself: {info.run}")
    explainer = Explainer(trained.path, findings=findings)
    data, person_N = _open(trained.path, explainer)
    boxed = boxed_rows(data, person_N, explainer.recipe, split, explainer.explained)
    found, maps, probability_N = read_maps(explainer, data, boxed, tell)
    if len({one.patient for one in found.boxed}) < 2:
        raise UserError(f"--split {split}: its boxes are of one patient; an interval needs two patients or more")
    weights_RN = metrics.bootstrap_weights([one.patient for one in found.boxed], resamples, seed=0)
    detections = [localization.detect(map_hw) for map_hw in maps]
    by_finding, mean = localization.score(detections, found.boxed, weights_RN)
    assert mean is not None
    report = ExplainReport(
        **_about(trained.path, split, explainer),
        unreadable=len(boxed.rows) - len(found.rows),
        map_size=(maps[0].shape[0], maps[0].shape[1]),
        images=len(found.rows),
        patients=mean.patients,
        boxes=mean.boxes,
        left_out=boxed.left_out,
        resamples=resamples,
        findings={name: by_finding[name] for name in explainer.explained if name in by_finding},
        without_boxes=tuple(name for name in explainer.explained if name not in by_finding),
        mean=mean,
    )
    if sanity:
        checked: Sanity = map_tests.sanity(explainer, data, found, maps, weights_RN, tell)
        report = report.model_copy(update={"sanity": checked})
    if occlusion:
        falls: Mapping[str, Occlusion] = map_tests.occlusion(explainer, data, found, weights_RN, tell)
        report = report.model_copy(update={"occlusion": falls})
    write_artifact(report_path(trained.path, split), report)
    shown = zip(found.row_N.tolist(), found.boxed, maps, detections, probability_N.tolist(), strict=True)
    examples = [explain_page.Example(*one) for one in shown]
    explain_page.write(page_path(trained.path, split), report, examples, data)
    return report


def _about(run: str, split: str, explainer: Explainer) -> dict[str, object]:
    """Whose maps these are, and of what, as fields of the report."""
    about = explainer.provenance
    return {
        "run": storage.absolute(run),
        "split": split,
        "checkpoint": about.checkpoint,
        "manifest": about.manifest,
        "recipe": explainer.recipe,
        "method": explainer.method,
    }


def _open(run: str, explainer: Explainer) -> tuple[Manifest, npt.NDArray[np.object_]]:
    """The run's datasets, and the person in each of their images."""
    from cxrscale.shards import leakage

    roots = explainer.recipe.data.shards
    joined = leakage.join_datasets(*roots)
    if joined.data.digest != explainer.provenance.manifest:
        raise UserError(f"{', '.join(roots)}: not the shards that {run} was trained on; restore them")
    return joined.data, leakage.persons(joined)

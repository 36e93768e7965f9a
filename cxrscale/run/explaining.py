"""A trained run's maps against the boxes of a split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cxrscale.config import Recipe
from cxrscale.evaluation import EXPLAIN, ExplainReport, Occlusion, Sanity, localization, metrics
from cxrscale.evaluation.localization import BoxedFinding
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


@dataclass(frozen=True, slots=True)
class BoxedRows:
    """Every finding of every image of a split that has boxes of it."""

    row_N: npt.NDArray[np.int64]
    """Of the manifest, ascending."""
    boxed: tuple[BoxedFinding, ...]
    """N."""
    left_out: int
    """Boxes without area inside their image."""

    @property
    def rows(self) -> list[int]:
        """The images, each once."""
        return sorted(set(self.row_N.tolist()))

    def only(self, chosen: Sequence[int]) -> BoxedRows:
        """Some of them."""
        return BoxedRows(self.row_N[list(chosen)], tuple(self.boxed[n] for n in chosen), self.left_out)


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
    from cxrscale.inference import Explainer
    from cxrscale.reporting import explain_page
    from cxrscale.run import map_tests

    trained = run if isinstance(run, Run) else Run(run)
    tell = progress or _silent
    explainer = Explainer(trained.path, findings=findings)
    data, person_N = _open(trained.path, explainer)
    boxed = boxed_rows(data, person_N, explainer.recipe, split, explainer.explained)
    found, maps, probability_N = _maps(explainer, data, boxed, tell)
    if len({one.patient for one in found.boxed}) < 2:
        raise UserError(f"--split {split}: its boxes are of one patient; an interval needs two patients or more")
    weights_RN = metrics.bootstrap_weights([one.patient for one in found.boxed], resamples, seed=0)
    detections = [localization.detect(map_hw) for map_hw in maps]
    by_finding, mean = localization.score(detections, found.boxed, weights_RN)
    assert mean is not None
    report = ExplainReport(
        run=storage.absolute(trained.path),
        split=split,
        checkpoint=explainer.provenance.checkpoint,
        manifest=explainer.provenance.manifest,
        unreadable=len(boxed.rows) - len(found.rows),
        recipe=explainer.recipe,
        method=explainer.method,
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
    examples = [
        explain_page.Example(int(row), boxed_finding, map_hw, detection, float(probability))
        for row, boxed_finding, map_hw, detection, probability in zip(
            found.row_N, found.boxed, maps, detections, probability_N, strict=True
        )
    ]
    explain_page.write(page_path(trained.path, split), report, examples, data)
    return report


def boxed_rows(
    data: Manifest, person_N: npt.NDArray[np.object_], recipe: Recipe, split: str, findings: Sequence[str]
) -> BoxedRows:
    """The boxes of a split.

    Raises:
        UserError: there are none of these findings, or the datasets do not know their boxes.
    """
    from cxrscale.loader import usable_rows

    names = {"train": recipe.data.train_split, "val": recipe.data.val_split, "test": recipe.data.test_split}
    if split not in names:
        raise UserError(f"--split {split}: give train, val or test")
    if not data.has_boxes:
        raise UserError(
            f"{', '.join(recipe.data.shards)}: no boxes in the manifest; datasets of earlier versions and sources "
            "without boxes have none: `cxrscale shard` again from NIH or RSNA"
        )
    rows, boxed, left_out = [], [], 0
    for row in usable_rows(data, names[split], recipe.data).tolist():
        given = data.boxes(row)
        height, width = data.table["height"][row].as_py(), data.table["width"][row].as_py()
        for finding in findings:
            own = [box for box in given if box.finding == finding]
            truth_K4 = localization.shares(own, width, height)
            left_out += len(own) - len(truth_K4)
            if len(truth_K4):
                rows.append(row)
                boxed.append(BoxedFinding(finding, str(person_N[row]), truth_K4))
    if not rows:
        raise UserError(
            f"--split {split}: no image has a box of {', '.join(findings)}; NIH has boxes in its official test list "
            "alone, RSNA in every split"
        )
    return BoxedRows(np.array(rows, dtype=np.int64), tuple(boxed), left_out)


def _open(run: str, explainer: Explainer) -> tuple[Manifest, npt.NDArray[np.object_]]:
    """The run's datasets, and the person in each of their images."""
    from cxrscale.shards import leakage

    roots = explainer.recipe.data.shards
    joined = leakage.join_datasets(*roots)
    if joined.data.digest != explainer.provenance.manifest:
        raise UserError(f"{', '.join(roots)}: not the shards that {run} was trained on; restore them")
    return joined.data, leakage.persons(joined)


def _maps(
    explainer: Explainer, data: Manifest, boxed: BoxedRows, tell: Progress
) -> tuple[BoxedRows, list[npt.NDArray[np.float32]], npt.NDArray[np.float64]]:
    """What of the boxed findings could be read, and the map and probability of each. Large score maps are reduced to
    the grid that boxes are drawn on: a thousand of 1024 x 1024 would take 4 GB."""
    by_row: dict[int, list[int]] = {}
    for n, row in enumerate(boxed.row_N.tolist()):
        by_row.setdefault(row, []).append(n)
    maps: dict[int, npt.NDArray[np.float32]] = {}
    probabilities: dict[int, float] = {}
    rows = boxed.rows
    tell("maps", 0, len(rows))
    for mapped in explainer.rows(data, rows, lambda count: tell("maps", count, len(rows))):
        for n in by_row[mapped.row]:
            finding = boxed.boxed[n].finding
            maps[n] = localization.reduced(mapped.maps[finding])
            probabilities[n] = mapped.probabilities[finding]
    kept = sorted(maps)
    if not kept:
        raise UserError(f"none of the {len(rows)} images with boxes could be read; run `cxrscale verify`")
    return boxed.only(kept), [maps[n] for n in kept], np.array([probabilities[n] for n in kept])


def _silent(_what: str, _count: int, _total: int) -> None:
    """No progress."""

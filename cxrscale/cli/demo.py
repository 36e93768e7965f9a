"""The whole way on an archive of its own making: what `make demo` runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cxrscale import config
from cxrscale.cli import progress
from cxrscale.evaluation.artifacts import TEST_METRICS
from cxrscale.io import storage
from cxrscale.reporting import audit_page, run_report
from cxrscale.run import choose_run_thresholds, evaluate_run
from cxrscale.shards import audit, build, manifest
from cxrscale.sources.synthetic import archive
from cxrscale.training import launch, run_info
from cxrscale.types import UserError

IMAGES = 600
"""Images of the demo's synthetic archive."""
SIZE = 160
"""Side of the demo's stored images in pixels."""


def run_demo(out: Path, images: int = IMAGES, *, local: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Draw, shard, audit, train, threshold and evaluate; yields (run folder, metrics.json) of each of the two models.

    Everything lies under `out`; a demo that was interrupted goes on, one that is finished only reports.
    """
    jobs = Path(__file__).resolve().parent.parent / "jobs"
    if not jobs.is_dir():
        raise UserError(f"{jobs} is not there: run the demo from a checkout of cxrscale")
    with progress.bar("drawing the synthetic archive", images, "images") as shown:
        drawn = archive.write(str(out / "archive"), images=images, progress=lambda n: shown.to(shown.done + n))
    nih, siim = str(out / "shards" / "nih"), str(out / "shards" / "siim")
    settings = config.Pack(size=SIZE, samples_per_shard=100)
    print(f"sharding {drawn.nih} and {drawn.siim}")
    build.build("nih", str(drawn.nih), settings, nih, local=local)
    masked = settings.model_copy(update={"masks": True})
    build.build("siim", str(drawn.siim), masked, siim, patients_from_dataset=nih, local=local)
    for shards in (nih, siim):
        found = audit.audit(shards)
        audit_page.write(found, [shards], str(out / f"audit-{Path(shards).name}.html"))
        crossing = len(found["patients_in_two_splits"])
        print(f"{shards}: {found['images']} images, splits {found['splits']}, {crossing} patients in two splits")
    for stem, shards in (("demo", nih), ("demo-unet", siim)):
        trained = _train(jobs / f"{stem}.yaml", shards, out, local)
        metrics = storage.join(trained, TEST_METRICS)
        if not storage.exists(metrics):
            choose_run_thresholds(trained)
            evaluate_run(trained)
            run_report.write(trained)
        yield trained, json.loads(storage.read(metrics))


def _train(path: Path, shards: str, out: Path, local: bool) -> str:
    digest = manifest.load(shards).digest[:8]
    overrides = [f"data.shards=[{shards}]", f"tracking.runs_dir={out / 'runs'}", f"tracking.name={path.stem}-{digest}"]
    recipe = config.load_recipe(path, overrides)
    trained = str(out.resolve() / "runs" / f"{path.stem}-{digest}")
    about = storage.join(trained, run_info.RUN_INFO)
    if storage.exists(about) and json.loads(storage.read(about))["finished"]:
        return trained
    return launch.launch(recipe, path.stem, progress.watch_run, local=local)

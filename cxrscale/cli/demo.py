"""The whole way on an archive of its own making: what `make demo` runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cxrscale import config
from cxrscale.cli import progress
from cxrscale.evaluation import TestMetrics, artifacts
from cxrscale.io import storage
from cxrscale.reporting import audit_page
from cxrscale.run import Run
from cxrscale.shards import audit, build, manifest
from cxrscale.sources import synthetic
from cxrscale.training import launch, run_info
from cxrscale.types import UserError

IMAGES = 1600
"""Images of the demo's synthetic archive: a quarter is for testing, and each finding has boxes in a fifth of that."""
SIZE = 160
"""Side of the demo's stored images in pixels."""


def run_demo(out: Path, images: int = IMAGES, *, local: bool = False) -> Iterator[tuple[Run, TestMetrics]]:
    """Draw, shard, audit, train, threshold and evaluate; yields (run, test metrics) of each of the two models.

    Everything lies under `out`; an interrupted demo is resumed, a finished one only reports.
    """
    jobs = Path(__file__).resolve().parents[2] / "jobs"
    if not jobs.is_dir():
        raise UserError(f"{jobs} is not there: run the demo from a checkout of cxrscale")
    with progress.bar("drawing synthetic data", images, "images") as bar:
        drawn = synthetic.archive.write(
            str(out / "synthetic"), images=images, progress=lambda n: bar.update(bar.done + n)
        )
    nih, siim = str(out / "shards" / "nih"), str(out / "shards" / "siim")
    # Nobody is in it: its own ids give the same order of images, and so the same figures, to everyone.
    settings = config.Pack(size=SIZE, samples_per_shard=100, patient_ids="original")
    print(f"sharding {drawn.nih} and {drawn.siim}")
    build.build_shards("nih", str(drawn.nih), settings, nih, local=local)
    masked = settings.model_copy(update={"masks": True})
    build.build_shards("siim", str(drawn.siim), masked, siim, patients_from_dataset=nih, local=local)
    for shards in (nih, siim):
        result = audit.audit(shards)
        audit_page.write(result, str(out / f"audit-{Path(shards).name}.html"))
        overlapping = len(result.leaks.patients_in_two_splits)
        print(f"{shards}: {result.images} images, splits {dict(result.splits)}, {overlapping} patients in two splits")
    for stem, shards in (("demo", nih), ("demo-unet", siim)):
        run = Run(_train(jobs / f"{stem}.yaml", shards, out, local))
        if not storage.exists(run.artifact(artifacts.TEST_METRICS)):
            run.choose_thresholds()
            run.evaluate()
            run.report()
        yield run, run.test_metrics()


def _train(path: Path, shards: str, out: Path, local: bool) -> str:
    digest = manifest.load(shards).digest[:8]
    overrides = [f"data.shards=[{shards}]", f"tracking.runs_dir={out / 'runs'}", f"tracking.name={path.stem}-{digest}"]
    recipe = config.load_recipe(path, overrides)
    trained = str(out.resolve() / "runs" / f"{path.stem}-{digest}")
    if storage.exists(storage.join(trained, run_info.RUN_INFO)) and run_info.read_run_info(trained).finished:
        return trained
    return launch.launch(recipe, path.stem, progress.watch_run, local=local)

"""The command line: one short function a command; each prints its artifact's path last."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from cxrscale import __version__, config
from cxrscale.cli import progress
from cxrscale.config import Recipe
from cxrscale.io import storage
from cxrscale.reporting import tables
from cxrscale.types import UserError

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.

DEFAULTS: dict[str, dict[str, object]] = {"siim": {"masks": True}, "kermany": {"repeats": "merge"}}
"""What sharding an archive sets unless told otherwise: SIIM is for its masks; Kermany holds some files twice."""


class Verbs(TyperGroup):
    """Turns a user's mistake into one line and exit code 2, and Ctrl-C into what to do next."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except Exception as error:
            # Only here: a worker whose bucket is away for a while is to fail and be started again.
            if not storage.unreachable(error):
                raise
            said = " ".join(str(error).split())
            print(f"error: {said}; check the network, AWS_ENDPOINT_URL and the credentials", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("stopped; the same command goes on from what is finished", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Chest X-rays from raw archives to honest metrics. Every command prints the path of what it made last.",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. optim.lr=3e-4", metavar="A.B=C")]
Local = Annotated[bool, typer.Option("--local", help="In this very process, without Ray: breakpoints work.")]
Run = Annotated[str, typer.Argument(help="A run's folder, as `cxrscale train` printed it.")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)]
RecipePath = Annotated[str, typer.Argument(help="A recipe of jobs/, or your own.", metavar="RECIPE")]


@app.command("demo")
def demo_verb(
    out: Annotated[Path, typer.Option(help="Where the synthetic archive, shards and runs go.")] = Path("runs/demo"),
    local: Local = False,
) -> None:
    """Make a synthetic archive and take it the whole way: shards, audit, two models, thresholds, test metrics."""
    from cxrscale.cli import demo

    for run, found in demo.run_demo(out, local=local):
        tables.print_metrics(found, run)
        print(f"artifacts: {run}")
    print(out.resolve())


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="The archive's kind: nih, siim, rsna or kermany.")],
    root: Annotated[str, typer.Argument(help="The archive's folder.")],
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="Where the dataset goes.")] = "shards",
    duplicates: Annotated[
        str | None, typer.Option(help="A dataset with the same images under their true patients (NIH, for SIIM).")
    ] = None,
    local: Local = False,
) -> None:
    """Pack a raw archive into verified shards: cxrscale shard nih /data/nih --out shards/nih pack.size=512."""
    from cxrscale.shards import build

    tree = config.override({"pack": DEFAULTS.get(source, {})}, overrides or [])
    settings = config.parse(Recipe, tree, where="shard").pack
    total = [0, 0]
    with progress.bar(f"sharding {source}", None, "images") as shown:

        def finished(images: int, quarantined: int, planned: int) -> None:
            shown.expect(planned)
            total[0] += images
            total[1] += quarantined
            shown.to(total[0], f"{total[1]} quarantined")

        packed = build.build(
            source, root, settings, out, patients_from_dataset=duplicates, local=local, progress=finished
        )
    state = "" if packed.fresh else ", all of it from an earlier run"
    print(f"{packed.images} images, {packed.quarantined} quarantined{state}")
    print(packed.root if storage.is_remote(packed.root) else Path(packed.root).resolve())
    if packed.quarantined > settings.max_quarantined:
        listed = storage.join(packed.root, "quarantine.jsonl")
        raise UserError(f"{packed.quarantined} unreadable images, more than pack.max_quarantined; see {listed}")


@app.command("verify")
def verify_verb(root: Annotated[str, typer.Argument(help="A dataset.")]) -> None:
    """Re-read every byte of a dataset and hold it against its manifest."""
    from cxrscale.shards import verify

    with progress.bar(f"verifying {root}", None, "images") as shown:
        wrong = verify.verify(root, lambda count: shown.to(shown.done + count))
    for line in wrong:
        print(line)
    if wrong:
        raise UserError(f"{root}: {len(wrong)} faults; remove the damaged tars and the manifest, then shard again")
    print(root)


@app.command()
def audit(
    shards: Annotated[list[str], typer.Argument(help="One or more datasets that are meant to be used together.")],
    out: Annotated[str, typer.Option(help="The page; the JSON goes beside it.")] = "audit.html",
) -> None:
    """Count findings, splits, people, pixels and masks; name the patients and images that splits or sets share."""
    from cxrscale.reporting import audit_page
    from cxrscale.shards import audit as auditing

    found = auditing.audit(*shards)
    table = Table(title=f"{found['images']} images of {found['patients']} patients")
    names = list(found["splits"])
    for heading in ("present", *names):
        table.add_column(heading, justify="right" if heading != "present" else "left")
    for finding, states in found["findings"].items():
        table.add_row(finding, *(str(states[name]["present"]) for name in names))
    table.add_row("all images", *(str(found["splits"][name]) for name in names), style="bold")
    Console().print(table)
    print(f"{len(found['quarantined'])} quarantined, {len(found['patients_in_two_splits'])} patients in two splits")
    for line in found["not_checked"]:
        print(f"not checked: {line}")
    for line in found["verdict"]:
        print(line)
    page = audit_page.write(found, shards, out)
    print(page if storage.is_remote(page) else Path(page).resolve())


@app.command("batches")
def batches_verb(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The page.")] = "batches.html",
) -> None:
    """Look before you train: images as the model will see them, and the first epoch's sampling against its plan."""
    from cxrscale.reporting import batch_preview

    resolved = config.load_recipe(recipe, overrides or [])
    for line in batch_preview.write(resolved, Path(recipe).stem, out):
        print(line)
    print(out if storage.is_remote(out) else Path(out).resolve())


@app.command("ablation")
def ablation_verb(
    recipe: RecipePath,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(help="How many training images.", min=4)] = 100,
    epochs: Annotated[int, typer.Option(help="The most passes over them.", min=1)] = 30,
) -> None:
    """Start here: can the set-up learn at all? Few images, no augmentation; it must learn them by heart.

    Ends with a verdict, and where it fails with what to try; the exit code is 0 or 1. The learning curve is a PNG.
    """
    from cxrscale.training import overfit

    resolved = config.load_recipe(recipe, overrides or [])
    with progress.bar("ablation", None, "steps") as shown:

        def told(done: int, total: int, note: str) -> None:
            shown.expect(total)
            shown.to(done, note)

        address = overfit.overfit(resolved, Path(recipe).stem, images, epochs, told)
    found = json.loads(storage.read(address))
    print(found["verdict"])
    if found["diagnosis"]:
        print(found["diagnosis"])
    print(storage.absolute(address))
    if not found["passed"]:
        raise typer.Exit(1)


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None, local: Local = False) -> None:
    """Train a recipe: cxrscale train jobs/chexnet14.yaml data.shards=[shards/nih] scaling.num_workers=2."""
    from cxrscale.training import launch, run_info

    resolved = config.load_recipe(recipe, overrides or [])
    run = launch.launch(resolved, Path(recipe).stem, progress.watch_run, local=local)
    if not run_info.read_run_info(run)["finished"]:
        name = run.rsplit("/", 1)[-1]
        print(f"stopped with a checkpoint; go on with tracking.name={name}", file=sys.stderr)
    print(run)


@app.command("tune")
def tune_verb(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the search of this name.", metavar="NAME")] = None,
) -> None:
    """Search the fields in a recipe's tune.space, such as optim.lr: loguniform(1e-4, 1e-2); leaves best.yaml."""
    from cxrscale.tuning import results, search_space, sweep

    resolved = config.load_recipe(recipe, overrides or [])
    resolved = sweep.resumed(resolved, resume) if resume else resolved
    ended = sweep.tune(resolved, Path(recipe).stem, progress.bar)
    if not ended.finished:
        name = ended.run.rsplit("/", 1)[-1]
        print(f"stopped; go on with: cxrscale tune {recipe} --resume {name}", file=sys.stderr)
        raise typer.Exit(130)
    results.print_results(ended.run, resolved, search_space.parse_space(resolved.tune.space))
    print(ended.verdict)
    print(storage.join(ended.run, "tune.html"))
    print(ended.run)


@app.command()
def threshold(run: Run, overrides: Overrides = None, resamples: Resamples = 1000) -> None:
    """Choose thresholds on validation: cxrscale threshold RUN threshold.goal=recall threshold.min_rate=0.9.

    Goals: f1, youden, recall, precision, cost, fixed. threshold.calibration=platt|temperature|isotonic also makes
    probabilities of the scores. The test split is not looked at.
    """
    from cxrscale.run import choose_run_thresholds

    with progress.bar("scoring validation", None, "images") as shown:
        path = choose_run_thresholds(run, overrides or [], resamples, lambda count: shown.to(shown.done + count))
    tables.print_thresholds(json.loads(storage.read(path)), run)
    print(storage.absolute(path))


@app.command("evaluate")
def evaluate_verb(run: Run, resamples: Resamples = 1000) -> None:
    """Metrics of the test split at the stored thresholds, with 95% intervals: metrics.json, plots/, report.html."""
    from cxrscale.reporting import run_report
    from cxrscale.run import evaluate_run

    with progress.bar("scoring test", None, "images") as shown:
        path = evaluate_run(run, resamples, lambda count: shown.to(shown.done + count))
    tables.print_metrics(json.loads(storage.read(path)), run)
    print(storage.absolute(path))
    print(storage.absolute(run_report.write(run)))


@app.command("compare")
def compare_verb(
    run_a: Annotated[str, typer.Argument(help="A run's folder.", metavar="RUN_A")],
    run_b: Annotated[str, typer.Argument(help="Another's, over the same shards.", metavar="RUN_B")],
    split: Annotated[str, typer.Option(help="The split that both are scored on: val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)] = 2000,
    out: Annotated[str, typer.Option(help="The file of differences.")] = "compare.json",
) -> None:
    """Is one run better than another, or is it chance? AUROC and Dice as A - B on the same images.

    Intervals and p-values count patients, not images; 'Holm' adjusts for the number of findings.
    """
    from cxrscale import run as runs
    from cxrscale.evaluation import comparison

    found = runs.compare_runs(run_a, run_b, split, resamples)
    tables.print_comparison(found)
    for side, name in (("a", found["a"]["name"]), ("b", found["b"]["name"])):
        if found[f"only_in_{side}"]:
            print(f"only in {name}, not compared: {', '.join(found[f'only_in_{side}'])}")
    print(storage.absolute(comparison.write(found, out)))


@app.command("predict")
def predict_verb(
    run: Annotated[str, typer.Option(help="The run whose best checkpoint predicts.")],
    files: Annotated[list[str] | None, typer.Argument(help="DICOM, PNG or JPEG files.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test: the run's own images, into RUN/predictions-SPLIT.parquet.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file of predictions.")] = Path("predictions.json"),
) -> None:
    """Probabilities for image files (predict a.dcm b.png --run runs/NAME) or of a split (--split train)."""
    from cxrscale.evaluation import MaskRule
    from cxrscale.evaluation.artifacts import THRESHOLDS
    from cxrscale.inference import predictions, provenance, stored_thresholds

    if (split is None) == (not files):
        raise UserError("predict takes either files or --split train|val|test")
    if split is not None:
        predictions.predict_split(run, split)
        print(storage.absolute(storage.join(run, f"predictions-{split}.parquet")))
        return
    files = files or []
    rule = None
    if storage.exists(storage.join(run, THRESHOLDS)):
        stored = stored_thresholds(run)
        rule = MaskRule(**stored["triplet"]) if "triplet" in stored else None
    found = predictions.predict_files(run, files, rule)
    for prediction in found:
        print(prediction.path)
        for name, value in prediction.scores.items():
            print(f"  {name:<20} {value:.4f}")
        if prediction.error:
            print(f"  not read: {prediction.error}")
    listed = [{key: value for key, value in asdict(p).items() if value} for p in found]
    storage.write(str(out), json.dumps({"predictions": listed, **provenance(run)}, indent=2) + "\n")
    print(out.resolve())
    if all(prediction.error for prediction in found):
        raise UserError("none of the files could be read; the reasons stand above")


@app.command("doctor")
def doctor_verb(
    address: Annotated[
        str | None, typer.Option(help="A cluster, host:6379; else RAY_ADDRESS, else this machine.")
    ] = None,
    shards: Annotated[list[str] | None, typer.Option(help="A dataset that every node must read.")] = None,
    root: Annotated[str | None, typer.Option(help="Where runs will go.")] = None,
    free_orphans: Annotated[
        bool, typer.Option("--free-orphans", help="Remove what killed sweeps left waiting in the cluster.")
    ] = False,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write it as JSON.")] = None,
) -> None:
    """What this machine or cluster can do, and what to mend; exit code 1 where something is wrong."""
    from cxrscale.cluster import doctor

    rows, said = doctor.examine(address, shards or [], root, free_orphans)
    doctor.show(rows)
    if out is not None:
        doctor.write(rows, said, out)
        print(storage.absolute(out))
    if any(row.verdict == doctor.WRONG for row in rows):
        raise typer.Exit(1)


@app.command("submit", context_settings={"ignore_unknown_options": True})
def submit_verb(
    words: Annotated[
        list[str] | None, typer.Argument(help="Any command and what it takes.", metavar="VERB ARGS...")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="The head's dashboard, http://HEAD:8265; else RAY_API_SERVER_ADDRESS.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The job's id; else Ray makes one.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the id and leave; the job goes on.")] = False,
    follow: Annotated[str | None, typer.Option(metavar="ID", help="Watch a job that was submitted before.")] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Pass a variable on, NAME or NAME=VALUE; no secrets.")
    ] = None,
    working_dir: Annotated[Path, typer.Option(help="The checkout; it becomes the job's folder.")] = Path(),
    installed: Annotated[bool, typer.Option("--installed", help="The image has cxrscale: ship recipes alone.")] = False,
) -> None:
    """Run any command as a job on a Ray cluster and follow it: cxrscale submit train jobs/chexnet14.yaml --address URL.

    The exit code is the job's. Ctrl-C asks whether to stop the job (it writes a checkpoint) or only to stop watching.
    """
    from cxrscale.cluster import jobs

    if follow is None:
        shipment = jobs.JobSpec(working_dir, installed, tuple(env or ()), name)
        follow = jobs.submit(words or [], shipment, address)
        if detach:
            print(jobs.how_to_follow(jobs.connect(address), follow), file=sys.stderr)
            print(follow)
            return
        print(f"job {follow}", file=sys.stderr)
    raise typer.Exit(jobs.follow(jobs.connect(address), follow))


@app.command("config")
def config_verb(
    recipe: Annotated[str | None, typer.Argument(help="A recipe; without one, the defaults.", metavar="RECIPE")] = None,
    overrides: Overrides = None,
    help_fields: Annotated[bool, typer.Option("--help-fields", help="List every field with its meaning.")] = False,
) -> None:
    """Print the resolved recipe, every field of it, as `train` would see it."""
    if help_fields:
        for name, sentence in config.fields(Recipe).items():
            print(f"{name}\n    {sentence}")
        return
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        resolved = config.parse(Recipe, config.override({}, [recipe, *(overrides or [])]), where="defaults")
    else:
        resolved = config.load_recipe(recipe, overrides or []) if recipe else Recipe()
    print(config.to_yaml(resolved), end="")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    app()

"""The command line: one short function a verb; each prints its artifact's path last."""

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

from cxrscale import __version__, config, progress, report, storage
from cxrscale.config import Recipe
from cxrscale.schema import InputError

# Each verb imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.

DEFAULTS: dict[str, dict[str, object]] = {"siim": {"masks": True}, "kermany": {"repeats": "unite"}}
"""What sharding an archive sets unless told otherwise: SIIM is for its masks; Kermany holds some files twice."""


class Verbs(TyperGroup):
    """Turns a user's mistake into one line and exit code 2, and Ctrl-C into what to do next."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except InputError as error:
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
    help="Chest X-rays from raw archives to honest metrics. Every verb prints the path of what it made last.",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value, e.g. optim.lr=3e-4", metavar="A.B=C")]
Local = Annotated[bool, typer.Option("--local", help="In this very process, without Ray: breakpoints work.")]
Run = Annotated[str, typer.Argument(help="A run's folder, as `cxrscale train` printed it.")]
Resamples = Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)]
RecipePath = Annotated[str, typer.Argument(help="A recipe of jobs/, or your own.", metavar="RECIPE")]


@app.command("demo")
def demo_verb(
    out: Annotated[Path, typer.Option(help="Where the phantom archive, shards and runs go.")] = Path("runs/demo"),
    local: Local = False,
) -> None:
    """Make a phantom archive and take it the whole way: shards, audit, two nets, thresholds, test metrics."""
    from cxrscale import demo

    for run, found in demo.run(out, local=local):
        report.show(found, run)
        print(f"artifacts: {run}")
    print(out.resolve())


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="The archive's kind: nih, siim, rsna or kermany.")],
    root: Annotated[str, typer.Argument(help="The archive's folder.")],
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="Where the shard set goes.")] = "shards",
    twins: Annotated[
        str | None, typer.Option(help="A shard set with the same pictures under their true patients (NIH, for SIIM).")
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

        packed = build.build(source, root, settings, out, twins_of=twins, local=local, progress=finished)
    state = "" if packed.fresh else ", all of it from an earlier run"
    print(f"{packed.images} pictures, {packed.quarantined} quarantined{state}")
    print(packed.root if storage.is_remote(packed.root) else Path(packed.root).resolve())
    if packed.quarantined > settings.max_quarantined:
        listed = storage.join(packed.root, "quarantine.jsonl")
        raise InputError(f"{packed.quarantined} unreadable pictures, more than pack.max_quarantined; see {listed}")


@app.command("verify")
def verify_verb(root: Annotated[str, typer.Argument(help="A shard set.")]) -> None:
    """Re-read every byte of a shard set and hold it against its manifest."""
    from cxrscale.shards import verify

    with progress.bar(f"verifying {root}", None, "images") as shown:
        wrong = verify.verify(root, lambda count: shown.to(shown.done + count))
    for line in wrong:
        print(line)
    if wrong:
        raise InputError(f"{root}: {len(wrong)} faults; remove the damaged tars and the manifest, then shard again")
    print(root)


@app.command()
def audit(
    shards: Annotated[list[str], typer.Argument(help="One or more shard sets that are meant to be used together.")],
    out: Annotated[str, typer.Option(help="The page; the JSON goes beside it.")] = "audit.html",
) -> None:
    """Count findings, splits, people, pixels and masks; name the patients and pictures that splits or sets share."""
    from cxrscale.shards import audit as auditing
    from cxrscale.shards import audit_page

    found = auditing.audit(*shards)
    table = Table(title=f"{found['pictures']} pictures of {found['patients']} patients")
    names = list(found["splits"])
    for heading in ("present", *names):
        table.add_column(heading, justify="right" if heading != "present" else "left")
    for finding, states in found["findings"].items():
        table.add_row(finding, *(str(states[name]["present"]) for name in names))
    table.add_row("all pictures", *(str(found["splits"][name]) for name in names), style="bold")
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
    """Look before you train: pictures as the net will see them, and the first epoch's sampling against its plan."""
    from cxrscale.batches import sheet

    resolved = config.load_recipe(recipe, overrides or [])
    for line in sheet.write(resolved, Path(recipe).stem, out):
        print(line)
    print(out if storage.is_remote(out) else Path(out).resolve())


@app.command("ablation")
def ablation_verb(
    recipe: RecipePath,
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(help="How many training pictures.", min=4)] = 100,
    epochs: Annotated[int, typer.Option(help="The most passes over them.", min=1)] = 30,
) -> None:
    """Start here: can the set-up learn at all? Few pictures, no augmentation; it must learn them by heart.

    Ends with a verdict, and where it fails with what to try; the exit code is 0 or 1. The learning curve is a PNG.
    """
    from cxrscale import ablation

    resolved = config.load_recipe(recipe, overrides or [])
    with progress.bar("ablation", None, "steps") as shown:

        def told(done: int, total: int, note: str) -> None:
            shown.expect(total)
            shown.to(done, note)

        address = ablation.ablation(resolved, Path(recipe).stem, images, epochs, told)
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
    from cxrscale import account, launch

    resolved = config.load_recipe(recipe, overrides or [])
    run = launch.launch(resolved, Path(recipe).stem, progress.watch, local=local)
    if not account.read(run)["finished"]:
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
    from cxrscale.tune import space, sweep, table

    resolved = config.load_recipe(recipe, overrides or [])
    resolved = sweep.resumed(resolved, resume) if resume else resolved
    ended = sweep.tune(resolved, Path(recipe).stem, progress.bar)
    if not ended.finished:
        name = ended.run.rsplit("/", 1)[-1]
        print(f"stopped; go on with: cxrscale tune {recipe} --resume {name}", file=sys.stderr)
        raise typer.Exit(130)
    table.show(ended.run, resolved, space.parse(resolved.tune.space))
    print(ended.verdict)
    print(storage.join(ended.run, "tune.html"))
    print(ended.run)


@app.command()
def threshold(run: Run, overrides: Overrides = None, resamples: Resamples = 1000) -> None:
    """Choose thresholds on validation: cxrscale threshold RUN threshold.goal=recall threshold.at_least=0.9.

    Goals: f1, youden, recall, precision, cost, fixed. threshold.calibration=platt|temperature|isotonic also makes
    probabilities of the scores. The test split is not looked at.
    """
    from cxrscale import evaluate

    with progress.bar("scoring validation", None, "images") as shown:
        path = evaluate.threshold(run, overrides or [], resamples, lambda count: shown.to(shown.done + count))
    report.show_thresholds(json.loads(storage.read(path)), run)
    print(storage.absolute(path))


@app.command("evaluate")
def evaluate_verb(run: Run, resamples: Resamples = 1000) -> None:
    """Metrics of the test split at the stored thresholds, with 95% intervals: metrics.json, plots/, report.html."""
    from cxrscale import evaluate, report_page

    with progress.bar("scoring test", None, "images") as shown:
        path = evaluate.evaluate(run, resamples, lambda count: shown.to(shown.done + count))
    report.show(json.loads(storage.read(path)), run)
    print(storage.absolute(path))
    print(storage.absolute(report_page.write(run)))


@app.command("compare")
def compare_verb(
    run_a: Annotated[str, typer.Argument(help="A run's folder.", metavar="RUN_A")],
    run_b: Annotated[str, typer.Argument(help="Another's, over the same shards.", metavar="RUN_B")],
    split: Annotated[str, typer.Option(help="The split that both are scored on: val or test.")] = "test",
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of the patients.", min=2)] = 2000,
    out: Annotated[str, typer.Option(help="The file of differences.")] = "compare.json",
) -> None:
    """Is one run better than another, or is it chance? AUROC and Dice as A - B on the same pictures.

    Intervals and p-values count patients, not pictures; 'Holm' adjusts for the number of findings.
    """
    from cxrscale import compare

    found = compare.runs(run_a, run_b, split, resamples)
    report.show_differences(found)
    for side, name in (("a", found["a"]["name"]), ("b", found["b"]["name"])):
        if found[f"only_in_{side}"]:
            print(f"only in {name}, not compared: {', '.join(found[f'only_in_{side}'])}")
    print(storage.absolute(compare.write(found, out)))


@app.command("predict")
def predict_verb(
    run: Annotated[str, typer.Option(help="The run whose best checkpoint predicts.")],
    files: Annotated[list[str] | None, typer.Argument(help="DICOM, PNG or JPEG files.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, val or test: the run's own pictures, into RUN/predictions-SPLIT.parquet.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The file of predictions.")] = Path("predictions.json"),
) -> None:
    """Probabilities for picture files (predict a.dcm b.png --run runs/NAME) or of a split (--split train)."""
    from cxrscale import evaluate, predict
    from cxrscale.thresholds import Triplet

    if (split is None) == (not files):
        raise InputError("predict takes either files or --split train|val|test")
    if split is not None:
        predict.split(run, split)
        print(storage.absolute(storage.join(run, f"predictions-{split}.parquet")))
        return
    files = files or []
    rule = None
    if storage.exists(storage.join(run, evaluate.THRESHOLDS)):
        stored = evaluate.stored_thresholds(run)
        rule = Triplet(**stored["triplet"]) if "triplet" in stored else None
    found = predict.files(run, files, rule)
    for prediction in found:
        print(prediction.path)
        for name, value in prediction.scores.items():
            print(f"  {name:<20} {value:.4f}")
        if prediction.error:
            print(f"  not read: {prediction.error}")
    listed = [{key: value for key, value in asdict(p).items() if value} for p in found]
    storage.write(str(out), json.dumps({"predictions": listed, **predict.about(run)}, indent=2) + "\n")
    print(out.resolve())
    if all(prediction.error for prediction in found):
        raise InputError("none of the files could be read; the reasons stand above")


@app.command("doctor")
def doctor_verb(
    address: Annotated[
        str | None, typer.Option(help="A cluster, host:6379; else RAY_ADDRESS, else this machine.")
    ] = None,
    shards: Annotated[list[str] | None, typer.Option(help="A shard set that every node must read.")] = None,
    root: Annotated[str | None, typer.Option(help="Where runs will go.")] = None,
    free_orphans: Annotated[
        bool, typer.Option("--free-orphans", help="Remove what killed sweeps left waiting in the cluster.")
    ] = False,
    out: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write it as JSON.")] = None,
) -> None:
    """What this machine or cluster can do, and what to mend; exit code 1 where something is wrong."""
    from cxrscale import doctor

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
        list[str] | None, typer.Argument(help="Any verb and what it takes.", metavar="VERB ARGS...")
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
    """Run any verb as a job on a Ray cluster and follow it: cxrscale submit train jobs/chexnet14.yaml --address URL.

    The exit code is the job's. Ctrl-C asks whether to stop the job (it writes a checkpoint) or only to stop watching.
    """
    from cxrscale import submit

    if follow is None:
        shipment = submit.Shipment(working_dir, installed, tuple(env or ()), name)
        follow = submit.submit(words or [], shipment, address)
        if detach:
            print(submit.how_to_follow(submit.connect(address), follow), file=sys.stderr)
            print(follow)
            return
        print(f"job {follow}", file=sys.stderr)
    raise typer.Exit(submit.follow(submit.connect(address), follow))


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

"""Feed thousands of forged or damaged artifacts to the commands that read them, in this process.

`python -m tests.fuzz.artifacts --runs 10000` makes a dataset and a run, changes one of their files, runs a command
that reads it, and puts the file back. A fault is whatever is not an end that a user understands: an exception that
leaves the command line, an error of more or fewer than one line, a file that is opened outside of what was given, much
memory or much time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import resource
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import typer

from cxrscale.cli import app
from cxrscale.cli.group import CommandGroup
from tests.fuzz import hostile
from tests.fuzz.mutations import Rng, bytewise
from tests.small_exports import write_export

CODES = (0, 1, 2, 4, 5)
"""Exit codes of commands that ended as they should."""
CPU_SECONDS = 20.0
MEGABYTES = 300
"""How much more memory than all commands before it one command may take."""
FORBIDDEN = ("/etc/passwd", "/etc/shadow")


@dataclass(frozen=True, slots=True)
class World:
    """A dataset, a run with all its artifacts, a search, and what lies beside them."""

    root: Path

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def search(self) -> Path:
        return self.root / "search"

    @property
    def ensemble(self) -> Path:
        """The run and its mirror image."""
        return self.root / "ensemble"

    @property
    def export(self) -> Path:
        """Of a small model with the run's findings."""
        return self.root / "export"

    @property
    def outside(self) -> Path:
        """Whatever opens a file in here has followed a forged name."""
        return self.root / "outside"


def make_world(root: Path, dataset: str, run: str) -> World:
    """Copy a dataset and a trained run, and write all other artifacts of the run."""
    from cxrscale import config
    from cxrscale.inference import Averaging, build_ensemble
    from cxrscale.io import lease, process, write_artifact
    from cxrscale.run import open_run
    from cxrscale.shards import contents
    from cxrscale.training import run_info
    from cxrscale.tuning import search_info

    world = World(root)
    shutil.copytree(dataset, world.dataset)
    # As before there was one: its digests would refuse every forged table before anything else could.
    (world.dataset / contents.NAME).rename(root / contents.NAME)
    shutil.copytree(run, world.run)
    world.outside.mkdir()
    shutil.copy(next(world.dataset.glob("*.tar")), world.outside / "canary.tar")
    trained = open_run(str(world.run))
    trained.choose_thresholds(["threshold.calibration=platt"], 4)
    trained.evaluate(4)
    (world.root / "out").mkdir()
    (world.root / "manifest-digest.json").write_text(json.dumps(run_info.read_run_info(str(world.run)).manifest))
    recipe = trained.recipe
    (world.root / "recipe.yaml").write_text(config.to_yaml(recipe))
    ids = trained.predictions("test").image_id.tolist()
    labels = [f"{name},{n % 2},{n % 3 == 0:d}" for n, name in enumerate(ids)]
    readers = ["image,Effusion,Mass,reader", *(f"{line},{reader}" for reader in "ab" for line in labels)]
    (world.root / "readers.csv").write_text("\n".join(readers) + "\n")
    rows = ["image_id,source_image_id,patient,source_patient", *(f"{name},{n}.png,p,q" for n, name in enumerate(ids))]
    (world.root / "map.csv").write_text("\n".join(rows) + "\n")
    info = run_info.read_run_info(str(world.run))
    outcome = run_info.Outcome(finished=True, epochs=1, best=0.5, device="CPU", workers=1)
    write_artifact(str(world.root / run_info.OUTCOME), outcome)
    # Of a process of this machine that is gone, so that the next command takes it over.
    owner = lease.Owner(id="x", host="here", place=process.place(), pid=1, started="-1", began=1.0)
    (world.root / lease.NAME).write_text(owner.model_dump_json())
    world.search.mkdir()
    inputs = {name: getattr(info, name) for name in run_info.RunInputs.model_fields}
    about = {name: getattr(info, name) for name in run_info.Environment.model_fields}
    session = search_info.SearchSession(began=1.0, ended=2.0)
    search_info.write_search_info(
        str(world.search), search_info.SearchInfo(**inputs, **about, finished=True, verdict="x", sessions=(session,))
    )
    shutil.copy(world.root / "recipe.yaml", world.search / "recipe.yaml")
    _write_trials(world.search)
    build_ensemble([str(world.run)], str(world.ensemble), Averaging(hflip=True))
    _write_cascade(world)
    write_export(str(world.run), world.export)
    open_run(str(world.export)).choose_thresholds(["threshold.calibration=platt"], 4)
    return world


def _write_cascade(world: World) -> None:
    """As `threshold --gate` writes it; the run is its own segmenter and gate."""
    from cxrscale.evaluation import CASCADE, Cascade, MaskRule, artifacts, cascade_models
    from cxrscale.evaluation.metrics import Estimate
    from cxrscale.io import storage, write_artifact

    side = artifacts.ComparedRun(name="run", run=str(world.run), checkpoint=_weights_digest(world.run))
    names = cascade_models.MaskMetrics.model_fields
    measured = cascade_models.MaskMetrics(**{name: Estimate(0.5, 0.4, 0.6) for name in names})
    parts = dict.fromkeys(("cascade", "segmenter", "difference"), measured)
    chosen = Cascade(
        gate=side,
        segmenter=side,
        finding="Mass",
        threshold=0.5,
        gate_thresholds="thresholds",
        mask_rule=MaskRule(0.6, 3, 0.4, own_size=True),
        images=9,
        patients=5,
        validation=cascade_models.CascadeMetrics(**parts, passed=Estimate(0.5, 0.4, 0.6)),
    )
    write_artifact(storage.join(world.run, CASCADE), chosen)


@cache
def _weights_digest(run: Path) -> str:
    from cxrscale.io import storage

    return storage.digest((run / "best.pt").read_bytes())


def _write_trials(search: Path) -> None:
    from cxrscale.config import Recipe
    from cxrscale.tuning import results

    def row(n: int) -> results.TrialRow:
        point, curve = {"optim.lr": 0.1 * n}, (0.5, 0.6)
        status = results.BROKEN if n == 1 else results.FINISHED
        return results.TrialRow(f"t{n}", False, status, "", point, curve, 0.5, 1.0, 1.0, 0.0, None, "x")

    rows = [row(n) for n in range(1, 4)]
    import pyarrow.parquet as pq

    pq.write_table(results.results_table(rows, Recipe(), {"optim.lr": object()}), search / results.PARQUET)  # type: ignore[dict-item]


# Commands that only the Python API has, with the command line's own handling of errors

extra = typer.Typer(cls=CommandGroup, pretty_exceptions_enable=False, rich_markup_mode=None)


@extra.command("first-batch")
def _batches(dataset: str) -> None:
    """What training reads of a dataset first: its manifest, leaks, a batch of its images."""
    from cxrscale import config
    from cxrscale.config import Recipe
    from cxrscale.loader import training_batches
    from cxrscale.shards import leakage, manifest

    leakage.merged_patients(leakage.join_datasets(dataset))
    data = manifest.load(dataset)
    given = ["data.findings=[Effusion, Mass]", "augment.size=16", "sampler.batch_size=4", "loader.backend=opencv"]
    recipe = config.parse(Recipe, config.override({}, given), where="test")
    batches = training_batches(data, recipe)
    next(batches)
    batches.close()
    if data.has_own_masks:
        data.own_mask(0)


@extra.command("report")
def _report(run: str) -> None:
    from cxrscale.run import open_run

    open_run(run).report()


@extra.command("weights")
def _weights(file: str) -> None:
    """What model.weights does with a file."""
    from cxrscale.models import load_weights

    load_weights(_tiny_model(), file, findings=("Cardiomegaly", "Effusion", "Mass", "Hernia"))


@extra.command("resume")
def _resume(run: str) -> None:
    """What `train` reads of a run that goes on."""
    from cxrscale import config
    from cxrscale.training import resume, run_info

    recipe = config.load_recipe(Path(run).parent / "recipe.yaml")
    info = run_info.RunInputs(manifest=_manifest_digest(run))
    longer = recipe.train.model_copy(update={"epochs": recipe.train.epochs + 1})
    resume.prepare(recipe.model_copy(update={"train": longer}), info, run)


@extra.command("checkpoint")
def _checkpoint(folder: str) -> None:
    """What `train` reads of a run's checkpoints."""
    import torch

    from cxrscale.io import storage
    from cxrscale.training import checkpoint
    from cxrscale.training.state import Progress, TrainState

    path = next(Path(folder).glob("step-*.pt"))
    path.rename(path.with_name(f"{path.name[:15]}{storage.digest(path.read_bytes())[:16]}.pt"))
    model = _tiny_model()
    state = TrainState(model, torch.optim.Adam(model.parameters()), None, Progress())
    checkpoint.resume(folder, state, _manifest_digest(str(Path(folder).parent)))


@extra.command("search")
def _search(run: str) -> None:
    """What `tune --resume` and the table of trials read of a search."""
    from cxrscale import config
    from cxrscale.training import run_info
    from cxrscale.tuning import sweep

    recipe = config.load_recipe(Path(run).parent / "recipe.yaml")
    tune = recipe.tune.model_copy(update={"retry_failed": True})
    recipe = recipe.model_copy(update={"tune": tune})
    sweep._check_resumable(recipe, run_info.RunInputs(manifest=_manifest_digest(run)), run)


@extra.command("cascade")
def _cascade(run: str) -> None:
    """What `predict --gate` reads of a segmenter's cascade, and does with it."""
    from cxrscale.inference import apply_mask_rule, read_cascade

    digest = _weights_digest(Path(run))
    chosen = read_cascade(run, digest, digest, "thresholds")
    if chosen is not None:
        score_HW = np.linspace(0.0, 1.0, 36, dtype=np.float32).reshape(6, 6)
        apply_mask_rule(score_HW, chosen.mask_rule, (9, 9))
        bool(chosen.threshold <= 0.5)


@cache
def _manifest_digest(folder: str) -> str:
    return str(json.loads((Path(folder).parent / "manifest-digest.json").read_text()))


@cache
def _tiny_model() -> Any:
    from cxrscale import config
    from cxrscale.config import Recipe
    from cxrscale.models import build_model
    from tests.tiny import TINY_CLASSIFIER

    given = [*TINY_CLASSIFIER, "data.findings=[Cardiomegaly, Effusion, Mass, Hernia]"]
    recipe = config.parse(Recipe, config.override({}, given), where="test")
    return build_model(recipe.model, recipe.data)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of artifact: its file, how it is forged, and the command lines that read it."""

    file: Callable[[World], Path]
    forge: Callable[[bytes, Rng], bytes]
    commands: tuple[Callable[[World], list[str]], ...]
    reads_elsewhere: bool = False
    """Whether it is a recipe, whose addresses may be anywhere: then only writing is watched."""
    kept: bool = False
    """Whether the genuine file is kept beside the folder, where the commands do not meet it."""

    def genuine(self, world: World) -> Path:
        """The file that is forged."""
        return world.root / self.file(world).name if self.kept else self.file(world)


def _image(world: World) -> str:
    return str(world.root / "image.png")


PREDICT = (lambda w: ["predict", _image(w), "--run", str(w.run), "--out", str(w.root / "out" / "p")],)
THRESHOLD = (lambda w: ["threshold", str(w.run), "--resamples", "2"],)
EVALUATE = (lambda w: ["evaluate", str(w.run), "--resamples", "2"],)
COMPARE = (lambda w: ["compare", str(w.run), str(w.run), "--resamples", "2", "--out", str(w.root / "out" / "c.json")],)
READERS = (
    lambda w: [
        *("compare", str(w.run), "--readers", str(w.root / "readers.csv"), "--resamples", "2"),
        *("--out", str(w.root / "out" / "r.json")),
    ],
)
SPLIT = (
    lambda w: [
        *("predict", "--split", "test", "--run", str(w.run), "--id-map", str(w.root / "map.csv")),
        *("--out", str(w.root / "out" / "ids.csv")),
    ],
)
AUDIT = (lambda w: ["audit", str(w.dataset), "--out", str(w.root / "out" / "audit.html")],)
ENSEMBLE = (
    lambda w: ["predict", _image(w), "--run", str(w.ensemble), "--out", str(w.root / "out" / "e")],
    lambda w: ["ensemble", str(w.run), "--tta", "hflip", "--name", "ensemble", "--resamples", "2"],
)
EXPORT = (
    lambda w: ["predict", _image(w), "--run", str(w.export), "--out", str(w.root / "out" / "x")],
    lambda w: ["threshold", str(w.export), "--resamples", "2"],
    lambda w: [
        *("variants", _image(w), "--run", str(w.run), "--quantized", str(w.export)),
        *("--out", str(w.root / "out" / "v.html")),
    ],
)
DATASET = (lambda w: ["verify", str(w.dataset)], lambda w: ["first-batch", str(w.dataset)])

KINDS = {
    "manifest": Kind(lambda w: w.dataset / "manifest.parquet", hostile.mutated_parquet, (*DATASET, *DATASET, *AUDIT)),
    "fingerprints": Kind(lambda w: w.dataset / "fingerprints.parquet", hostile.mutated_parquet, DATASET[1:]),
    "ledger": Kind(lambda w: w.dataset / "ledger.json", hostile.mutated_json, AUDIT),
    "recipe": Kind(
        lambda w: w.root / "recipe.yaml",
        hostile.mutated_yaml,
        (lambda w: ["config", str(w.root / "recipe.yaml")],),
        True,
    ),
    "recipe of a run": Kind(lambda w: w.run / "recipe.yaml", hostile.mutated_yaml, THRESHOLD, True),
    "thresholds": Kind(
        lambda w: w.run / "thresholds.json", hostile.mutated_json, (*PREDICT, *EVALUATE, *COMPARE, *READERS), True
    ),
    "predictions": Kind(
        lambda w: w.run / "predictions-test.parquet", hostile.mutated_parquet, (*EVALUATE, *COMPARE, *READERS, *SPLIT)
    ),
    "metrics": Kind(
        lambda w: w.run / "test_metrics.json", hostile.mutated_json, (lambda w: ["report", str(w.run)],), True
    ),
    "best.pt": Kind(
        lambda w: w.run / "best.pt",
        hostile.mutated_checkpoint,
        (*PREDICT, *PREDICT, lambda w: ["weights", str(w.run / "best.pt")]),
        True,
    ),
    "checkpoint": Kind(
        lambda w: next((w.run / "checkpoints").glob("step-*.pt")),
        hostile.mutated_checkpoint,
        (lambda w: ["checkpoint", str(w.run / "checkpoints")],),
    ),
    "run.json": Kind(
        lambda w: w.run / "run.json",
        hostile.mutated_json,
        (lambda w: ["resume", str(w.run)], lambda w: ["report", str(w.run)]),
    ),
    "log": Kind(lambda w: w.run / "train_log.jsonl", hostile.mutated_lines, (lambda w: ["report", str(w.run)],)),
    "search": Kind(lambda w: w.search / "sweep.json", hostile.mutated_json, (lambda w: ["search", str(w.search)],)),
    "trials": Kind(
        lambda w: w.search / "trials.parquet", hostile.mutated_parquet, (lambda w: ["search", str(w.search)],)
    ),
    "outcome": Kind(
        lambda w: w.run / "outcome.json", hostile.mutated_json, (lambda w: ["report", str(w.run)],), kept=True
    ),
    "lease": Kind(lambda w: w.run / ".lease", hostile.mutated_json, THRESHOLD, kept=True),
    "contents": Kind(lambda w: w.dataset / "dataset.json", hostile.mutated_json, DATASET, kept=True),
    "readers": Kind(lambda w: w.root / "readers.csv", hostile.mutated_csv, READERS),
    "map": Kind(lambda w: w.root / "map.csv", hostile.mutated_csv, SPLIT),
    "ood": Kind(lambda w: w.run / "ood.json", hostile.mutated_json, (*PREDICT, *EVALUATE)),
    "cascade": Kind(lambda w: w.run / "cascade.json", hostile.mutated_json, (lambda w: ["cascade", str(w.run)],)),
    "ensemble": Kind(lambda w: w.ensemble / "ensemble.json", hostile.mutated_json, ENSEMBLE),
    "weights of an ensemble": Kind(lambda w: w.ensemble / "best.pt", hostile.mutated_checkpoint, ENSEMBLE[:1], True),
    "export.json": Kind(lambda w: w.export / "export.json", hostile.mutated_json, EXPORT),
    "recipe of an export": Kind(lambda w: w.export / "recipe.yaml", hostile.mutated_yaml, EXPORT, True),
    "model of an export": Kind(lambda w: w.export / "model.onnx", bytewise, EXPORT[:1]),
}


@dataclass(slots=True)
class Watch:
    """What a command opens that it should not."""

    world: World
    reads: bool
    seen: list[str] = field(default_factory=list)

    def opened(self, path: Any, writing: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.realpath(os.fsdecode(path))
        escaped = name in FORBIDDEN or name.startswith(str(self.world.outside))
        own = name.startswith((str(self.world.root), "/dev/", "/tmp/cxrscale", "/proc/")) or "__pycache__" in name
        if (escaped and (self.reads or writing)) or (writing and not own):
            self.seen.append(f"{'wrote' if writing else 'read'} {name}")


_watch: list[Watch] = []
_WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watch:
        return
    if event == "open":
        flags = args[2] or 0
        _watch[-1].opened(args[0], bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))
    elif event in ("os.listdir", "os.scandir"):
        _watch[-1].opened(args[0], False)
    elif event in _WRITES:
        _watch[-1].opened(args[0], True)


_installed: list[bool] = []


@contextlib.contextmanager
def _watching(world: World, reads: bool) -> Iterator[Watch]:
    if not _installed:
        sys.addaudithook(_hook)  # which nothing can remove
        _installed.append(True)
    _watch.append(Watch(world, reads))
    try:
        yield _watch[-1]
    finally:
        _watch.pop()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended on one forged file."""

    kind: str
    number: int
    words: tuple[str, ...]
    code: int | None
    fault: str = ""
    """What is wrong with that end; empty where nothing is."""
    said: str = ""
    """The error line."""
    seconds: float = 0.0
    """CPU time."""


def call(words: Sequence[str]) -> tuple[int | None, str, str]:
    """(exit code, stderr, the exception that left the command line) of a command in this process."""
    own = {command.name for command in extra.registered_commands}
    command = typer.main.get_command(extra if words[0] in own else app.app)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command(list(words))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
            return code, err.getvalue(), ""
        except BaseException as error:  # a panic of a decoder in Rust is not an Exception
            frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
            return (
                None,
                err.getvalue(),
                f"{type(error).__name__}: {str(error)[:160]!r} at {' < '.join(reversed(frames))}",
            )
    return 0, err.getvalue(), ""


def attempt(world: World, kind: str, seed: int, number: int) -> Ended:
    """Forge a file, run a command that reads it, and put everything back."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    chosen = KINDS[kind]
    path = chosen.file(world)
    data = chosen.genuine(world).read_bytes()
    words = chosen.commands[int(rng.integers(len(chosen.commands)))](world)
    forged = chosen.forge(data, rng)
    before = _state(world.root)
    kept = {name: name.read_bytes() for name in before if name.suffix != ".tar"}
    peak, began = _peak(), time.process_time()
    try:
        path.write_bytes(forged)
        with _watching(world, not chosen.reads_elsewhere) as watch:
            code, err, exception = call(words)
        seconds, grown = time.process_time() - began, _peak() - peak
    finally:
        _restore(world.root, before, kept)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    fault = ""
    if exception:
        fault = exception
    elif code not in CODES:
        fault = f"exit code {code}"
    elif "Traceback" in err:
        fault = f"a traceback: {err[-200:]!r}"
    elif (code == 2) != (len(lines) == 1):
        fault = f"exit code {code} with {len(lines)} error lines: {err[-200:]!r}"
    elif watch.seen:
        fault = watch.seen[0]
    elif grown > MEGABYTES:
        fault = f"{grown} MB"
    elif seconds > CPU_SECONDS:
        fault = f"{seconds:.0f} s"
    return Ended(kind, number, tuple(words), code, fault, lines[0] if lines else "", seconds)


def undamaged(world: World) -> dict[str, str]:
    """What the commands say of files that nobody has touched, where it is not that all is well."""
    said = {}
    with cheap():
        for kind, chosen in KINDS.items():
            before = _state(world.root)
            kept = {name: name.read_bytes() for name in before if name.suffix != ".tar"}
            for command in dict.fromkeys(chosen.commands):
                if chosen.kept:
                    shutil.copy(chosen.genuine(world), chosen.file(world))
                code, err, exception = call(command(world))
                if code or exception:
                    said[f"{kind}: {command(world)[0]}"] = exception or err.splitlines()[-1]
                _restore(world.root, before, kept)
    return said


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _state(root: Path) -> dict[Path, tuple[int, int]]:
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            status = Path(folder, name).stat()
            found[Path(folder, name)] = (status.st_mtime_ns, status.st_size)
    return found


def _restore(root: Path, before: dict[Path, tuple[int, int]], kept: dict[Path, bytes]) -> None:
    after = _state(root)
    for path in after.keys() - before.keys():
        path.unlink()
    for path, data in kept.items():
        if after.get(path) != before[path]:
            path.write_bytes(data)


PLOTS = ("roc", "precision-recall", "calibration", "confusion", "subgroups")


class _NoPlot:
    def on_page(self) -> str:
        return ""


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """Without what no forged file changes and what takes most of the time: models of the same recipe, plots."""
    from unittest import mock

    from cxrscale.inference import trained
    from cxrscale.models import build_model
    from cxrscale.reporting import run_report, style

    models: dict[str, Any] = {}

    def build(model: Any, data: Any, most_weights: int) -> Any:
        name = repr((model, data.task, data.findings))
        if name not in models:
            models[name] = build_model(model, data, most_weights)
        return models[name]

    logger = logging.getLogger("cxrscale")
    level = logger.level
    with (
        mock.patch.object(trained, "build_model", build),
        mock.patch.object(run_report, "write_plots", return_value=None),
        mock.patch.object(style, "svg", return_value=""),
        mock.patch.object(run_report, "metric_plots", return_value=dict.fromkeys(PLOTS, _NoPlot())),
        mock.patch.object(run_report, "threshold_plots", return_value={}),
    ):
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def campaign(world: World, runs: int, seed: int, kinds: Sequence[str]) -> list[Ended]:
    """Inputs 0 to `runs`, shared among the kinds in turn."""
    ends = []
    with cheap():
        for n in range(runs):
            ends.append(attempt(world, kinds[n % len(kinds)], seed, n // len(kinds)))
            if ends[-1].fault:
                print(f"{ends[-1].kind} {ends[-1].number} {ends[-1].words[0]}: {ends[-1].fault}", flush=True)
            if n % 500 == 499:
                print(f"{n + 1} files, {time.process_time():.0f} CPU seconds", file=sys.stderr, flush=True)
    return ends


def table(ends: Sequence[Ended]) -> str:
    """One line per kind: files, how many were read, refused, and faults."""
    lines = [f"{'kind':<18}{'files':>7}{'read':>7}{'refused':>9}{'faults':>8}{'CPU s':>8}"]
    for kind in dict.fromkeys(end.kind for end in ends):
        own = [end for end in ends if end.kind == kind]
        count = Counter("fault" if end.fault else "refused" if end.code else "read" for end in own)
        lines.append(
            f"{kind:<18}{len(own):>7}{count['read']:>7}{count['refused']:>9}{count['fault']:>8}"
            f"{sum(end.seconds for end in own):>8.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--world", type=Path, required=True, help="a folder; made where it is not there")
    given = parser.parse_args()
    world = World(given.world.resolve())
    if not world.root.exists():
        new_world(world.root)
    for command, why in undamaged(world).items():
        print(f"undamaged {command}: {why}")
    ends = campaign(world, given.runs, given.seed, given.kinds)
    print(table(ends))
    print(f"peak memory {_peak()} MB, {time.process_time():.0f} CPU seconds")
    return 1 if any(end.fault for end in ends) else 0


def new_world(root: Path) -> None:
    """A world with a small dataset of its own."""
    import tempfile

    import torch

    from cxrscale.config import Pack
    from cxrscale.run import no_watcher
    from cxrscale.shards import build
    from cxrscale.sources.synthetic import archive
    from cxrscale.training import launch
    from tests.conftest import tiny

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        drawn = archive.write(f"{folder}/archive", images=60, size=64, seed=3)
        sets = str(root.parent / "source-of-the-world")
        build.build_shards("nih", str(drawn.nih), Pack(size=32, samples_per_shard=20), sets, local=True)
        findings = "data.findings=[Cardiomegaly, Effusion, Mass, Hernia]"
        recipe = tiny(sets, Path(folder), findings, "augment.size=32", "train.epochs=1", "threshold.report_at=[0.25]")
        run = launch.launch(recipe, "tiny", no_watcher, local=True)
        root.mkdir()
        shutil.copy(next(drawn.nih.rglob("*.png")), root / "image.png")
        make_world(root, sets, run)


if __name__ == "__main__":
    sys.exit(main())

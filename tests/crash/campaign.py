"""Every crash point of a command: killed at its n-th effect and run again, it leaves what it leaves undisturbed.

    python -m tests.crash.campaign FOLDER [SCENARIO...] [--every N] [--first N]

FOLDER is empty and gets a small dataset and a run. Prints one line per scenario; ends with 1 where a point failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.crash import harness
from tests.tiny import TINY_CLASSIFIER

TIMES = {"time", "images_per_second", "data_wait"}
"""Fields of the training log that no two runs share."""
LEFT_OUT = {"sessions", "seconds", "worker_hours", "gpu_hours", "cost", "hardware", "git"}
"""The same of run.json."""
TINY = (
    *TINY_CLASSIFIER,
    "sampler.steps_per_epoch=3",
    "tracking.log_steps=2",
    "train.epochs=2",
    "train.checkpoint_steps=1",
    "train.keep_checkpoints=2",
)


PACK = ("pack.size=64", "pack.samples_per_shard=8")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command, and what it finds: everything is under `work`, which is `before` at the start."""

    name: str
    words: tuple[str, ...]
    needs: str = ""
    """The scenario whose result it starts from."""


def scenarios(source: str, work: str) -> list[Scenario]:
    """In the order in which one gives the next what it needs."""
    run, shards = f"{work}/runs/tiny", f"{work}/nih"
    train = ["train", f"{work}/recipe.yaml", *TINY, f"data.shards={shards}", f"tracking.runs_dir={work}/runs"]
    return [
        Scenario("shard", ("shard", "nih", source, "--out", shards, *PACK, "--local")),
        Scenario("train", (*train, "tracking.name=tiny", "--local"), "shard"),
        Scenario("threshold", ("threshold", run, "--resamples", "10"), "train"),
        Scenario("evaluate", ("evaluate", run, "--resamples", "10"), "threshold"),
        Scenario("predict", ("predict", f"{work}/a.png", "--run", run, "--out", f"{work}/p.json"), "evaluate"),
    ]


def snapshot(work: str) -> dict[str, Any]:
    """What is compared: the content of each file, without what tells the time."""
    result: dict[str, Any] = {}
    for path in sorted(Path(work).rglob("*")):
        if not path.is_file():
            continue
        name, content = str(path.relative_to(work)), path.read_bytes()
        if path.name == "train_log.jsonl":
            lines = [json.loads(line) for line in content.decode().splitlines()]
            result[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        elif path.name == "run.json":
            result[name] = {key: value for key, value in json.loads(content).items() if key not in LEFT_OUT}
        elif path.suffix == ".pt":
            # The same content has other bytes, and so another name, where two of its values are one object.
            name = re.sub("(step-[0-9]+)-[0-9a-f]+", r"\1", name)
            result.setdefault(name, []).append(_tensors(torch.load(path, weights_only=True)))
        elif path.name == "report.html":
            result[name] = "written"  # it states the time that training took
        else:
            result[name] = content
    return result


def _tensors(value: Any) -> str:
    """A checkpoint's content as text that is equal for equal content."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return repr({key: _tensors(item) for key, item in value.items()})
    return repr([_tensors(item) for item in value]) if isinstance(value, list | tuple) else repr(value)


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """One line per file that is missing, too many or different."""
    lines = [f"missing {name}" for name in sorted(expected.keys() - actual.keys())]
    lines += [f"stray {name}" for name in sorted(actual.keys() - expected.keys())]
    for name in sorted(expected.keys() & actual.keys()):
        if expected[name] != actual[name]:
            lines.append(f"different {name}")
    return lines


def check(scenario: Scenario, folder: Path, work: Path, every: int, first: int) -> tuple[int, int, list[str]]:
    """Try its crash points: (effects, points tried, failures)."""
    before, log = folder / f"before-{scenario.name}", folder / "log.txt"
    shutil.copytree(work, before)
    code, effects = harness.run(scenario.words, [str(work)], None, log)
    if code:
        return 0, 0, [f"undisturbed: exit code {code}\n{log.read_text()}"]
    after = folder / f"after-{scenario.name}"
    shutil.copytree(work, after)
    expected, failures = snapshot(str(work)), []
    points = range(first, effects, every)
    for at in points:
        shutil.rmtree(work)
        shutil.copytree(before, work)
        code, _ = harness.run(scenario.words, [str(work)], at, log)
        if code != -9:
            failures.append(f"{scenario.name} {at}: not killed, exit code {code}\n{log.read_text()}")
            continue
        code, _ = harness.run(scenario.words, [], None, log)
        # Killed after it had said so, a run is finished.
        refused = bool(code) and "is finished; raise" not in log.read_text()
        found = [f"exit code {code}: {log.read_text()[-2000:]}"] if refused else []
        failures += [f"{scenario.name} {at}: {line}" for line in found + differences(expected, snapshot(str(work)))]
    shutil.rmtree(work)
    shutil.copytree(after, work)
    return effects, len(points), failures


def main(arguments: Sequence[str]) -> int:
    """Run the campaign; 1 where a point failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--every", type=int, default=1, help="try each N-th point only")
    parser.add_argument("--first", type=int, default=0, help="begin with this point")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ |= {"CXRSCALE_PATIENT_KEY": "a key for tests", "OMP_NUM_THREADS": "1"}
    # Imported once: each attempt is a fork of this process.
    from cxrscale.cli import app  # noqa: F401
    from cxrscale.inference import predictions  # noqa: F401
    from cxrscale.reporting import audit_page, run_report  # noqa: F401
    from cxrscale.training import launch  # noqa: F401

    folder = given.folder.resolve()
    work = folder / "work"
    work.mkdir(parents=True)
    source = folder / "synthetic" / "nih"
    # In a process of its own: once OpenCV's threads run, a fork that uses them hangs.
    draw = f"archive.write({str(source.parent)!r}, images=40, size=64, seed=3)"
    command = f"from cxrscale.sources.synthetic import archive; {draw}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", command], check=True)
    (work / "recipe.yaml").write_text("{}\n")
    shutil.copy(next(source.rglob("*.png")), work / "a.png")
    failed = 0
    for scenario in scenarios(str(source), str(work)):
        chosen = not given.names or scenario.name in given.names
        effects, tried, failures = check(scenario, folder, work, given.every if chosen else 10**9, given.first)
        failed += len(failures)
        for line in failures:
            print(line, flush=True)
        if chosen or failures:
            print(
                f"{scenario.name}: {effects} effects, {tried} crash points tried, {len(failures)} failures", flush=True
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

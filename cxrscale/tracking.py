"""What a run writes down as it goes: metrics.jsonl always, Weights & Biases when asked. Rank 0 only."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cxrscale.config import Tracking
from cxrscale.schema import InputError

METRICS = "metrics.jsonl"


class Tracker:
    """Appends to run/metrics.jsonl and, when asked, to a wandb run that survives restarts."""

    def __init__(self, run: Path, tracking: Tracking, recipe: Mapping[str, Any], start_step: int) -> None:
        """Lines of steps that a resumed run will do again are dropped first.

        Args:
            run: the run's folder; wandb's offline files go there too, since workers change directory.
            start_step: the step the run goes on from.
        """
        path = run / METRICS
        kept = [line for line in read(run) if line["step"] <= start_step] if path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._wandb: Any = _start_wandb(run, tracking, recipe) if tracking.wandb != "disabled" else None

    def log(self, kind: str, step: int, values: Mapping[str, float | int | None]) -> None:
        """Write a line; `kind` is train or val, `step` the optimizer steps done. NaN becomes null."""
        plain = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in plain.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish both."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in (run / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _finite(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _start_wandb(run: Path, tracking: Tracking, recipe: Mapping[str, Any]) -> Any:
    import wandb

    # The same id after a restart joins the pieces to one run: wandb sync --id ID run/wandb/offline-run-*
    identity = hashlib.blake2b(str(run.resolve()).encode(), digest_size=6).hexdigest()
    try:
        return wandb.init(
            project=tracking.project,
            name=run.name,
            id=identity,
            resume="allow",
            mode=tracking.wandb,
            dir=str(run.resolve()),
            config=dict(recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.CommError as error:
        raise InputError(f"tracking.wandb=online: {error}; log in with `wandb login` or use offline") from None

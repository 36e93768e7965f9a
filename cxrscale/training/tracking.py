"""The log of a run: train_log.jsonl and samples.png always, Weights & Biases when asked for. Rank 0 only.

Images go to Weights & Biases only with tracking.wandb_images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import netrc
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cxrscale.config import Tracking
from cxrscale.io import encode_color_png, encode_png, scratch, storage
from cxrscale.types import UserError

TRAIN_LOG = "train_log.jsonl"
SAMPLES = "samples.png"
WAIT = "wait"
"""Kind of the lines that say what the run has waited for; `read_log` leaves them out."""
MAPS = "maps"
"""Folder of the maps that tracking.map_images asks for."""
CRC = "crc"
"""The last field of a line of the log."""
REMOTE_SECONDS = 20.0
"""An object store cannot append: there train_log.jsonl is rewritten this often, and after every validation."""

WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
"""The variables from which wandb takes a key."""
WANDB_URL = "https://api.wandb.ai"
"""Its server without WANDB_BASE_URL."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run goes on."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs that are validated. A checkpoint of an epoch's last step may be from before its validation."""

    def keeps(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of the log is of work that will not be done again, or of a wait."""
        if line["kind"] == WAIT:
            return True
        return bool(line["step"] <= self.step and (line["kind"] != "val" or line["epoch"] <= self.epoch))


@dataclass(frozen=True, slots=True)
class Wait:
    """Something that a run has waited for."""

    what: str
    limit: str
    """What would have ended it, e.g. `scaling.start_seconds=1800`."""
    seconds: float
    began: float
    """Unix seconds on the driver's clock; no other wait of the run has the same."""

    def line(self, step: int) -> dict[str, Any]:
        """Its line in the log of a run that has done so many steps."""
        return {"kind": WAIT, "step": step, "time": round(time.time(), 3), **asdict(self)}


class Tracker:
    """Writes train_log.jsonl and, when asked, a wandb run that survives restarts."""

    def __init__(self, run: str, tracking: Tracking, recipe: Mapping[str, Any], start: Start = Start()) -> None:
        """Lines of work that a resumed run will repeat are dropped first.

        Args:
            run: the run's folder or address.
            start: where the run goes on.
        """
        self.run, self.address = run, storage.join(run, TRAIN_LOG)
        self._lines = [_text(line) for line in read_lines(run) if start.keeps(line)]
        self._written_at = time.monotonic()
        self._file = None
        if not storage.is_remote(run):
            storage.write(self.address, "".join(line + "\n" for line in self._lines))
            self._file = storage.local_path(self.address).open("a", buffering=1)
        self._wandb_images = tracking.wandb_images
        # Ray's workers change directory: wandb's files go into the run's folder, or for a remote run to it at the end.
        self._wandb_folder: Path | None = None
        self._wandb: Any = None
        if tracking.wandb != "disabled":
            self._wandb_folder = scratch.make() if storage.is_remote(run) else storage.local_path(run)
            self._wandb = _start_wandb(run, self._wandb_folder, tracking, recipe)

    def log(self, kind: str, step: int, values: Mapping[str, float | int | None]) -> None:
        """Append a line; `kind` is train or val, `step` the optimizer steps done. NaN becomes null."""
        plain = {name: _finite(value) for name, value in values.items()}
        self._append({"kind": kind, "step": step, "time": round(time.time(), 3), **plain})
        defined = {f"{kind}/{name}": value for name, value in plain.items() if value is not None}
        self._to_wandb(lambda run: run.log(defined, step=step))

    def log_wait(self, step: int, wait: Wait) -> None:
        """Append what the run has waited for, after so many steps."""
        self._append(wait.line(step))

    def _append(self, values: Mapping[str, Any]) -> None:
        line = _text(values)
        if self._file is not None:
            self._file.write(line + "\n")
        else:
            self._lines.append(line)
            if values["kind"] != "train" or time.monotonic() - self._written_at > REMOTE_SECONDS:
                self.flush()

    def samples(self, image_BCHW: npt.NDArray[np.float32]) -> None:
        """Save images as the model sees them, side by side, each stretched to its own extremes."""
        low, high = (extreme(image_BCHW, axis=(1, 2, 3), keepdims=True) for extreme in (np.min, np.max))
        image_BHW = (255 * (image_BCHW - low) / np.maximum(high - low, 1e-6)).round().astype(np.uint8)[:, 0]
        columns = math.ceil(len(image_BHW) ** 0.5)
        missing = -len(image_BHW) % columns
        grid = np.concatenate([image_BHW, np.zeros((missing, *image_BHW.shape[1:]), np.uint8)])
        rows = [np.concatenate(list(grid[i : i + columns]), axis=1) for i in range(0, len(grid), columns)]
        sheet = np.concatenate(rows, axis=0)
        storage.write(storage.join(self.run, SAMPLES), encode_png(sheet))
        if self._wandb_images:
            self._to_wandb(lambda run: run.log({"samples": _wandb_image(sheet)}, step=0))

    def maps(self, epoch: int, step: int, sheet_HW3: npt.NDArray[np.uint8]) -> None:
        """Save the maps of an epoch, drawn over their images (BGR)."""
        content = encode_color_png(sheet_HW3)
        storage.write(storage.join(self.run, MAPS, f"epoch-{epoch:04}.png"), content)
        if self._wandb_images:
            self._to_wandb(lambda run: run.log({"maps": _wandb_image(sheet_HW3[..., ::-1])}, step=step))

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        if self._file is not None:
            self._file.close()
        self.flush()
        self._to_wandb(lambda run: run.finish())
        if self._wandb_folder is not None and storage.is_remote(self.run):
            for path in sorted(self._wandb_folder.glob("wandb/**/*")):
                if path.is_file() and not path.is_symlink():
                    name = path.relative_to(self._wandb_folder).as_posix()
                    storage.write(storage.join(self.run, name), path.read_bytes())
            scratch.remove(self._wandb_folder)

    def _to_wandb(self, action: Callable[[Any], None]) -> None:
        """Do the same in wandb. It is a copy of train_log.jsonl: when its service dies, the run goes on without."""
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:  # wandb's service, files and network fail in many types, none of them ours
            self._wandb = None
            logging.getLogger(__name__).warning(
                "%s: wandb has stopped (%s: %s); train_log.jsonl goes on", self.run, type(error).__name__, error
            )

    def flush(self) -> None:
        """Write all lines, so that a killed process loses none; a local file has them already."""
        if self._file is None:
            storage.write(self.address, "".join(line + "\n" for line in self._lines))
            self._written_at = time.monotonic()


def read_log(run: str) -> list[dict[str, Any]]:
    """The lines of training and validation in train_log.jsonl, none where there is no file.

    Raises:
        UserError: a line is damaged, or none of a training's log.
    """
    return [line for line in read_lines(run) if line["kind"] != WAIT]


def read_waits(run: str) -> list[dict[str, Any]]:
    """The lines of train_log.jsonl that say what the run has waited for; the errors are those of `read_log`."""
    return [line for line in read_lines(run) if line["kind"] == WAIT]


def add_waits(run: str, waits: Sequence[Wait]) -> None:
    """Append those waits that the log lacks; only while no worker writes it."""
    known = {line["began"] for line in read_waits(run)} if waits else set()
    if missing := [wait for wait in waits if wait.began not in known]:
        lines = read_lines(run)
        step = max((line["step"] for line in lines), default=0)
        lines += [wait.line(step) for wait in missing]
        storage.write(storage.join(run, TRAIN_LOG), "".join(_text(line) + "\n" for line in lines))


def read_lines(run: str) -> list[dict[str, Any]]:
    """All lines of train_log.jsonl; a last line that a kill cut short is left out. The errors are `read_log`'s."""
    address = storage.join(run, TRAIN_LOG)
    return parse_log(storage.read(address), address) if storage.exists(address) else []


def parse_log(content: bytes, address: str) -> list[dict[str, Any]]:
    """The lines in the bytes of a log; the errors are those of `read_log`."""
    *whole, last = content.split(b"\n")
    lines = [_parse(text, f"{address}: line {number}") for number, text in enumerate(whole, start=1)]
    with suppress(UserError):
        lines += [_parse(last, address)] if last else []
    return lines


def _text(values: Mapping[str, Any]) -> str:
    """A line of the log; its last field is the CRC-32 of the line without it."""
    plain = json.dumps(values)
    return f'{plain[:-1]}, "{CRC}": "{zlib.crc32(plain.encode()):08x}"}}'


def _parse(text: bytes, where: str) -> dict[str, Any]:
    """The values of a line; in files of earlier versions it has no CRC."""
    try:
        line: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is damaged (no JSON); remove that line") from None
    if isinstance(line, dict) and CRC in line:
        plain = text[: text.rindex(b",")] + b"}"
        if line.pop(CRC) != f"{zlib.crc32(plain):08x}":
            raise UserError(f"{where} is damaged (its CRC-32 differs); remove that line")
    if not _is_line(line):
        raise UserError(f"{where} is not one of a training's log; remove that line")
    return dict(line)


def _is_line(line: Any) -> bool:
    """Whether it has the fields of its kind, each with a value of its type."""
    if not isinstance(line, dict):
        return False
    texts, needed = {"kind"}, {"step", "time"}
    if line.get("kind") == WAIT:
        texts, needed = texts | {"what", "limit"}, needed | {"seconds", "began"}
    numbers = {name: value for name, value in line.items() if name not in texts}
    return (
        all(isinstance(line.get(name), str) for name in texts)
        and all(
            value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in numbers.values()
        )
        and all(numbers.get(name) is not None for name in needed)
    )


def _finite(value: float | int | None) -> float | int | None:
    return None if value is None or not math.isfinite(value) else value


def _wandb_image(image: npt.NDArray[np.uint8]) -> Any:
    import wandb

    return wandb.Image(image)


def require_wandb_key(tracking: Tracking) -> None:
    """Check that there is a key where tracking.wandb=online will need one.

    Raises:
        UserError: there is none in the environment or in ~/.netrc.
    """
    if tracking.wandb != "online" or any(os.environ.get(name) for name in WANDB_KEYS):
        return
    host = os.environ.get("WANDB_BASE_URL", WANDB_URL).rpartition("://")[2].partition("/")[0].partition(":")[0]
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):  # noqa: PTH111, needs no home
                return
        except (OSError, netrc.NetrcParseError):
            continue
    raise UserError(
        f"tracking.wandb=online needs a key for {host}: run `wandb login`, set WANDB_API_KEY, or use offline"
    )


def _start_wandb(run: str, folder: Path, tracking: Tracking, recipe: Mapping[str, Any]) -> Any:
    import wandb

    # The same id after a restart joins the parts to one run: wandb sync --id ID run/wandb/offline-run-*
    run_id = hashlib.blake2b(run.encode(), digest_size=6).hexdigest()
    try:
        return wandb.init(
            project=tracking.project,
            group=tracking.group,
            name=run.rstrip("/").rsplit("/", 1)[-1],
            id=run_id,
            resume="allow",
            mode=tracking.wandb,
            dir=str(folder),
            config=dict(recipe),
            # Without the command line, the program's text, git's address and mail: paths can name patients.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True
            ),
        )
    except wandb.errors.CommError as error:
        raise UserError(f"tracking.wandb=online: {error}; log in with `wandb login` or use offline") from None

"""A folder that is a run, with the exported model in place of best.pt: written file by file, the model last."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from cxrscale import config
from cxrscale.config import Recipe
from cxrscale.evaluation import Thresholds, artifacts, ood
from cxrscale.inference.decision import read_decision, stored_thresholds
from cxrscale.inference.export import contract
from cxrscale.inference.export.contract import ExportInfo
from cxrscale.inference.trained import TrainedModel
from cxrscale.io import storage, write_artifact, write_sealed_yaml
from cxrscale.training import RunInfo, read_run_info, resume, run_files, run_info
from cxrscale.types import UserError


def thresholds_for(run: str, trained: TrainedModel, digest: str) -> Thresholds | None:
    """A run's thresholds for a form with the same probabilities; None where the run has none.

    Args:
        digest: of the form's file.

    Raises:
        UserError: thresholds.json is damaged, or belongs to other weights.
    """
    if not storage.exists(storage.join(run, artifacts.THRESHOLDS)):
        return None
    return stored_thresholds(run, trained.checkpoint).model_copy(update={"checkpoint": digest})


def write_draft(folder: Path, trained: TrainedModel, content: bytes, info: ExportInfo, out: str) -> None:
    """Make `folder` a run: model, recipe, run.json, the reference of the training images where the run has one.

    Args:
        trained: the run's model.
        content: of the exported file.
        out: where it will be published, whose name it has as a run.
    """
    run = info.run
    source = read_run_info(run)
    fields = {field: getattr(source, field) for field in ("recipe", "shards", "manifest", "inputs")}
    write_artifact(str(folder / run_info.RUN_INFO), RunInfo(**fields, **dict(run_info.environment()), finished=True))
    if storage.exists(storage.join(run, ood.NAME)):
        storage.write(str(folder / ood.NAME), storage.read(storage.join(run, ood.NAME)))
    write_artifact(str(folder / contract.EXPORT), info)
    if info.format == "onnx":
        programs = importlib.resources.files("cxrscale.inference.export").joinpath("standalone")
        for name in contract.STANDALONE:
            storage.write(str(folder / name), programs.joinpath(name).read_text())
    write_sealed_yaml(str(folder / resume.RECIPE), config.to_yaml(_renamed(trained.recipe, out)))
    storage.write(str(folder / contract.FILES[info.format]), content)


def publish(folder: Path, out: str) -> None:
    """Copy the files of a finished draft to their place, the model last: without it the folder is no run yet.

    Raises:
        UserError: the place cannot be written.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda one: one in run_files.WEIGHTS):
        storage.write(storage.join(out, *name.split("/")), (folder / name).read_bytes())


def check_target(out: str) -> None:
    """Refuse to write an export over something else.

    Raises:
        UserError: the folder holds a run or a search, or an export.
    """
    # Without its model an export was interrupted, and is made again.
    begun = storage.exists(storage.join(out, contract.EXPORT))
    for name in (*run_files.WEIGHTS, resume.SEARCH_INFO, *(() if begun else (resume.RECIPE,))):
        if storage.exists(storage.join(out, name)):
            raise UserError(f"--out {out} holds {name} already; give another folder, or remove that one")


def refresh_contract(run: str, thresholds: Thresholds) -> None:
    """Keep an export's export.json, which its predict.py reads, in step with its thresholds.json, and with what its
    test_metrics.json estimates with threshold.prior_shift=em; other runs have none.

    Raises:
        UserError: export.json or test_metrics.json is damaged or of another version.
    """
    info = contract.read_exported(run)
    if info is None:
        return
    estimated = read_decision(run, thresholds.checkpoint).estimated
    findings = contract.finding_contracts(tuple(info.findings), thresholds, estimated)
    rule = thresholds.mask_rule or info.mask_rule
    write_artifact(
        storage.join(run, contract.EXPORT), info.model_copy(update={"findings": findings, "mask_rule": rule})
    )


def _renamed(recipe: Recipe, out: str) -> Recipe:
    """The run's recipe under the export's name."""
    name = out.rstrip("/").rpartition("/")[2]
    return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"name": name})})

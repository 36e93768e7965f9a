"""An ensemble as a run of its own: a folder with the weights of all members, that every command takes as a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cxrscale import config
from cxrscale.evaluation import Comparison
from cxrscale.inference.members import Averaging, Member
from cxrscale.inference.trained import TrainedModel, average, ensemble_state, load_model
from cxrscale.io import Artifact, read_artifact, storage, write_artifact, write_sealed_yaml
from cxrscale.training import LocalWorker, RunInfo, checkpoint, read_run_info, resume, run_files, run_info
from cxrscale.types import UserError

NAME = "ensemble.json"


class EnsembleInfo(Artifact):
    """ensemble.json."""

    schema_version: int = 1
    members: tuple[Member, ...]
    averaging: Averaging
    gains: Mapping[str, Comparison] = {}
    """Member's run -> the ensemble against it on the test split; empty before it is evaluated."""


def build_ensemble(runs: Sequence[str | Path], folder: str, averaging: Averaging) -> EnsembleInfo:
    """Write an ensemble of trained runs into `folder`; one that is there already, of the same models, stays.

    Raises:
        UserError: there is one run and no mirrored image, a run twice, the runs cannot be averaged, or the folder holds
            something else.
    """
    addresses = [storage.absolute(str(run)) for run in runs]
    if len(addresses) < 2 and not averaging.hflip:
        raise UserError(f"an ensemble of {', '.join(addresses) or 'no run'}: give two runs or more, or --tta hflip")
    if twice := {run for run in addresses if addresses.count(run) > 1}:
        raise UserError(f"{', '.join(sorted(twice))} is given twice; name each member once")
    for run in addresses:
        if run_files.weights_file(run) != storage.join(run, checkpoint.BEST):
            raise UserError(f"{run} is an export; make an ensemble of the runs that were exported, and export that")
    device = LocalWorker().dist.device
    loaded = [load_model(run, device) for run in addresses]
    ensemble = average(addresses, loaded, averaging)
    info = EnsembleInfo(members=ensemble.members, averaging=averaging)
    if (stored := read_ensemble(folder)) is not None:
        if (stored.members, stored.averaging) != (info.members, info.averaging):
            raise UserError(f"{folder} is an ensemble of other models; give another --name")
        info = stored
    elif storage.exists(storage.join(folder, resume.RECIPE)):
        raise UserError(f"{folder} is a run or a search; give another --name")
    if not storage.exists(storage.join(folder, checkpoint.BEST)):
        write_artifact(storage.join(folder, NAME), info)
        _write_run_files(folder, addresses[0], ensemble)
        # The weights come last: without them the folder is no run yet.
        storage.write(storage.join(folder, checkpoint.BEST), checkpoint.dump(ensemble_state(loaded, ensemble)))
    return info


def read_ensemble(folder: str) -> EnsembleInfo | None:
    """What an ensemble's folder says of it; None where the folder is no ensemble.

    Raises:
        UserError: ensemble.json is damaged or of another version.
    """
    address = storage.join(folder, NAME)
    if not storage.exists(address):
        return None
    return read_artifact(EnsembleInfo, address, "make the ensemble again, under another --name")


def _write_run_files(folder: str, first: str, ensemble: TrainedModel) -> None:
    """What a training writes beside its weights; the inputs are those of the first member."""
    name = folder.rstrip("/").rpartition("/")[2]
    recipe = ensemble.recipe
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"name": name})})
    inputs = read_run_info(first)
    fields = {field: getattr(inputs, field) for field in ("recipe", "shards", "manifest", "inputs")}
    made = RunInfo(**fields, **dict(run_info.environment()), finished=True)
    write_artifact(storage.join(folder, run_info.RUN_INFO), made)
    write_sealed_yaml(storage.join(folder, resume.RECIPE), config.to_yaml(recipe))

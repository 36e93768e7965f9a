"""What sampling policies have to know of each image beside its labels: its dataset, its weight, whether it is hard."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cxrscale.config import NO_FINDING, PRESENT, Data, Sampler, has_no_finding
from cxrscale.io import parquet, storage
from cxrscale.loader.hashing import Flags, Rows
from cxrscale.shards import Manifest
from cxrscale.types import UserError, probabilities_of


def dataset_numbers(manifest: Manifest, sampler: Sampler) -> Rows:
    """(N,) index in data.shards of the dataset that each image belongs to.

    Raises:
        UserError: sampler.dataset_weights and data.shards differ in length.
    """
    root_N = manifest.column("root")
    # `load` joins the datasets in the order of data.shards, so the n-th new root is the n-th entry.
    number = {root: n for n, root in enumerate(dict.fromkeys(root_N.tolist()))}
    weights = sampler.dataset_weights
    if len(weights) != len(number):
        raise UserError(
            f"sampler.dataset_weights={list(weights)} has {len(weights)} weights for {len(number)} data.shards; "
            "give one for each"
        )
    return np.array([number[root] for root in root_N.tolist()], np.int64)


def finding_weights(manifest: Manifest, sampler: Sampler) -> npt.NDArray[np.float64]:
    """(N,) the largest of `sampler.weights` among each image's present findings; 1 where none of them is listed.

    Raises:
        UserError: a weight is given for a finding that the shards do not have.
    """
    known = (*manifest.findings(), NO_FINDING)
    for name in sampler.weights:
        if name not in known:
            raise UserError(f"sampler.weights: the shards have no label {name!r}; they have {', '.join(known)}")
    label_NF = manifest.labels(manifest.findings())
    present_NF = label_NF == PRESENT
    weight_F = np.array([sampler.weights.get(name, 1.0) for name in manifest.findings()])
    weight_N = np.where(present_NF, weight_F, -np.inf).max(axis=1)
    weight_N[~present_NF.any(axis=1)] = 1.0
    weight_N[has_no_finding(label_NF)] = sampler.weights.get(NO_FINDING, 1.0)
    return np.asarray(weight_N, np.float64)


def hard_images(manifest: Manifest, rows: Rows, data: Data, sampler: Sampler) -> Flags:
    """For each of the rows, whether it is among the worst `sampler.hard_share` of those that have a prediction.

    Raises:
        UserError: `sampler.hard_predictions` is no file of predictions, or has none of these images and findings.
    """
    score_NF, findings = _predicted_scores(manifest.table["image_id"].take(rows), data, sampler)
    error_NF = np.abs(score_NF - manifest.labels(findings)[rows])
    known_N = np.isfinite(error_NF).any(axis=1)
    if not known_N.any():
        raise UserError(
            f"sampler.hard_predictions={sampler.hard_predictions} covers none of the {len(rows)} training images; "
            "give the predictions of the training split, predictions-train.parquet"
        )
    error_N = np.where(np.isfinite(error_NF), error_NF, -1).max(axis=1)
    # By key where errors tie, so that the order of the manifest does not matter.
    worst = np.lexsort((manifest.key[rows], -error_N))[: max(1, round(sampler.hard_share * int(known_N.sum())))]
    hard_N = np.zeros(len(rows), np.bool_)
    hard_N[worst] = True
    return hard_N


def _predicted_scores(
    image_id_N: pa.ChunkedArray, data: Data, sampler: Sampler
) -> tuple[npt.NDArray[np.float64], list[str]]:
    """(N, F) probabilities of the images, NaN for those that the file lacks, and the findings of the task that it has.

    The file has them as logit.X or, from earlier versions, as score.X, which are probabilities.
    """
    address = str(sampler.hard_predictions)
    table = parquet.read_table(
        storage.read(address), f"sampler.hard_predictions={address}", "give a run's predictions-train.parquet"
    )
    prefix = "score." if any(name.startswith("score.") for name in table.column_names) else "logit."
    findings = [name for name in data.findings if prefix + name in table.column_names]
    numbers = all(pa.types.is_floating(table.schema.field(prefix + name).type) for name in findings)
    named = "image_id" in table.column_names and table.schema.field("image_id").type == pa.string()
    if not findings or not named or not numbers:
        raise UserError(
            f"sampler.hard_predictions={address} has no image_id with a score for any of {', '.join(data.findings)}; "
            "give the predictions of a run with these findings"
        )
    index_N = pc.index_in(image_id_N, value_set=table["image_id"].combine_chunks())
    columns = [
        table[prefix + name].cast(pa.float64()).take(index_N).to_numpy(zero_copy_only=False) for name in findings
    ]
    value_NF = np.stack(columns, axis=1).astype(np.float64)
    return value_NF if prefix == "score." else probabilities_of(value_NF), findings

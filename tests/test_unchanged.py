"""What must never change by itself: the bytes of a dataset, the order of images, their augmentation, their tensors.

`unchanged.json` holds digests that were recorded before the modules got their present names. Whoever changes one of
them on purpose changes what old recipes train on, and records it anew: python -m tests.test_unchanged
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from blake3 import blake3

from cxrscale import sources
from cxrscale.config import Augment, Pack, Recipe, Sampler
from cxrscale.loader import sampler as sampling
from cxrscale.loader.augment import sample_params
from cxrscale.loader.loader import training_batches
from cxrscale.loader.policies import SampleAttributes
from cxrscale.shards import build, layout, manifest
from cxrscale.shards import pack as packing
from cxrscale.shards.ids import Key
from cxrscale.sources.synthetic import archive
from cxrscale.types import DistContext

KEY = Key(b"cxrscale")
RECORDED = Path(__file__).with_name("unchanged.json")
PRESETS = ("none", "chexnet", "effusion", "rsna", "siim")
BACKENDS = ("dali", "opencv")
SAMPLERS: dict[str, dict[str, Any]] = {
    "all": {},
    "positives": {"sampling": "positives"},
    "balanced": {"sampling": "balanced"},
    "ratio": {"sampling": "ratio", "positive_share": (0.8, 0.3), "positive_share_epochs": 3},
    "weighted": {"sampling": "weighted", "weights": {"Mass": 2}},
    "hard": {"sampling": "hard", "hard_predictions": "given.parquet", "hard_repeats": 2},
    "mix": {"dataset_weights": (3, 1)},
    "mix, ratio": {"dataset_weights": (3, 1), "sampling": "ratio"},
    "subset": {"max_images": 50},
    "subset, balanced": {"max_images": 50, "sampling": "balanced"},
    "steps_per_epoch, seed": {"steps_per_epoch": 5, "seed": 7},
}


def digest(*parts: Any) -> str:
    """BLAKE3 of the parts' bytes, with the type and shape of arrays; every NaN counts as the same."""
    hasher = blake3()
    for part in parts:
        if isinstance(part, np.ndarray):
            if part.dtype.kind == "f":
                part = np.where(np.isnan(part), np.array(np.nan, part.dtype), part)
            hasher.update(f"{part.dtype} {part.shape} ".encode())
            part = np.ascontiguousarray(part).tobytes()
        hasher.update(part if isinstance(part, bytes) else repr(part).encode())
    return hasher.hexdigest()


def pack(source: str, folder: Path, out: Path, patients_from: str | None = None) -> str:
    """A dataset as older versions wrote it: the source's own image ids beside hashed patients."""
    settings = Pack(size=64, samples_per_shard=10, masks=source == "siim")
    records = sources.read(source, str(folder)).records
    patients: list[str | None] = [None] * len(records)
    if patients_from is None:
        split = build.assign(records, settings)
    else:
        patients, split = build.inherit_patients(records, patients_from, settings, local=True)
    records = [
        replace(record, patient=patient or KEY.hash(source, record.patient))
        for record, patient in zip(records, patients, strict=True)
    ]
    namespace = None if patients_from is None else "nih"
    packing.pack(layout.SplitRecords(records, split, namespace), settings, str(out), local=True)
    return str(out)


def pack_hashed(source: str, folder: Path, out: Path, patients_from: str | None = None) -> str:
    """A dataset as it is written by default, but with a key that is no secret."""
    key_file = out.with_suffix(".key")
    out.parent.mkdir(exist_ok=True)
    key_file.write_bytes(KEY.secret)
    settings = Pack(size=64, samples_per_shard=10, masks=source == "siim", key_file=str(key_file))
    build.build_shards(source, str(folder), settings, str(out), patients_from_dataset=patients_from, local=True)
    return str(out)


def make_datasets(root: Path) -> dict[str, str]:
    """Name -> folder; in the damaged ones two files of each source are cut short, so that there is a quarantine."""
    drawn = archive.write(str(root / "archive"), images=40, size=64, seed=0)
    datasets = {"nih": pack("nih", drawn.nih, root / "shards" / "nih")}
    datasets["siim"] = pack("siim", drawn.siim, root / "shards" / "siim", datasets["nih"])
    damaged = root / "damaged"
    shutil.copytree(root / "archive", damaged)
    for pattern in ("*.png", "*.dcm"):
        for path in sorted(damaged.rglob(pattern), key=lambda path: path.name)[3:5]:
            path.write_bytes(path.read_bytes()[:-700])
    datasets["damaged_nih"] = pack("nih", damaged / "nih", root / "shards" / "damaged-nih")
    siim = root / "shards" / "damaged-siim"
    datasets["damaged_siim"] = pack("siim", damaged / "siim", siim, datasets["damaged_nih"])
    datasets["hashed_nih"] = pack_hashed("nih", damaged / "nih", root / "shards" / "hashed-nih")
    siim = root / "shards" / "hashed-siim"
    datasets["hashed_siim"] = pack_hashed("siim", damaged / "siim", siim, datasets["hashed_nih"])
    return datasets


def of_dataset(folder: Path) -> dict[str, Any]:
    table = pq.read_table(folder / manifest.NAME)
    columns = {column: table[column].to_pylist() for column in table.column_names}
    quarantine = folder / "quarantine.jsonl"
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()] if quarantine.exists() else []
    return {
        "files": {
            path.name: digest(path.read_bytes()) for path in sorted([*folder.glob("*.tar"), *folder.glob("*.idx")])
        },
        "manifest": {column: digest(json.dumps(values).encode()) for column, values in columns.items()},
        "quarantine": [line["image_id"] for line in lines],
        "images": len(table),
    }


def of_order() -> dict[str, Any]:
    """Digests of the first epochs of every sampling, whole and as each of three ranks sees it from (1, 2) on."""
    rng = np.random.default_rng(0)
    row_N = np.arange(200, dtype=np.int64) + 11
    label_NF = rng.choice(np.array([0, 0, 0, 0, 0, 1, np.nan], np.float32), (200, 3))
    key_N = rng.integers(-(2**63), 2**63 - 1, 200)
    attributes = SampleAttributes(rng.integers(0, 2, 200), rng.integers(0, 4, 200) / 2, rng.random(200) < 0.1)
    result: dict[str, Any] = {}
    for name, fields in SAMPLERS.items():
        settings = Sampler.model_validate({"batch_size": 16, **fields})
        stream = sampling.training_stream(row_N, label_NF, key_N, settings, attributes)
        epochs = [sampling.epoch_indices(stream, epoch) for epoch in range(3)]
        result[name] = {"epochs": digest(*(array for pair in epochs for array in pair)), "steps": len(epochs[0][0])}
        for rank in range(3):
            steps = islice(sampling.training_indices(stream, DistContext(rank, 3), 1, 2), 12)
            arrays = (array for step in steps for array in (step.row_B, step.stream_pos_B, step.valid_B))
            result[name][f"rank {rank} of 3"] = digest(*arrays)
    return result


def of_augmentation() -> dict[str, str]:
    rng = np.random.default_rng(1)
    key_B, pos_B = rng.integers(-(2**63), 2**63 - 1, 64), np.arange(64, dtype=np.int64) + 1000
    height_B, width_B = rng.integers(64, 512, 64), rng.integers(64, 512, 64)
    names = ("matrix_B23", "brightness_B", "contrast_B", "blur_B", "clahe_B", "noise_on_B", "noise_offset_B")

    def values(preset: str, training: bool) -> list[npt.NDArray[Any]]:
        augment = Augment.model_validate({"preset": preset})
        params = sample_params(augment, 5, key_B, pos_B, (height_B, width_B), training)
        return [getattr(params, name) for name in names]

    return {
        f"{preset}, {'training' if training else 'evaluation'}": digest(*values(preset, training))
        for preset in PRESETS
        for training in (True, False)
    }


def of_batches(dataset: str, task: str, preset: str, backend: str) -> list[dict[str, Any]]:
    """Digests of the first two training batches."""
    findings = ("Pneumothorax",) if task == "segment" else ("Cardiomegaly", "Effusion", "Mass")
    recipe = Recipe.model_validate(
        {
            "data": {"shards": (dataset,), "task": task, "findings": findings},
            "loader": {"backend": backend},
            "sampler": {"batch_size": 8},
            "augment": {"preset": preset, "size": 48},
        }
    )
    batches = training_batches(manifest.open_dataset(dataset), recipe)
    result = []
    for batch in islice(batches, 2):
        mask = None if batch.mask_B1HW is None else digest(batch.mask_B1HW.numpy())
        rest = digest(batch.label_BF.numpy(), batch.row_B.numpy(), batch.valid_B.numpy())
        result.append({"images": digest(batch.image_BCHW.numpy()), "masks": mask, "rest": rest})
    batches.close()
    return result


CASES = [("nih", "classify", preset) for preset in PRESETS] + [("siim", "segment", "siim")]


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_datasets(tmp_path_factory.mktemp("unchanged"))


@pytest.mark.parametrize("name", ["nih", "siim", "damaged_nih", "damaged_siim", "hashed_nih", "hashed_siim"])
def test_a_dataset_keeps_its_bytes(name: str, datasets: dict[str, str], recorded: Any) -> None:
    assert of_dataset(Path(datasets[name])) == recorded["dataset"][name]


def test_the_order_of_images_stays(recorded: Any) -> None:
    assert of_order() == recorded["order"]


def test_augmentation_stays(recorded: Any) -> None:
    assert of_augmentation() == recorded["augmentation"]


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dataset", "task", "preset"), CASES)
def test_batches_stay_equal_to_the_bit(
    dataset: str, task: str, preset: str, backend: str, datasets: dict[str, str], recorded: Any
) -> None:
    assert (
        of_batches(datasets[dataset], task, preset, backend) == recorded["batches"][f"{dataset}, {preset}, {backend}"]
    )


def main() -> None:
    """Record everything anew."""
    with tempfile.TemporaryDirectory() as folder:
        datasets = make_datasets(Path(folder))
        content = {
            "dataset": {name: of_dataset(Path(path)) for name, path in datasets.items()},
            "order": of_order(),
            "augmentation": of_augmentation(),
            "batches": {
                f"{dataset}, {preset}, {backend}": of_batches(datasets[dataset], task, preset, backend)
                for dataset, task, preset in CASES
                for backend in BACKENDS
            },
        }
    RECORDED.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

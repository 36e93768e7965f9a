"""RSNA's real files from the archive to confusion matrices, and what they share with NIH's and SIIM's."""

import csv
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrscale import config, run
from cxrscale.config import Pack
from cxrscale.shards import Audit, audit, build, manifest, splits
from cxrscale.training import launch

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "rsna-resnet18.yaml"
SMALL = ("augment.size=64", "sampler.batch_size=16", "train.epochs=4", "optim.lr=1e-3", "loader.backend=opencv")


def linked(real: Path, out: Path, links: Mapping[str, str]) -> str:
    """A folder of links into the real files."""
    for name, target in links.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).symlink_to(real / target)
    return str(out)


@pytest.fixture(scope="module")
def datasets(real: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """NIH, SIIM and RSNA, under their sources' own IDs."""
    folder = tmp_path_factory.mktemp("real")
    tables = ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt")
    nih = {"images_1": "nih/images", "images_2": "nih_more/images", **{name: f"nih/{name}" for name in tables}}
    siim = {
        "dicom-images-train/1": "siim/dicom-images-train",
        "dicom-images-train/2": "siim_more/dicom-images-train",
        "train-rle.csv": "siim/train-rle.csv",
    }
    roots = {
        "nih": linked(real, folder / "nih", nih),
        "siim": linked(real, folder / "siim", siim),
        "rsna": str(real / "rsna"),
    }
    settings = Pack(size=96, patient_ids="original", samples_per_shard=100)
    made = {}
    for name, root in roots.items():
        own = settings.model_copy(update={"masks": name == "siim"})
        made[name] = str(folder / f"{name}-out")
        build.build_shards(name, root, own, made[name], local=True)
    return made


def table_of(real: Path) -> dict[str, list[dict[str, str]]]:
    """patientId -> its rows, read with nothing of ours."""
    rows: dict[str, list[dict[str, str]]] = {}
    with (real / "rsna" / "stage_2_train_labels.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["patientId"], []).append(row)
    return rows


def same_in_nih(real: Path, *folders: str) -> dict[str, str]:
    """Image -> the NIH image that it is."""
    pairs: dict[str, str] = {}
    for folder in folders:
        with (real / folder / "same_image_in_nih.csv").open() as file:
            pairs.update(
                (row["rsna_id" if "rsna_id" in row else "siim_id"], row["nih_id"]) for row in csv.DictReader(file)
            )
    return pairs


def samples(root: str) -> Iterator[dict[str, Any]]:
    """The JSON of every sample."""
    for path in sorted(Path(root).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield json.loads(content.read())


def test_boxes_and_labels_of_all_183_files_are_those_of_the_table(datasets: dict[str, str], real: Path) -> None:
    table, seen, boxes = table_of(real), 0, 0
    for sample in samples(datasets["rsna"]):
        rows = table[sample["image_id"]]
        expected = [[float(row[name]) for name in ("x", "y", "width", "height")] for row in rows if row["x"]]
        assert [box[1:] for box in sample["boxes"]] == expected
        assert all(x + width <= 1024 and y + height <= 1024 for x, y, width, height in expected)
        assert sample["labels"] == {"Pneumonia": int(rows[0]["Target"])}
        assert sample["original_size"] == [1024, 1024]
        seen += 1
        boxes += bool(expected)
    assert (seen, boxes) == (183, 61)
    data = manifest.load(datasets["rsna"])
    assert set(data.column("view")) == {"PA", "AP"}


def pairs(result: Audit, one: str, other: str) -> set[tuple[str, str]]:
    """The duplicates between two datasets, as (image of the one, image of the other)."""
    found = set()
    for pair in result.leaks.duplicates.between_datasets:
        images = dict(zip(pair.datasets, pair.images, strict=True))
        if set(images) == {one, other}:
            found.add((images[one], images[other]))
    return found


def test_the_audit_finds_every_image_that_the_three_sources_share(datasets: dict[str, str], real: Path) -> None:
    nih, siim, rsna = (datasets[name] for name in ("nih", "siim", "rsna"))
    here = set(manifest.load(nih).image_id.tolist())
    rsna_pairs, siim_pairs = same_in_nih(real, "rsna"), same_in_nih(real, "siim", "siim_more")
    result = audit.audit(nih, siim, rsna)
    assert pairs(result, rsna, nih) == {(own, name) for own, name in rsna_pairs.items() if name in here}
    assert len(pairs(result, rsna, nih)) == 73 + 27
    assert pairs(result, siim, nih) == set(siim_pairs.items())
    assert len(pairs(result, siim, nih)) == 37 + 14
    both = {(a, b) for a, name in siim_pairs.items() for b, other in rsna_pairs.items() if name == other}
    assert pairs(result, siim, rsna) == both
    assert len(both) == 22


def test_the_recipe_runs_end_to_end_with_two_confusion_matrices(real: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "shards")
    settings = Pack(size=96, patient_ids="original", test_fraction=0.3, val_fraction=0.25)
    build.build_shards("rsna", str(real / "rsna"), settings, root, local=True)
    data = manifest.load(root)
    assert splits.overlapping_patients(data.patient.tolist(), data.split.tolist()) == []
    mean, std = data.metadata[0]["pixel_mean"], data.metadata[0]["pixel_std"]
    overrides = [
        *SMALL,
        f"data.shards=[{root}]",
        f"tracking.runs_dir={tmp_path / 'runs'}",
        "tracking.name=rsna",
        f"augment.mean={mean}",
        f"augment.std={std}",
    ]
    from cxrscale.cli.progress import watch_run

    trained = run.Run(launch.launch(config.load_recipe(str(RECIPE), overrides), "rsna", watch_run, local=True))
    trained.choose_thresholds(resamples=200)
    result = trained.evaluate(resamples=200)
    finding = result.findings["Pneumonia"]
    scores = trained.predictions("test")
    truth = {name: int(rows[0]["Target"]) for name, rows in table_of(real).items()}
    label_N = np.array([truth[name] for name in scores.image_id.tolist()])
    assert finding.at_threshold is not None
    matrices = [finding.at_threshold, *finding.report_at]
    assert [matrix.threshold for matrix in matrices] == [0.5, 0.25]
    for matrix in matrices:
        called_N = scores.probability_NF[:, 0] >= matrix.threshold
        expected = {
            "tp": int((called_N & (label_N == 1)).sum()),
            "fp": int((called_N & (label_N == 0)).sum()),
            "fn": int((~called_N & (label_N == 1)).sum()),
            "tn": int((~called_N & (label_N == 0)).sum()),
        }
        assert dict(matrix.confusion) == expected
        assert sum(expected.values()) == result.images == (data.split == "test").sum()
    print({f"{matrix.threshold}": dict(matrix.confusion) for matrix in matrices}, finding.auroc)

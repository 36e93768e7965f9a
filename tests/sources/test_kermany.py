"""The Kermany reader: patients from file names, labels from folders, and the published files if present."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.config.findings import ABSENT, PRESENT
from cxrscale.io.images import encode_jpeg, load_image
from cxrscale.shards import build, duplicates, manifest, splits
from cxrscale.sources import kermany
from cxrscale.types import UserError
from tests.dicom_files import gray_image
from tests.shards.test_duplicates import prints

NAMES = (
    "train/NORMAL/IM-0115-0001.jpeg",
    "train/NORMAL/NORMAL2-IM-0383-0001.jpeg",
    "train/NORMAL/NORMAL2-IM-0383-0001-0002.jpeg",
    "train/PNEUMONIA/person1_bacteria_1.jpeg",
    "train/PNEUMONIA/person1_bacteria_2.jpeg",
    "train/PNEUMONIA/person447_virus_921_1.jpeg",
    "val/NORMAL/NORMAL2-IM-1427-0001.jpeg",
    "val/PNEUMONIA/person1946_bacteria_4874.jpeg",
    "test/NORMAL/IM-0001-0001.jpeg",
    "test/PNEUMONIA/person1_virus_6.jpeg",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encode_jpeg(gray_image(48, 48, seed=seed)))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("person1000_bacteria_2931", "person1000_bacteria"),
        ("person1000_virus_1681", "person1000_virus"),
        ("person447_virus_921_1", "person447_virus"),
        ("IM-0115-0001", "IM-0115"),
        ("IM-0523-0001-0003", "IM-0523"),
        ("NORMAL2-IM-0115-0001", "NORMAL2-IM-0115"),
        ("NORMAL2-IM-0246-0001-0002", "NORMAL2-IM-0246"),
        ("BACTERIA-7422-0001", "7422"),
        ("NORMAL-28501-0002", "28501"),
        ("person1_covid_1", None),
        ("person1_bacteria_1 (copy)", None),
        ("", None),
    ],
)
def test_the_file_name_contains_the_patient(name: str, patient: str | None) -> None:
    assert kermany.patient_id(name) == patient


@given(number=st.integers(0, 9999), image=st.integers(0, 9999), kind=st.sampled_from(["bacteria", "virus"]))
def test_every_image_of_a_patient_names_only_that_patient(number: int, image: int, kind: str) -> None:
    assert kermany.patient_id(f"person{number}_{kind}_{image}") == f"person{number}_{kind}"
    assert kermany.patient_id(f"IM-{number:04d}-{image:04d}") == f"IM-{number:04d}"


def test_folders_give_finding_and_split(root: Path) -> None:
    records = sources.read("kermany", str(root)).records
    assert [record.image_id for record in records] == sorted(
        name.removesuffix(".jpeg").replace("/", "-") for name in NAMES
    )
    for record in records:
        part, state, _ = record.image_id.split("-", 2)
        assert record.split == ("test" if part == "test" else "train_val")
        assert record.findings == {"Pneumonia": PRESENT if state == "PNEUMONIA" else ABSENT}
        assert Path(record.path).is_file()
        assert record.source == "kermany"
    assert {r.patient for r in records if r.split == "test"} == {"IM-0001", "person1_virus"}


def test_the_source_becomes_a_dataset_with_the_published_test_split(root: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "shards")
    build.build_shards("kermany", str(root), Pack(size=32, val_fraction=0.25), out, local=True)
    table = manifest.load(out)
    assert table.split_counts() == {"test": 2, "train": 6, "val": 2}
    assert splits.overlapping_patients(table.patient.tolist(), table.split.tolist()) == []


def test_files_that_are_not_images_are_skipped(root: Path) -> None:
    for name in (".DS_Store", "train/.DS_Store", "train/NORMAL/._IM-0115-0001.jpeg", "train/NORMAL/Thumbs.db"):
        (root / name).write_bytes(b"")
    assert len(kermany.read(str(root)).records) == len(NAMES)


def test_upper_case_suffixes_count_and_file_addresses_are_local(root: Path) -> None:
    (root / "test/NORMAL/IM-0003-0001.JPG").write_bytes(b"")
    records = kermany.read(f"file://{root}").records
    assert "test-NORMAL-IM-0003-0001" in {record.image_id for record in records}
    assert records == kermany.read(str(root)).records


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/NORMAL/holiday.jpeg", "the file name does not contain the patient"),
        ("train/NORMAL/IM-0115-0001.jpg", "IM-0115-0001.jpg has the same name as|same name as .*IM-0115-0001.jpg"),
        ("train/COVID/person1_virus_1.jpeg", "'COVID' is neither NORMAL nor PNEUMONIA"),
    ],
)
def test_impossible_files_and_folders_are_named(root: Path, name: str, message: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        kermany.read(str(root))


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.jpeg in train or val or test/NORMAL or PNEUMONIA"):
        kermany.read(str(tmp_path))


def test_the_published_names(real: Path) -> None:
    records = kermany.read(str(real / "kermany")).records
    assert Counter((r.split, r.findings["Pneumonia"]) for r in records) == {
        ("train_val", PRESENT): 3875,
        ("train_val", ABSENT): 1341,
        ("test", PRESENT): 390,
        ("test", ABSENT): 234,
    }
    patients, published = [r.patient for r in records], [str(r.split) for r in records]
    assert splits.overlapping_patients(patients, published) == []
    assert len(set(patients)) == 4082
    split = splits.official(patients, published, 0.1, seed=0)
    assert splits.overlapping_patients(patients, split.tolist()) == []
    assert (split == "val").sum() == round(0.1 * 5216)


@pytest.mark.slow
def test_the_published_duplicates_stay_within_a_part(real: Path) -> None:
    records = kermany.read(str(real / "kermany")).records
    pairs = duplicates.find_within(*prints([load_image(Path(r.path).read_bytes()).image_HW for r in records]))
    patients, part = [r.patient for r in records], [str(r.split) for r in records]
    assert len({b for _, b in pairs.tolist()}) == 32
    assert {(part[a], part[b]) for a, b in pairs.tolist()} == {("train_val", "train_val"), ("test", "test")}
    joined = duplicates.merge_patients(patients, pairs.tolist())
    assert {name for name, old in zip(joined, patients, strict=True) if name != old} == {"NORMAL2-IM-0095"}
    assert splits.overlapping_patients(joined, part) == []

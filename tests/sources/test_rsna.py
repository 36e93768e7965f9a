"""The RSNA reader: boxes and labels from the label table, for the DICOM files that are present."""

import csv
import io
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.config.findings import ABSENT, PRESENT
from cxrscale.io.images import load_image
from cxrscale.shards import build, manifest, splits
from cxrscale.sources import rsna
from cxrscale.types import Box, UserError
from tests.dicom_files import dicom_file, gray_image

SICK = "00436515-870c-4b36-a041-de91049b9ab4"
HEALTHY = "0004cfab-14fd-4e49-80ba-63a80b6bddd6"
OTHER = "00313ee0-9eaa-42f4-b0ab-c148ed3241cd"
UNSEEN = "0000a175-0e68-4ca4-b1af-167204a7e0bc"
HEADER = "patientId,x,y,width,height,Target\n"
TABLE = (
    HEADER
    + f"{HEALTHY},,,,,0\n{OTHER},,,,,0\n{SICK},264.0,152.0,213.0,379.0,1\n{SICK},562.0,152.0,256.0,453.0,1\n"
    + "row-without-a-file,1,2,3,4,1\n"
)
CLASSES = (
    f"patientId,class\n{HEALTHY},Normal\n{OTHER},No Lung Opacity / Not Normal\n{SICK},Lung Opacity\n{SICK},Lung Opacity"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three labeled images and one of the test folder, in the layout of the challenge."""
    for seed, (folder, name) in enumerate(
        [*((rsna.FOLDERS[0], name) for name in (SICK, HEALTHY, OTHER)), (rsna.FOLDERS[1], UNSEEN)]
    ):
        path = tmp_path / folder / f"{name}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(dicom_file(gray_image(seed=seed), PatientSex="F", PatientAge="51", ViewPosition="PA"))
    (tmp_path / rsna.LABEL_TABLE).write_text(TABLE)
    (tmp_path / rsna.CLASS_TABLE).write_text(CLASSES)
    return tmp_path


def test_images_have_their_boxes_and_labels(root: Path) -> None:
    records = sources.read("rsna", str(root)).records
    assert [record.image_id for record in records] == sorted([SICK, HEALTHY, OTHER, UNSEEN])
    by_id = {record.image_id: record for record in records}
    assert by_id[SICK].boxes == (Box("Pneumonia", 264, 152, 213, 379), Box("Pneumonia", 562, 152, 256, 453))
    assert {name: record.findings for name, record in by_id.items()} == {
        SICK: {"Pneumonia": PRESENT},
        HEALTHY: {"Pneumonia": ABSENT},
        OTHER: {"Pneumonia": ABSENT},
        UNSEEN: {},
    }
    assert all(record.patient == record.image_id and record.split is None for record in records)
    assert all(record.source == "rsna" and record.rles is None for record in records)
    loaded = load_image(Path(by_id[SICK].path).read_bytes())
    assert np.array_equal(loaded.image_HW, gray_image(seed=0))


def test_the_source_becomes_a_dataset(root: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "shards")
    build.build_shards("rsna", str(root), Pack(size=32, val_fraction=0.4, test_fraction=0.3), out, local=True)
    table = manifest.load(out)
    assert table.findings() == ("Pneumonia",)
    assert table.split_counts()[build.UNLABELED] == 1
    assert splits.overlapping_patients(table.patient.tolist(), table.split.tolist()) == []
    assert set(table.column("view")) == {"PA"}  # from the DICOM header; no table has it


def test_the_class_table_may_be_absent(root: Path) -> None:
    (root / rsna.CLASS_TABLE).unlink()
    assert len(rsna.read(str(root)).records) == 4


def test_a_file_address_is_a_local_path(root: Path) -> None:
    assert rsna.read(f"file://{root}").records == rsna.read(str(root)).records


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{SICK},,,,,0", f"line 7: patient {SICK} has Target 0 and Target 1"),
        (f"{HEALTHY},1,2,3,4,1", f"line 7: patient {HEALTHY} has Target 0 and Target 1"),
        ("new,1,2,3,4,0", "line 7: patient new has Target 0 and a box"),
        ("new,,,,,", "line 7: Target of new is '', not 0 or 1"),
        ("new,,,,,2", "line 7: Target of new is '2', not 0 or 1"),
        ("new,1,2,,4,1", "line 7: the box of patient new is not four numbers"),
        ("new,1,2,0,4,1", "line 7: the box of patient new is not four numbers with an area"),
        ("new,nan,2,3,4,1", "line 7: the box of patient new is not four numbers"),
        ("new,1,2,inf,4,1", "line 7: the box of patient new is not four numbers"),
        ("new,,,,0", "line 7: the row of 'new' needs 6 values"),
        ("new,,,,,0,0", "line 7: the row of 'new' needs 6 values"),
        (",1,2,3,4,1", "line 7: patientId '' is not the name of an image"),
        ('"new\nnext",,,,,0', r"line 8: patientId 'new\\nnext' is not the name of an image"),
    ],
)
def test_an_impossible_row_is_named(root: Path, row: str, message: str) -> None:
    (root / rsna.LABEL_TABLE).write_text(TABLE + row + "\n")
    with pytest.raises(UserError, match=message):
        rsna.read(str(root))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"patientId,x,y,width,height\n", "no column 'Target'"),
        (b"", "not a readable CSV table"),
        (b'patientId,x,y,width,height,Target\n"a', "not a readable CSV table"),
        (b"patientId,x,y,width,height,Target\n\xff\xfe", "not a readable CSV table"),
    ],
)
def test_a_damaged_table_is_refused(root: Path, text: bytes, message: str) -> None:
    (root / rsna.LABEL_TABLE).write_bytes(text)
    with pytest.raises(UserError, match=message):
        rsna.read(str(root))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{HEALTHY},Lung Opacity", f"patient {HEALTHY} is 'Normal' and 'Lung Opacity'"),
        ("new,Ill", "class 'Ill' of new is not one of Lung Opacity"),
    ],
)
def test_an_impossible_class_is_named(root: Path, row: str, message: str) -> None:
    (root / rsna.CLASS_TABLE).write_text(CLASSES + "\n" + row)
    with pytest.raises(UserError, match=message):
        rsna.read(str(root))


def test_tables_that_contradict_each_other_are_refused(root: Path) -> None:
    (root / rsna.CLASS_TABLE).write_text(f"patientId,class\n{SICK},Normal\n")
    with pytest.raises(UserError, match=f"patient {SICK} is 'Normal', but has Target 1"):
        rsna.read(str(root))


def test_missing_files_are_named(root: Path, tmp_path: Path) -> None:
    (root / rsna.LABEL_TABLE).unlink()
    with pytest.raises(UserError, match=f"no {rsna.LABEL_TABLE}"):
        rsna.read(str(root))
    with pytest.raises(UserError, match=r"no \.dcm file in stage_2_train_images or stage_2_test_images"):
        rsna.read(str(tmp_path / "elsewhere"))


def test_a_name_in_both_folders_is_refused(root: Path) -> None:
    (root / rsna.FOLDERS[1] / f"{SICK}.dcm").write_bytes(b"")
    with pytest.raises(UserError, match=f"{SICK}.dcm is in two folders"):
        rsna.read(str(root))


@given(
    boxes=st.lists(st.lists(st.tuples(*[st.integers(1, 1023)] * 4), max_size=4), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_any_table_is_read_back(
    boxes: list[list[tuple[int, int, int, int]]], order: Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows: list[tuple[str | int, ...]] = [(f"p{n}", *box, 1) for n, own in enumerate(boxes) for box in own]
    rows += [(f"p{n}", "", "", "", "", 0) for n, own in enumerate(boxes) if not own]
    order.shuffle(rows)
    text = io.StringIO()
    csv.writer(text).writerows([HEADER.strip().split(","), *rows])
    path = tmp_path_factory.mktemp("table") / "labels.csv"
    path.write_text(text.getvalue())
    table = rsna.read_table(str(path))
    assert {name: sorted((b.x, b.y, b.width, b.height) for b in own) for name, own in table.items()} == {
        f"p{n}": sorted(own) for n, own in enumerate(boxes)
    }

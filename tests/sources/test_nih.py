"""The NIH reader: both editions of the label table, boxes, split lists, and tables that are not as published."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from cxrscale import sources
from cxrscale.config.findings import ABSENT, NIH14
from cxrscale.sources import nih
from cxrscale.types import Box, UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real ChestX-ray14 files beside the checkout")

HEADER_2020 = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS_2020 = (
    "00000001_000.png,Cardiomegaly|Emphysema,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,58,M,AP,2500,2048,0.168,0.171",
    "00000002_000.png,Hernia,0,2,80,F,PA,2500,2048,0.171,0.171",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images with rows, in two folders, and one without; a row without an image."""
    for folder, name in (("images_001", "00000001_000.png"), ("images_012", "00000001_001.png")):
        image(tmp_path / folder / "images" / name)
    image(tmp_path / "images_012" / "images" / "00000009_003.png")
    table(tmp_path)
    return tmp_path


def image(path: Path, height: int = 8, width: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(cv2.imencode(".png", np.zeros((height, width), np.uint8))[1]))


def table(root: Path, *rows: str, header: str = HEADER_2020, name: str = "Data_Entry_2017_v2020.csv") -> Path:
    path = root / name
    path.write_text("\n".join([header, *(rows or ROWS_2020)]) + "\n")
    return path


def test_a_record_holds_the_values_of_all_tables(root: Path) -> None:
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        "00000001_000.png,Infiltrate,1.5,2.5,3.5,4.5\n"
        "00000001_000.png,Mass,5,6,7,8,,,\n"
    )
    (root / "train_val_list.txt").write_text("00000001_000.png\n")
    (root / "test_list.txt").write_text("00000001_001.png\r\n00000009_003.png")
    first, second, third = sources.read("nih", str(root)).records
    assert (first.image_id, first.source, first.patient) == ("00000001_000.png", "nih", "00000001")
    assert first.path == str(root / "images_001" / "images" / "00000001_000.png")
    assert set(first.findings) == set(NIH14)
    assert {name for name, state in first.findings.items() if state} == {"Cardiomegaly", "Emphysema"}
    assert (first.view, first.sex, first.age, first.split) == ("PA", "M", 57, "train_val")
    assert first.boxes == (Box("Infiltration", 1.5, 2.5, 3.5, 4.5), Box("Mass", 5.0, 6.0, 7.0, 8.0))
    assert first.rles is None
    assert set(second.findings.values()) == {ABSENT}
    assert (second.view, second.split, second.boxes) == ("AP", "test", ())
    assert (third.image_id, third.patient, dict(third.findings)) == ("00000009_003.png", "00000009", {})
    assert (third.split, third.view, third.sex, third.age, third.spacing_mm) == ("test", None, None, None, None)


def test_spacing_is_for_the_published_image_and_not_for_the_scan(root: Path) -> None:
    _, second, _ = nih.read(str(root)).records
    assert second.tables_HW == (1024, 1024)
    assert second.spacing_mm == pytest.approx((2048 * 0.171 / 1024, 2500 * 0.168 / 1024))


def test_the_older_table_means_the_same(root: Path) -> None:
    expected = nih.read(str(root)).records
    (root / "Data_Entry_2017_v2020.csv").unlink()
    table(root, *(row + "," for row in ROWS_2020), header=HEADER_2020 + ",", name="Data_Entry_2017.csv")
    assert nih.read(str(root)).records == expected
    table(root, *ROWS_2020, header=HEADER_2020 + ",", name="Data_Entry_2017.csv")
    assert nih.read(str(root)).records == expected
    table(root, *ROWS_2020, header=HEADER_2020.replace("Gender", "Sex"), name="Data_Entry_2017.csv")
    assert nih.read(str(root)).records == expected


def test_the_newer_table_is_preferred(root: Path) -> None:
    expected = nih.read(str(root)).records
    table(root, ROWS_2020[0].replace("57", "414"), name="Data_Entry_2017.csv")
    assert nih.read(str(root)).records == expected


@pytest.mark.parametrize(
    ("text", "age"),
    [
        *(("411", None), ("120", 120), ("058Y", 58), ("013M", 1), ("009D", 0), ("", None), ("-1", None)),
        *(("43800D", 119), ("9" * 400, None), ("9" * 400 + "M", None), ("9" * 5000, None), ("٥٨", None)),
    ],
)
def test_ages_are_read_in_years(root: Path, text: str, age: int | None) -> None:
    path = table(root, ROWS_2020[0].replace(",57,", f",{text},"))
    assert nih.read_table(str(path))["00000001_000.png"].age == age


def test_a_table_may_have_only_the_needed_columns(root: Path) -> None:
    path = table(root, "a.png,Mass,7", header="Image Index,Finding Labels,Patient ID")
    entry = nih.read_table(str(path))["a.png"]
    assert (entry.patient, entry.view, entry.sex, entry.age, entry.scan_mm) == ("00000007", None, None, None, None)


@pytest.mark.parametrize("folder", ["", "images", "images_007", "images_007/images"])
def test_images_may_lie_in_any_published_folder(tmp_path: Path, folder: str) -> None:
    table(tmp_path)
    image(tmp_path / folder / "00000001_000.png")
    assert [Path(record.path) for record in nih.read(str(tmp_path)).records] == [tmp_path / folder / "00000001_000.png"]


def test_roots_of_all_kinds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = nih.read(str(root)).records
    assert nih.read(f"file://{root}").records == expected
    monkeypatch.chdir(root.parent)
    assert nih.read(root.name).records == expected
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/nih-copy", recursive=True)
    try:
        remote = nih.read("memory://nih-copy").records
    finally:
        memory.rm("/nih-copy", recursive=True)
    assert [record.findings for record in remote] == [record.findings for record in expected]
    assert remote[0].path == "memory://nih-copy/images_001/images/00000001_000.png"


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        ("Image Index,Patient ID", "a.png,1", "'Finding Labels'"),
        ("Image Index,Finding Labels,Patient ID", "a.png,Measles,1", "'Measles'"),
        ("Image Index,Finding Labels,Patient ID", "a.png,,1", "Finding Labels ''"),
        ("Image Index,Finding Labels,Patient ID", "a.png,Mass,one", "line 2: Patient ID 'one' of 'a.png'"),
        ("Image Index,Finding Labels,Patient ID", "a.png,Mass,٣", "Patient ID '٣' of 'a.png' is not a number"),
        ("Image Index,Finding Labels,Patient ID", "a.png,Mass,²", "Patient ID '²' of 'a.png' is not a number"),
        ("Image Index,Finding Labels,Patient ID", "a.png,Mass,1\na.png,Mass,1", "line 3: second row for 'a.png'"),
        ("Image Index,Finding Labels,Patient ID", ",Mass,1", "line 2: Image Index '' is not the name"),
        (
            "Image Index,Finding Labels,Patient ID",
            '"a\nb.png",Mass,1',
            r"line 3: Image Index 'a\\nb.png' is not the name of",
        ),
        ("Image Index,Finding Labels,Patient ID", 'a.png,"Mass\n",one', "line 3: Patient ID 'one' of 'a.png'"),
        ("Image Index,Finding Labels,Patient ID", 'a.png,"\nx",1', r"Finding Labels '\\nx'"),
        ("Image Index,Finding Labels,Patient ID", 'a.png,Mass,"\r\n1"', r"Patient ID '\\r\\n1' of 'a.png'"),
        ("Image Index,Finding Labels,Patient ID", 'a.png,"Mass,1', "not a readable CSV"),
    ],
)
def test_impossible_label_tables_are_refused(root: Path, header: str, row: str, words: str) -> None:
    table(root, row, header=header)
    with pytest.raises(UserError, match=words) as caught:
        nih.read(str(root))
    assert "Data_Entry_2017_v2020.csv" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("number", range(len(ROWS_2020)))
@pytest.mark.parametrize("end", ["", ","])
def test_a_row_with_one_value_too_many_or_too_few_is_refused(tmp_path: Path, number: int, end: str) -> None:
    """Otherwise the values after it move to other columns: Follow-up # would become the patient."""
    cells = ROWS_2020[number].split(",")
    for at in range(len(cells)):
        for damaged in (
            [*cells[:at], "Mass", *cells[at:]],
            [*cells[:at], "", *cells[at:]],
            cells[:at] + cells[at + 1 :],
        ):
            rows = [row + end for row in ROWS_2020]
            rows[number] = ",".join(damaged) + end
            path = table(tmp_path, *rows, header=HEADER_2020 + end)
            words = rf"v2020\.csv, line {number + 2}: the row of .* needs 11 values, as many as the header; use"
            with pytest.raises(UserError, match=words):
                nih.read_table(str(path))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_empty_rows_and_a_byte_order_mark(tmp_path: Path, end: str) -> None:
    expected = nih.read_table(str(table(tmp_path)))
    path = tmp_path / "table.csv"
    path.write_bytes(end.join(["", HEADER_2020, *ROWS_2020, "," * 10, " ", ""]).encode("utf-8-sig"))
    assert nih.read_table(str(path)) == expected


def test_long_cells_are_shortened_in_messages(tmp_path: Path) -> None:
    name, junk = "a" * 5000, "\u2028" * 5000
    for row in (f"{name},Mass,{junk}", f"{name},{junk},1", f"{junk},Mass,1", f"{name},Mass,1,{junk}"):
        path = table(tmp_path, row, header="Image Index,Finding Labels,Patient ID")
        with pytest.raises(UserError) as caught:
            nih.read_table(str(path))
        message = str(caught.value).removeprefix(str(path))
        assert len(message) < 400
        assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Image Index,Finding Label\n", "'Bbox"),
        ("Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Measles,1,2,3,4\n", "'Measles' of 'a.png'"),
        ("Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Mass,1,2,x,4\n", "'a.png' is not four numbers"),
        (
            "Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Mass,1,2,3\n",
            "line 2: the row of 'a.png' needs 6 values",
        ),
        ("Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,Mass,0,1,2,3,4\n", "line 2: the row of 'a.png' needs 6"),
        (
            "Image Index,Finding Label,Bbox [x,y,w,h]\na.png,Mass,1,2,3,4\nb.png,Mass,1,2,3,4,\n",
            "line 3: the row of 'b",
        ),
        (
            'Image Index,Finding Label,Bbox [x,y,w,h],,,\n"a\n.png",Mass,1,2,3,4\n',
            r"Image Index 'a\\n.png' is not the name of",
        ),
        ('Image Index,Finding Label,Bbox [x,y,w,h],,,\na.png,"\n",1,2,3,4\n', r"finding '\\n' of 'a.png'"),
        ("", "not a readable CSV"),
        ("\n\n", "not a readable CSV"),
    ],
)
def test_impossible_box_tables_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        nih.read_boxes(str(path))
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files_are_named(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="no PNG files there; expected them in images_001/images"):
        nih.read(str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(UserError, match="nowhere: no PNG files there"):
        nih.read(str(root / "nowhere"))
    (root / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(UserError, match=r"no Data_Entry_2017_v2020\.csv or .* sample_labels\.csv; put the label"):
        nih.read(str(root))


def test_a_name_in_two_folders_or_two_lists_is_refused(root: Path) -> None:
    (root / "train_val_list.txt").write_text("00000001_000.png\n")
    (root / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(UserError, match=r"test_list.txt: '00000001_000.png' is also in train_val_list.txt"):
        nih.read(str(root))
    image(root / "images" / "00000001_000.png")
    with pytest.raises(UserError, match="is in two folders") as caught:
        nih.read(str(root))
    assert str(root / "images" / "00000001_000.png") in str(caught.value)
    assert str(root / "images_001" / "images" / "00000001_000.png") in str(caught.value)


@real
def test_the_real_label_table() -> None:
    entries = nih.read_table(str(REAL / "Data_Entry_2017_v2020.csv"))
    assert len(entries) == 112_120
    assert len({entry.patient for entry in entries.values()}) == 30_805
    assert all(entry.patient == image_id[:8] for image_id, entry in entries.items())
    counts = {name: sum(entry.findings[name] for entry in entries.values()) for name in NIH14}
    assert counts["Atelectasis"] == 11_559
    assert counts["Hernia"] == 227
    assert counts["Pneumothorax"] == 5_302
    assert counts["Pneumonia"] == 1_431
    assert sum(not any(entry.findings.values()) for entry in entries.values()) == 60_361
    assert {entry.view for entry in entries.values()} == {"PA", "AP"}
    assert {entry.sex for entry in entries.values()} == {"F", "M"}
    assert all(entry.age is not None and entry.scan_mm is not None for entry in entries.values())


@real
def test_the_real_boxes() -> None:
    boxes = nih.read_boxes(str(REAL / "BBox_List_2017.csv"))
    assert len(boxes) == 880
    everything = list(itertools.chain.from_iterable(boxes.values()))
    assert len(everything) == 984
    assert sum(box.finding == "Infiltration" for box in everything) == 123
    assert all(box.x + box.width <= 1024 and box.y + box.height <= 1024 for box in everything)


@real
def test_the_real_images() -> None:
    records = nih.read(str(REAL)).records
    assert len(records) == 240
    assert all(len(record.findings) == 14 and record.split in ("train_val", "test") for record in records)
    assert sum(bool(record.boxes) for record in records) == 6
    assert all(record.split == "test" for record in records if record.boxes)
    # 1024 pixels across a chest image of 30 to 45 cm
    assert all(
        record.spacing_mm and 0.25 < min(record.spacing_mm) <= max(record.spacing_mm) < 0.5 for record in records
    )

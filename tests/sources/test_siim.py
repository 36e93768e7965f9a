"""The SIIM reader: masks of one or more annotators, both layouts, and tables that are not as published."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from cxrscale import sources
from cxrscale.config.findings import ABSENT, PRESENT
from cxrscale.io import storage
from cxrscale.sources import siim
from cxrscale.types import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "siim"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no real SIIM-ACR files beside the checkout")

ROWS = ("1.2.3, -1", "1.2.4, 5 2 3 1", "1.2.5,7 1", "1.2.5, 6 4", "1.2.9, -1")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images: absent, one row, two rows, no row; and a row without an image. No reader opens the files."""
    for uid in ("1.2.3", "1.2.4", "1.2.5", "1.2.6"):
        dicom(tmp_path / "dicom-images-train" / f"9.{uid}" / f"8.{uid}" / f"{uid}.dcm")
    table(tmp_path)
    return tmp_path


def dicom(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


def table(root: Path, *rows: str, header: str = "ImageId, EncodedPixels", name: str = "train-rle.csv") -> Path:
    path = root / name
    path.write_text("\n".join([header, *(rows or ROWS)]) + "\n")
    return path


def test_records_hold_masks_and_labels(root: Path) -> None:
    absent, one, two, unlabeled = sources.read("siim", str(root)).records
    assert (absent.image_id, absent.source, absent.patient) == ("1.2.3", "siim", "1.2.3")
    assert absent.path == str(root / "dicom-images-train" / "9.1.2.3" / "8.1.2.3" / "1.2.3.dcm")
    assert (dict(absent.findings), absent.rles) == ({"Pneumothorax": ABSENT}, ())
    assert (dict(one.findings), one.rles) == ({"Pneumothorax": PRESENT}, ("5 2 3 1",))
    assert (dict(two.findings), two.rles) == ({"Pneumothorax": PRESENT}, ("7 1", "6 4"))
    assert (dict(unlabeled.findings), unlabeled.rles) == ({}, None)
    assert (one.split, one.view, one.sex, one.age, one.spacing_mm, one.boxes) == (None, None, None, None, None, ())


def test_headers_and_values_may_have_a_space(root: Path) -> None:
    expected = siim.read(str(root)).records
    table(root, *(row.replace(", ", ",") for row in ROWS), header="ImageId,EncodedPixels")
    assert siim.read(str(root)).records == expected


def test_the_second_stage_table_is_preferred(root: Path) -> None:
    table(root, "1.2.3, 4 4", name="stage_2_train.csv")
    first, *others = siim.read(str(root)).records
    assert first.rles == ("4 4",)
    assert all(record.rles is None for record in others)


def test_a_row_with_a_mask_counts_more_than_rows_without(tmp_path: Path) -> None:
    path = table(tmp_path, "a, -1", "a, 5 2", "a, -1")
    assert siim.read_table(str(path)) == {"a": ("5 2",)}


def test_files_may_lie_flat_under_kaggles_names(tmp_path: Path) -> None:
    dicom(tmp_path / "dicom-images-train" / "ID_00a.dcm")
    dicom(tmp_path / "ID_00b.DCM")
    table(tmp_path, "ID_00a, -1", "ID_00b, 1 1")
    first, second = siim.read(str(tmp_path)).records
    assert (first.image_id, first.rles) == ("ID_00a", ())
    assert (second.image_id, second.rles) == ("ID_00b", ("1 1",))


def test_roots_of_all_kinds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = siim.read(str(root)).records
    assert siim.read(f"file://{root}").records == expected
    monkeypatch.chdir(root.parent)
    assert siim.read(root.name).records == expected
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/siim-copy", recursive=True)
    try:
        remote = siim.read("memory://siim-copy").records
        assert storage.read(remote[0].path) == b""
    finally:
        memory.rm("/siim-copy", recursive=True)
    assert [record.rles for record in remote] == [record.rles for record in expected]
    assert remote[0].path.endswith("/siim-copy/dicom-images-train/9.1.2.3/8.1.2.3/1.2.3.dcm")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ImageId, Pixels\na, -1\n", "no column 'EncodedPixels'"),
        ("Id, EncodedPixels\na, -1\n", "no column 'ImageId'"),
        ("ImageId, EncodedPixels\na,\n", "line 2: EncodedPixels of 'a' is empty; write -1 for"),
        ("ImageId, EncodedPixels\na,-1\n , 1 2\n", "line 3: ImageId '' is not the name of an image; correct the row"),
        ('ImageId, EncodedPixels\n"a\nb",\n', r"line 3: ImageId 'a\\nb' is not the name of an image"),
        (
            'ImageId, EncodedPixels\na,"1 2\nb,-1\nc,3"\n',
            r"line 4: EncodedPixels of 'a' is damaged: '1 2\\nb,-1\\nc,3'",
        ),
        (
            "ImageId, EncodedPixels\na, 1 2, 3 4\nb,-1\n",
            "line 2: the row of 'a' needs 2 values, as many as the header; use the",
        ),
        ("ImageId, EncodedPixels\na,-1\nb, 1 2, 3 4\n", "line 3: the row of 'b' needs 2 values"),
        ("ImageId, EncodedPixels\n0,a,-1\n", "line 2: the row of '0' needs 2 values"),
        ("ImageId, EncodedPixels\na\n", "line 2: the row of 'a' needs 2 values"),
        ('ImageId, EncodedPixels\na,"1 2\n', "not a readable CSV"),
        ("", "not a readable CSV"),
    ],
)
def test_impossible_mask_tables_are_refused(root: Path, text: str, words: str) -> None:
    (root / "train-rle.csv").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        siim.read(str(root))
    assert str(root / "train-rle.csv") in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("row", ["{},", '{},"1\n2"', "{},1,2", "\u2028{},-1", "a,{}\u2028", "{}"])
def test_long_cells_are_shortened_in_messages(tmp_path: Path, row: str) -> None:
    path = table(tmp_path, row.replace("{}", "9\u20299" * 5000))
    with pytest.raises(UserError) as caught:
        siim.read_table(str(path))
    message = str(caught.value).removeprefix(str(path))
    assert len(message) < 250
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_empty_rows_and_a_byte_order_mark(tmp_path: Path, end: str) -> None:
    path = tmp_path / "train-rle.csv"
    path.write_bytes(end.join(["", "ImageId, EncodedPixels", "a, -1", ",", "b, 1 2", ""]).encode("utf-8-sig"))
    assert siim.read_table(str(path)) == {"a": (), "b": ("1 2",)}


def test_missing_and_duplicate_files_are_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"no \.dcm file there; expected dicom-images-train"):
        siim.read(str(root / "nowhere"))
    dicom(root / "again" / "1.2.3.dcm")
    with pytest.raises(UserError, match=r"1\.2\.3\.dcm is in two folders") as caught:
        siim.read(str(root))
    assert str(root / "again") in str(caught.value)
    assert str(root / "dicom-images-train") in str(caught.value)
    (root / "again" / "1.2.3.dcm").unlink()
    (root / "train-rle.csv").unlink()
    with pytest.raises(UserError, match=r"no stage_2_train\.csv or train-rle\.csv; put the mask table beside"):
        siim.read(str(root))


@real
def test_the_real_mask_table() -> None:
    masks = siim.read_table(str(REAL / "train-rle.csv"))
    assert len(masks) == 12_047
    assert sum(bool(rles) for rles in masks.values()) == 2_669
    assert sum(len(rles) > 1 for rles in masks.values()) == 624
    assert sum(max(len(rles), 1) for rles in masks.values()) == 12_954
    assert all(rle == rle.strip() for rles in masks.values() for rle in rles)


@real
def test_the_real_images() -> None:
    records = [record for record in siim.read(str(REAL)).records if "dicom-images-train" in record.path]
    assert len(records) == 37
    assert sorted(len(record.rles or ()) for record in records if record.rles) == [1, 1, 1, 2]
    assert all(record.rles is not None for record in records)

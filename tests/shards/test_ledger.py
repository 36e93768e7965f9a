"""What a dataset says about its source: the ledger, the split that was used, and boxes of resized copies."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.io import read_artifact, storage
from cxrscale.shards import build, manifest
from cxrscale.sources import LEDGER, Ledger
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import ImageRecord, UserError
from tests.cli.test_app import run
from tests.dicom_files import dicom_file, gray_image
from tests.sources.test_nih import image, table


@pytest.fixture
def nih(tmp_path: Path) -> Path:
    """Three images of three sizes, one of them without a row, with a box and both split lists."""
    root = tmp_path / "nih"
    for name, (height, width) in {"1_000": (1024, 1024), "2_000": (256, 256), "9_003": (64, 128)}.items():
        image(root / "images" / f"0000000{name}.png", height, width)
    table(root, *(f"0000000{n}_000.png,Mass,0,{n},57,M,PA,2048,1024,0.2,0.4" for n in (1, 2)))
    (root / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
        + "".join(f"{name}.png,Mass,512,256,100,64\n" for name in ("00000001_000", "00000002_000", "00000009_003"))
    )
    (root / "train_val_list.txt").write_text("00000001_000.png\n")
    (root / "test_list.txt").write_text("00000002_000.png\n")
    return root


def members(root: str) -> dict[str, dict[str, Any]]:
    """Image ID -> its JSON."""
    found: dict[str, dict[str, Any]] = {}
    for path in Path(root).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    sample = json.loads(content.read())
                    found[sample["image_id"]] = sample
    return found


def test_a_dataset_stores_its_ledger_without_names(nih: Path, tmp_path: Path) -> None:
    (nih / "images" / "._00000001_000.png").write_bytes(b"")
    out = str(tmp_path / "out")
    build.build_shards("nih", str(nih), Pack(size=32), out, local=True)
    ledger = read_artifact(Ledger, storage.join(out, LEDGER), "shard again")
    assert (ledger.source, ledger.images) == ("nih", 3)
    assert [(t.table, t.rows, t.names, t.matched, t.images_without_row) for t in ledger.tables] == [
        ("Data_Entry_2017_v2020.csv", 2, 2, 2, 1),
        ("BBox_List_2017.csv", 3, 3, 3, None),
        ("train_val_list.txt", 1, 1, 1, None),
        ("test_list.txt", 1, 1, 1, None),
    ]
    assert ledger.tables[0].edition == "2020"
    assert [(item.reason, item.files) for item in ledger.left_out] == [("metadata of macOS", 1)]
    assert ledger.notes == ("1 images are not in train_val_list.txt or test_list.txt and count as train_val",)
    assert "0000000" not in Path(out, LEDGER).read_text()


def test_boxes_and_spacing_follow_the_size_of_each_image(nih: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    build.build_shards("nih", str(nih), Pack(size=32, patient_ids="original"), out, local=True)
    boxes = {str(sample["patient"]): sample["boxes"] for sample in members(out).values()}
    assert boxes == {
        "00000001": [["Mass", 512, 256, 100, 64]],
        "00000002": [["Mass", 128, 64, 25, 16]],
        "00000009": [["Mass", 64, 16, 12.5, 4]],
    }
    rows = {row["patient"]: row for row in manifest.load(out).table.to_pylist()}
    spacing = {name: (row["spacing_row_mm"], row["spacing_column_mm"]) for name, row in rows.items()}
    assert spacing["00000001"] == pytest.approx((0.4, 0.4))
    assert spacing["00000002"] == pytest.approx((1.6, 1.6))
    assert spacing["00000009"] == (None, None)


def test_boxes_of_rsna_follow_the_size_of_a_copy(tmp_path: Path) -> None:
    root, out = tmp_path / "rsna", str(tmp_path / "out")
    (root / "stage_2_train_images").mkdir(parents=True)
    for name, side in (("a", 64), ("b", 1024)):
        (root / "stage_2_train_images" / f"{name}.dcm").write_bytes(dicom_file(gray_image(side, side)))
    rows = "".join(f"{name},264.0,152.0,212.0,380.0,1\n" for name in "ab")
    (root / "stage_2_train_labels.csv").write_text(f"patientId,x,y,width,height,Target\n{rows}")
    build.build_shards("rsna", str(root), Pack(size=32, val_fraction=0, test_fraction=0), out, local=True)
    boxes = [sample["boxes"] for _, sample in sorted(members(out).items())]
    assert sorted(boxes) == [[["Pneumonia", 16.5, 9.5, 13.25, 23.75]], [["Pneumonia", 264, 152, 212, 380]]]


def test_a_missing_official_list_is_an_error_and_no_other_split(nih: Path) -> None:
    (nih / "train_val_list.txt").unlink()
    book = build.prepare("nih", str(nih), Pack(), local=True).book
    assert book is not None
    assert "note: 2 images are not in test_list.txt and count as train_val" in book.lines()
    (nih / "train_val_list.txt").write_text("00000001_000.png\n")
    (nih / "test_list.txt").unlink()
    with pytest.raises(UserError, match=r"test_list\.txt is missing, and without it no image is a test image"):
        build.prepare("nih", str(nih), Pack(), local=True)
    (nih / "train_val_list.txt").unlink()
    with pytest.raises(UserError, match=r"pack\.split=official: nih's official lists are not in its folder; .*random"):
        build.prepare("nih", str(nih), Pack(), local=True)
    assert set(build.prepare("nih", str(nih), Pack(split="random", test_fraction=0.4), local=True).split) >= {"test"}


def test_a_source_without_a_test_list_says_that_its_split_is_random(drawn: SyntheticPaths) -> None:
    book = build.prepare("siim", str(drawn.siim), Pack(masks=True), local=True).book
    assert book is not None
    assert book.lines()[-1] == "note: siim publishes no test list: splits are random by patient"


def test_the_users_lists_may_name_images_as_tables_do(tmp_path: Path) -> None:
    names = ("train/NORMAL/IM-0115-0001.jpeg", "test/PNEUMONIA/person1_virus_6.jpeg", "test/NORMAL/IM-0001-0001.jpeg")
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((8, 8), seed, np.uint8))
    records = sources.read("kermany", str(tmp_path)).records
    lists = {
        "train": "chest_xray\\TRAIN\\NORMAL\\IM-0115-0001.jpeg",
        "val": "person1_virus_6",
        "test": records[0].image_id,
    }
    for split, name in lists.items():
        (tmp_path / f"{split}.txt").write_bytes(f"{name}\r\n".encode("utf-16"))
    settings = Pack(split="lists", split_lists={split: str(tmp_path / f"{split}.txt") for split in lists})
    split_of = dict(zip([record.image_id for record in records], build.assign(records, settings), strict=True))
    assert split_of["train-NORMAL-IM-0115-0001"] == "train"
    assert split_of["test-PNEUMONIA-person1_virus_6"] == "val"
    assert split_of["test-NORMAL-IM-0001-0001"] == "test"


def test_a_name_of_two_images_in_a_list_is_refused(tmp_path: Path) -> None:
    records = [ImageRecord(f"{part}-NORMAL-IM-1", "kermany", f"/data/{part}/NORMAL/IM-1.jpeg", part) for part in "ab"]
    (tmp_path / "list.txt").write_text("IM-1.jpeg\n")
    settings = Pack(split="lists", split_lists={"train": str(tmp_path / "list.txt")})
    labeled = [ImageRecord(r.image_id, r.source, r.path, r.patient, {"Pneumonia": 0}) for r in records]
    with pytest.raises(
        UserError, match=r"'IM-1\.jpeg' is the name of a-NORMAL-IM-1 and b-NORMAL-IM-1; write the whole"
    ):
        build.assign(labeled, settings)


def test_the_command_ends_with_the_ledger(nih: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(nih / "images" / "00000001_000.png", nih / "images" / "00000005_000.jpg")
    code, lines, _ = run(capsys, "shard", "nih", str(nih), "pack.size=32", "--out", str(tmp_path / "out"), "--local")
    assert code == 0
    assert "nih: 3 images found" in lines
    assert "Data_Entry_2017_v2020.csv: 2 rows name images, 2 of them found; 1 images without a row" in lines
    assert "left out: 1 files: JPEG, where the source has PNG" in lines
    assert lines[-2:] == ["3 images, 0 quarantined", str((tmp_path / "out").resolve())]


def test_an_audit_notes_that_labels_of_two_editions_are_mixed(
    nih: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = tmp_path / "sample"
    image(sample / "images" / "00000003_000.png")
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
    )
    row = "00000003_000.png,Mass,0,3,060Y,M,PA,2048,1024,0.2,0.4"
    table(sample, row, header=header, name="sample_labels.csv")
    (record,) = sources.read("nih", str(sample)).records
    assert record.age == 60
    assert record.spacing_mm == pytest.approx((0.4, 0.4))
    for root in (nih, sample):
        settings = Pack(size=32, split="random", val_fraction=0, test_fraction=0)
        build.build_shards("nih", str(root), settings, str(tmp_path / f"{root.name}-out"), local=True)
    roots = [str(tmp_path / f"{name}-out") for name in ("nih", "sample")]
    code, out, _ = run(capsys, "audit", *roots, "--out", str(tmp_path / "audit.html"))
    assert code == 0
    (note,) = (line for line in out if "editions" in line)
    assert "2020 (" in note
    assert "Kaggle sample (" in note
    assert "10 have other findings and 1,344 another age" in note
    assert "Kaggle&#39;s sample" in (tmp_path / "audit.html").read_text()
    code, out, _ = run(capsys, "audit", roots[0], "--out", str(tmp_path / "audit.html"))
    assert not any("editions" in line for line in out)


def test_a_second_edition_in_the_same_folder_is_not_read_and_noted(nih: Path) -> None:
    table(nih, "00000001_000.png,Hernia,0,1,57,M,PA,2048,1024,0.2,0.4", name="Data_Entry_2017.csv")
    content = sources.read("nih", str(nih))
    assert content.records[0].findings["Hernia"] == 0
    assert any(note.startswith("Data_Entry_2017.csv is another edition") for note in content.book.ledger().notes)

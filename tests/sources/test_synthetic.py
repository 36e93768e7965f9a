"""Synthetic data: readable as NIH and SIIM, the same bytes every time, and findings that can be seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from cxrscale import sources
from cxrscale.io import rle_masks
from cxrscale.sources.synthetic import anatomy, archive, lesions
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import GrayImage, ImageRecord, UserError

IMAGES, SIZE, SEED = 24, 64, 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPaths:
    return archive.write(str(tmp_path_factory.mktemp("drawn") / "synthetic"), IMAGES, SIZE, SEED)


@pytest.fixture(scope="module")
def nih(paths: SyntheticPaths) -> list[ImageRecord]:
    return sources.read("nih", str(paths.nih)).records


@pytest.fixture(scope="module")
def siim(paths: SyntheticPaths) -> list[ImageRecord]:
    return sources.read("siim", str(paths.siim)).records


def pixels(source: str | bytes, flag: int = cv2.IMREAD_UNCHANGED) -> GrayImage:
    data = Path(source).read_bytes() if isinstance(source, str) else source
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    assert image is not None
    return np.asarray(image, np.uint8)


def gray(record: ImageRecord) -> GrayImage:
    return pixels(record.path, cv2.IMREAD_GRAYSCALE)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def thumbnail(image: GrayImage) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA), np.float32)


def image(planted: str, number: int) -> lesions.DrawnImage:
    body = anatomy.sample_anatomy(np.random.default_rng([9, number, 0]))
    return lesions.draw(body, SIZE, frozenset(planted.split()), "PA", np.random.default_rng([9, number, 1]))


def test_the_nih_reader_reads_it(nih: list[ImageRecord]) -> None:
    assert len(nih) == IMAGES
    assert {name for record in nih for name, state in record.findings.items() if state} == set(lesions.FINDINGS)
    assert any(not any(record.findings.values()) for record in nih)
    assert all(record.patient == record.image_id[:8] for record in nih)
    assert {record.view for record in nih} == {"PA", "AP"}
    assert {record.sex for record in nih} == {"F", "M"}
    assert all(record.age and 18 <= record.age < 100 and record.spacing_mm for record in nih)
    assert all(gray(record).shape == (SIZE, SIZE) for record in nih)
    assert len({gray(record).tobytes() for record in nih}) == IMAGES


def test_two_images_are_rgba(nih: list[ImageRecord]) -> None:
    colored = [image for image in (pixels(record.path) for record in nih) if image.ndim == 3]
    assert len(colored) == 2
    for image in colored:
        assert image.shape[2] == 4
        assert (image[..., :3] == image[..., :1]).all()
        assert (image[..., 3] == 255).all()


def test_no_patient_is_in_both_lists(nih: list[ImageRecord]) -> None:
    by_split = {split: {r.patient for r in nih if r.split == split} for split in ("train_val", "test")}
    assert all(by_split.values())
    assert not by_split["train_val"] & by_split["test"]
    assert all(record.split for record in nih)


def test_boxes_are_of_planted_findings_on_test_images(nih: list[ImageRecord]) -> None:
    assert any(record.boxes for record in nih)
    for record in nih:
        present = {name for name, state in record.findings.items() if state}
        assert {box.finding for box in record.boxes} == (present if record.split == "test" else set())
        for box in record.boxes:
            assert 0 <= box.x < box.x + box.width <= 1024
            assert 0 <= box.y < box.y + box.height <= 1024


def test_siim_images_are_nih_images_with_the_same_label(nih: list[ImageRecord], siim: list[ImageRecord]) -> None:
    thumbnails = np.stack([thumbnail(gray(record)) for record in nih])
    duplicates = []
    for record in siim:
        dicom = pydicom.dcmread(record.path)
        jpeg = next(pydicom.encaps.generate_frames(dicom.PixelData, number_of_frames=1))
        image = pixels(jpeg)
        assert image.shape == (dicom.Rows, dicom.Columns) == (SIZE, SIZE)
        distances = np.square(np.subtract(thumbnails, thumbnail(image))).mean(axis=(1, 2))
        assert distances.min() < 5
        duplicate = nih[int(distances.argmin())]
        duplicates.append(duplicate.image_id)
        assert (dicom.PatientSex, dicom.ViewPosition) == (duplicate.sex, duplicate.view)
        if record.rles is not None:
            assert record.findings["Pneumothorax"] == duplicate.findings["Pneumothorax"] == bool(record.rles)
    assert len(set(duplicates)) == len(duplicates)
    assert {r.image_id for r in nih if r.findings["Pneumothorax"]} <= set(duplicates)


def test_dicom_files_have_the_irregularities_of_siim(siim: list[ImageRecord]) -> None:
    dicoms = [pydicom.dcmread(record.path, stop_before_pixels=True) for record in siim]
    for record, dicom in zip(siim, dicoms, strict=True):
        assert dicom.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit
        assert dicom.SOPInstanceUID == dicom.file_meta.MediaStorageSOPInstanceUID == record.image_id
        assert Path(record.path).parts[-3:-1] == (dicom.StudyInstanceUID, dicom.SeriesInstanceUID)
        assert dicom.PhotometricInterpretation == "MONOCHROME2"
        assert dicom.get_item("PatientAge").value.strip().isdigit()
    assert len({dicom.PatientID for dicom in dicoms}) == len(siim)


def test_the_mask_table_has_the_irregularities_of_siim(paths: SyntheticPaths, siim: list[ImageRecord]) -> None:
    header, *rows = (paths.siim / "train-rle.csv").read_text().splitlines()
    assert header == "ImageId, EncodedPixels"
    assert all(row.split(",")[1].startswith(" ") for row in rows)
    assert any(row.endswith(", -1") for row in rows)
    assert sum(record.rles is None for record in siim) == 2
    twice = [record.rles for record in siim if record.rles and len(record.rles) > 1]
    assert twice
    parts = [rle_masks.decode(rle, (SIZE, SIZE)) for rle in twice[0]]
    assert rle_masks.union(twice[0], (SIZE, SIZE)).sum() < sum(part.sum() for part in parts)


def test_masks_in_the_table_are_the_drawn_ones(nih: list[ImageRecord], siim: list[ImageRecord]) -> None:
    rng = np.random.default_rng
    drawn = set()
    for plan in archive._plan_images(IMAGES, SEED):
        if "Pneumothorax" in plan.planted:
            key = [SEED, plan.patient, plan.follow_up + 1]
            image = lesions.draw(plan.anatomy, SIZE, plan.planted, plan.view, rng(key))
            record = next(r for r in nih if r.image_id == plan.name)
            np.testing.assert_array_equal(gray(record), image.image)
            drawn.add(np.logical_or.reduce(image.crescents).tobytes())
    assert drawn == {rle_masks.union(record.rles, (SIZE, SIZE)).tobytes() for record in siim if record.rles}


def test_the_same_arguments_give_the_same_bytes(paths: SyntheticPaths, tmp_path: Path) -> None:
    calls: list[int] = []
    again = archive.write(f"file://{tmp_path}/new/synthetic", IMAGES, SIZE, SEED, calls.append)
    assert calls == [1] * IMAGES
    assert tree(again.nih.parent) == tree(paths.nih.parent)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["synthetic"]
    other = archive.write(str(tmp_path / "other"), IMAGES, SIZE, SEED + 1)
    assert not set(tree(other.nih / "images_001").values()) & set(tree(paths.nih / "images_001").values())


def test_what_is_drawn_is_not_drawn_again(paths: SyntheticPaths) -> None:
    root, calls = paths.nih.parent, list[int]()
    before = (root / "synthetic.json").stat().st_mtime_ns
    assert archive.write(str(root), IMAGES, SIZE, SEED, calls.append) == paths
    assert not calls
    assert (root / "synthetic.json").stat().st_mtime_ns == before
    assert json.loads((root / "synthetic.json").read_text())["seed"] == SEED


def test_a_folder_with_other_files_is_not_touched(paths: SyntheticPaths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds synthetic data of .*'seed': 3.* remove the folder or give another one"):
        archive.write(str(paths.nih.parent), IMAGES, SIZE, SEED + 1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and has no synthetic\.json; give a new folder"):
        archive.write(str(tmp_path), IMAGES, SIZE, SEED)
    with pytest.raises(UserError, match="is a file; give a new folder"):
        archive.write(str(tmp_path / "file"), IMAGES, SIZE, SEED)
    with pytest.raises(UserError, match="cannot be written"):
        archive.write(str(tmp_path / "file" / "below"), IMAGES, SIZE, SEED)
    (tmp_path / "synthetic.json").write_text("{")
    with pytest.raises(UserError, match="holds synthetic data of None"):
        archive.write(str(tmp_path), IMAGES, SIZE, SEED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "synthetic.json"]


@pytest.mark.parametrize(("images", "size", "seed"), [(9, 64, 0), (24, 31, 0), (24, 5000, 0), (24, 64, -1)])
def test_arguments_out_of_range_are_refused(tmp_path: Path, images: int, size: int, seed: int) -> None:
    with pytest.raises(UserError, match="at least 10 images, a size of 32 to 4096"):
        archive.write(str(tmp_path / "synthetic"), images, size, seed)
    with pytest.raises(UserError, match="drawn into a local folder"):
        archive.write("s3://bucket/synthetic")


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        archive.write(str(tmp_path / "synthetic"), IMAGES, SIZE, SEED, interrupt)
    assert not list(tmp_path.iterdir())


def test_shares_are_as_documented() -> None:
    for seed in range(3):
        plans = archive._plan_images(600, seed)
        assert len(plans) == len({plan.name for plan in plans}) == 600
        for finding in lesions.FINDINGS:
            assert 0.15 < sum(finding in plan.planted for plan in plans) / 600 < 0.29
        assert 0.35 < sum(not plan.planted for plan in plans) / 600 < 0.50
        assert 1.9 < 600 / len({plan.patient for plan in plans}) < 2.5
        test = archive._test_patients(plans, seed)
        assert 150 <= sum(plan.patient in test for plan in plans) < 162
        members, without_row = archive._siim_members(plans, seed)
        assert {plan.name for plan in plans if "Pneumothorax" in plan.planted} <= members
        assert len(without_row) == 2


def test_every_patient_pose_and_finding_can_be_drawn() -> None:
    for size in (32, 96):
        for number in range(25):
            body = anatomy.sample_anatomy(np.random.default_rng([4, number, 0]))
            drawn = lesions.draw(body, size, frozenset(lesions.FINDINGS), "AP", np.random.default_rng([4, number, 1]))
            assert {box.finding for box in drawn.boxes} == set(lesions.FINDINGS)
            assert drawn.crescents
            assert all(mask.any() for mask in drawn.crescents)


def test_a_finding_changes_the_image_where_its_box_says() -> None:
    brighter = {"Mass": 1, "Nodule": 1, "Consolidation": 1, "Effusion": 1, "Pneumothorax": -1}
    for finding, sign in brighter.items():
        changes = []
        for number in range(12):
            planted, healthy = image(finding, number), image("", number)
            box = planted.boxes[0]
            inside = np.zeros((SIZE, SIZE), bool)
            inside[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = True
            if finding == "Pneumothorax":
                inside = planted.crescents[0]
            # The pose is the same, the exposure is not: hence the comparison with the mean of the image.
            contrast = [drawn.image[inside].mean() - drawn.image.mean() for drawn in (planted, healthy)]
            changes.append(contrast[0] - contrast[1])
        assert np.mean(changes) * sign > 3, finding


def test_a_large_heart_is_wider() -> None:
    widths = [image("Cardiomegaly", number).boxes[0].width / SIZE for number in range(12)]
    assert min(widths) > 0.34


def test_a_crescent_lies_in_one_lung_half() -> None:
    for number in range(12):
        for mask in image("Pneumothorax", number).crescents:
            assert 0.005 < mask.mean() < 0.12
            columns = np.flatnonzero(mask.any(axis=0))
            assert columns.max() < 0.5 * SIZE or columns.min() > 0.5 * SIZE

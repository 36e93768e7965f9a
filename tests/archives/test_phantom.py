from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from cxrscale import archives, masks
from cxrscale.archives import anatomy, lesions, phantom
from cxrscale.archives.phantom import PhantomPaths
from cxrscale.schema import GreyImage, ImageRecord, InputError

IMAGES, SIZE, SEED = 24, 64, 3


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> PhantomPaths:
    return phantom.write(str(tmp_path_factory.mktemp("drawn") / "phantom"), IMAGES, SIZE, SEED)


@pytest.fixture(scope="module")
def nih(paths: PhantomPaths) -> list[ImageRecord]:
    return archives.read("nih", str(paths.nih))


@pytest.fixture(scope="module")
def siim(paths: PhantomPaths) -> list[ImageRecord]:
    return archives.read("siim", str(paths.siim))


def pixels(source: str | bytes, flag: int = cv2.IMREAD_UNCHANGED) -> GreyImage:
    data = Path(source).read_bytes() if isinstance(source, str) else source
    picture = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    assert picture is not None
    return np.asarray(picture, np.uint8)


def grey(record: ImageRecord) -> GreyImage:
    return pixels(record.path, cv2.IMREAD_GRAYSCALE)


def tree(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def thumbnail(picture: GreyImage) -> npt.NDArray[np.float32]:
    return np.asarray(cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA), np.float32)


def film(planted: str, number: int) -> lesions.Film:
    body = anatomy.build(np.random.default_rng([9, number, 0]))
    return lesions.draw(body, SIZE, frozenset(planted.split()), "PA", np.random.default_rng([9, number, 1]))


def test_the_nih_reader_reads_it(nih: list[ImageRecord]) -> None:
    assert len(nih) == IMAGES
    assert {name for record in nih for name, state in record.findings.items() if state} == set(lesions.FINDINGS)
    assert any(not any(record.findings.values()) for record in nih)
    assert all(record.patient == record.image_id[:8] for record in nih)
    assert {record.view for record in nih} == {"PA", "AP"}
    assert {record.sex for record in nih} == {"F", "M"}
    assert all(record.age and 18 <= record.age < 100 and record.spacing_mm for record in nih)
    assert all(grey(record).shape == (SIZE, SIZE) for record in nih)
    assert len({grey(record).tobytes() for record in nih}) == IMAGES


def test_two_pictures_are_rgba(nih: list[ImageRecord]) -> None:
    coloured = [picture for picture in (pixels(record.path) for record in nih) if picture.ndim == 3]
    assert len(coloured) == 2
    for picture in coloured:
        assert picture.shape[2] == 4
        assert (picture[..., :3] == picture[..., :1]).all()
        assert (picture[..., 3] == 255).all()


def test_no_patient_is_in_both_lists(nih: list[ImageRecord]) -> None:
    by_split = {split: {r.patient for r in nih if r.split == split} for split in ("train_val", "test")}
    assert all(by_split.values())
    assert not by_split["train_val"] & by_split["test"]
    assert all(record.split for record in nih)


def test_boxes_are_of_planted_findings_on_test_pictures(nih: list[ImageRecord]) -> None:
    assert any(record.boxes for record in nih)
    for record in nih:
        present = {name for name, state in record.findings.items() if state}
        assert {box.finding for box in record.boxes} == (present if record.split == "test" else set())
        for box in record.boxes:
            assert 0 <= box.x < box.x + box.width <= SIZE
            assert 0 <= box.y < box.y + box.height <= SIZE


def test_siim_pictures_are_nih_pictures_with_the_same_label(nih: list[ImageRecord], siim: list[ImageRecord]) -> None:
    thumbnails = np.stack([thumbnail(grey(record)) for record in nih])
    twins = []
    for record in siim:
        dicom = pydicom.dcmread(record.path)
        jpeg = next(pydicom.encaps.generate_frames(dicom.PixelData, number_of_frames=1))
        picture = pixels(jpeg)
        assert picture.shape == (dicom.Rows, dicom.Columns) == (SIZE, SIZE)
        distances = np.square(np.subtract(thumbnails, thumbnail(picture))).mean(axis=(1, 2))
        assert distances.min() < 5
        twin = nih[int(distances.argmin())]
        twins.append(twin.image_id)
        assert (dicom.PatientSex, dicom.ViewPosition) == (twin.sex, twin.view)
        if record.rles is not None:
            assert record.findings["Pneumothorax"] == twin.findings["Pneumothorax"] == bool(record.rles)
    assert len(set(twins)) == len(twins)
    assert {r.image_id for r in nih if r.findings["Pneumothorax"]} <= set(twins)


def test_dicoms_have_siims_oddities(siim: list[ImageRecord]) -> None:
    dicoms = [pydicom.dcmread(record.path, stop_before_pixels=True) for record in siim]
    for record, dicom in zip(siim, dicoms, strict=True):
        assert dicom.file_meta.TransferSyntaxUID == pydicom.uid.JPEGBaseline8Bit
        assert dicom.SOPInstanceUID == dicom.file_meta.MediaStorageSOPInstanceUID == record.image_id
        assert Path(record.path).parts[-3:-1] == (dicom.StudyInstanceUID, dicom.SeriesInstanceUID)
        assert dicom.PhotometricInterpretation == "MONOCHROME2"
        assert dicom.get_item("PatientAge").value.strip().isdigit()
    assert len({dicom.PatientID for dicom in dicoms}) == len(siim)


def test_the_mask_table_has_siims_oddities(paths: PhantomPaths, siim: list[ImageRecord]) -> None:
    header, *rows = (paths.siim / "train-rle.csv").read_text().splitlines()
    assert header == "ImageId, EncodedPixels"
    assert all(row.split(",")[1].startswith(" ") for row in rows)
    assert any(row.endswith(", -1") for row in rows)
    assert sum(record.rles is None for record in siim) == 2
    twice = [record.rles for record in siim if record.rles and len(record.rles) > 1]
    assert twice
    parts = [masks.decode(rle, (SIZE, SIZE)) for rle in twice[0]]
    assert masks.union(twice[0], (SIZE, SIZE)).sum() < sum(part.sum() for part in parts)


def test_masks_in_the_table_are_the_drawn_ones(nih: list[ImageRecord], siim: list[ImageRecord]) -> None:
    rng = np.random.default_rng
    drawn = set()
    for shot in phantom._shots(IMAGES, SEED):
        if "Pneumothorax" in shot.planted:
            key = [SEED, shot.patient, shot.follow_up + 1]
            film = lesions.draw(shot.build, SIZE, shot.planted, shot.view, rng(key))
            record = next(r for r in nih if r.image_id == shot.name)
            np.testing.assert_array_equal(grey(record), film.picture)
            drawn.add(np.logical_or.reduce(film.crescents).tobytes())
    assert drawn == {masks.union(record.rles, (SIZE, SIZE)).tobytes() for record in siim if record.rles}


def test_the_same_arguments_give_the_same_bytes(paths: PhantomPaths, tmp_path: Path) -> None:
    calls: list[int] = []
    again = phantom.write(f"file://{tmp_path}/new/phantom", IMAGES, SIZE, SEED, calls.append)
    assert calls == [1] * IMAGES
    assert tree(again.nih.parent) == tree(paths.nih.parent)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["phantom"]
    other = phantom.write(str(tmp_path / "other"), IMAGES, SIZE, SEED + 1)
    assert not set(tree(other.nih / "images_001").values()) & set(tree(paths.nih / "images_001").values())


def test_what_is_drawn_is_not_drawn_again(paths: PhantomPaths) -> None:
    root, calls = paths.nih.parent, list[int]()
    before = (root / "phantom.json").stat().st_mtime_ns
    assert phantom.write(str(root), IMAGES, SIZE, SEED, calls.append) == paths
    assert not calls
    assert (root / "phantom.json").stat().st_mtime_ns == before
    assert json.loads((root / "phantom.json").read_text())["seed"] == SEED


def test_a_folder_with_something_else_is_left_alone(paths: PhantomPaths, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a phantom of .*'seed': 3.* remove the folder or give another one"):
        phantom.write(str(paths.nih.parent), IMAGES, SIZE, SEED + 1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and holds no phantom\.json; give a new folder"):
        phantom.write(str(tmp_path), IMAGES, SIZE, SEED)
    with pytest.raises(InputError, match="is a file; give a new folder"):
        phantom.write(str(tmp_path / "file"), IMAGES, SIZE, SEED)
    with pytest.raises(InputError, match="cannot be written"):
        phantom.write(str(tmp_path / "file" / "below"), IMAGES, SIZE, SEED)
    (tmp_path / "phantom.json").write_text("{")
    with pytest.raises(InputError, match="holds a phantom of None"):
        phantom.write(str(tmp_path), IMAGES, SIZE, SEED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "phantom.json"]


@pytest.mark.parametrize(("images", "size", "seed"), [(9, 64, 0), (24, 31, 0), (24, 5000, 0), (24, 64, -1)])
def test_arguments_out_of_range(tmp_path: Path, images: int, size: int, seed: int) -> None:
    with pytest.raises(InputError, match="at least 10 images, a size of 32 to 4096"):
        phantom.write(str(tmp_path / "phantom"), images, size, seed)
    with pytest.raises(InputError, match="drawn into a local folder"):
        phantom.write("s3://bucket/phantom")


def test_an_interrupted_phantom_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        phantom.write(str(tmp_path / "phantom"), IMAGES, SIZE, SEED, interrupt)
    assert not list(tmp_path.iterdir())


def test_shares_are_as_promised() -> None:
    for seed in range(3):
        shots = phantom._shots(600, seed)
        assert len(shots) == len({shot.name for shot in shots}) == 600
        for finding in lesions.FINDINGS:
            assert 0.15 < sum(finding in shot.planted for shot in shots) / 600 < 0.29
        assert 0.35 < sum(not shot.planted for shot in shots) / 600 < 0.50
        assert 1.9 < 600 / len({shot.patient for shot in shots}) < 2.5
        test = phantom._test_patients(shots, seed)
        assert 150 <= sum(shot.patient in test for shot in shots) < 162
        members, without_row = phantom._siim_members(shots, seed)
        assert {shot.name for shot in shots if "Pneumothorax" in shot.planted} <= members
        assert len(without_row) == 2


def test_every_patient_pose_and_finding_can_be_drawn() -> None:
    for size in (32, 96):
        for number in range(25):
            body = anatomy.build(np.random.default_rng([4, number, 0]))
            drawn = lesions.draw(body, size, frozenset(lesions.FINDINGS), "AP", np.random.default_rng([4, number, 1]))
            assert {box.finding for box in drawn.boxes} == set(lesions.FINDINGS)
            assert drawn.crescents
            assert all(mask.any() for mask in drawn.crescents)


def test_a_finding_changes_the_picture_where_its_box_says() -> None:
    brighter = {"Mass": 1, "Nodule": 1, "Consolidation": 1, "Effusion": 1, "Pneumothorax": -1}
    for finding, sign in brighter.items():
        changes = []
        for number in range(12):
            planted, healthy = film(finding, number), film("", number)
            box = planted.boxes[0]
            inside = np.zeros((SIZE, SIZE), bool)
            inside[int(box.y) : int(box.y + box.height), int(box.x) : int(box.x + box.width)] = True
            if finding == "Pneumothorax":
                inside = planted.crescents[0]
            # The pose is the same, the exposure is not: hence against the whole picture.
            contrast = [drawn.picture[inside].mean() - drawn.picture.mean() for drawn in (planted, healthy)]
            changes.append(contrast[0] - contrast[1])
        assert np.mean(changes) * sign > 3, finding


def test_a_large_heart_is_wider() -> None:
    widths = [film("Cardiomegaly", number).boxes[0].width / SIZE for number in range(12)]
    assert min(widths) > 0.34


def test_a_crescent_lies_in_one_lung_half() -> None:
    for number in range(12):
        for mask in film("Pneumothorax", number).crescents:
            assert 0.005 < mask.mean() < 0.12
            columns = np.flatnonzero(mask.any(axis=0))
            assert columns.max() < 0.5 * SIZE or columns.min() > 0.5 * SIZE

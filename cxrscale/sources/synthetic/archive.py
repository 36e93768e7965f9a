"""Synthetic archives: drawn thorax-like images on disk exactly as NIH ChestX-ray14 and SIIM-ACR publish theirs.

What is drawn is in anatomy.py (the healthy thorax) and lesions.py (the planted findings); this file decides who is
photographed with what, and writes files that the readers of the real archives read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
import simplejpeg
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

from cxrscale.io import encode
from cxrscale.sources.synthetic.anatomy import Build, Mask, build
from cxrscale.sources.synthetic.lesions import FINDINGS, DrawnImage, draw
from cxrscale.types import GrayImage, UserError

_MARKER = "synthetic.json"
_DRAWING = 1  # Raise it when the images change, so that an older archive is not taken for a new one.
_HEALTHY = 0.38
_PREVALENCE = 0.36  # of each finding among those who are not healthy
_TEST_SHARE = 0.25
_NEGATIVES = 1.5  # SIIM images without a pneumothorax, for each one with
_SCANS = ((2500, 2048, 0.168), (2048, 2500, 0.168), (2992, 2991, 0.143), (2021, 2021, 0.194311))
_LABEL_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
_BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


@dataclass(frozen=True, slots=True)
class SyntheticPaths:
    """Roots of the two archives, for archives.nih.read and archives.siim.read."""

    nih: Path
    siim: Path


@dataclass(frozen=True, slots=True)
class _Shot:
    """One image to be drawn, and what the tables say of it."""

    patient: int
    follow_up: int
    build: Build
    age: int
    view: str
    scan: tuple[int, int, float]
    """Width and height of the scan in pixels, and millimeters a pixel."""
    planted: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.patient:08d}_{self.follow_up:03d}.png"


def write(
    root: str,
    images: int = 600,
    size: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SyntheticPaths:
    """Draw a synthetic archive and write it as an NIH archive, `root/nih`, and a SIIM one, `root/siim`.

    Findings are lesions.FINDINGS, each in about 22% of the images; some 40% have none. Patients have 2.2 images on
    average; a quarter of the images are in the test list, and no patient is in both lists. Boxes are given for
    the test images. The SIIM archive holds every image with a pneumothorax and 1.5 times as many without, all of
    them re-encoded NIH images; two of the negative ones have no row in its mask table.

    The same arguments give the same bytes (with the same versions of the libraries). The folder appears whole or not
    at all; where it is there already with these arguments, nothing is drawn.

    Args:
        root: a local folder that is absent, empty, or holds a synthetic archive of the same arguments.
        images: how many NIH images, 10 or more.
        size: side of the square images in pixels, 32 to 4096.
        seed: 0 or more.
        progress: called after every image with how many more are drawn: 1.

    Raises:
        UserError: an argument is out of its range; the folder holds something else or cannot be written.
    """
    if images < 10 or not 32 <= size <= 4096 or seed < 0:
        raise UserError(
            f"synthetic: images={images} size={size} seed={seed}; at least 10 images, a size of 32 to 4096, a seed from 0"
        )
    if "://" in root and not root.startswith("file://"):
        raise UserError(f"{root}: a synthetic archive is drawn into a local folder; give a path")
    folder = Path(root.removeprefix("file://")).resolve()
    arguments = {"drawing": _DRAWING, "images": images, "size": size, "seed": seed}
    paths = SyntheticPaths(folder / "nih", folder / "siim")
    if _is_drawn(folder, arguments):
        return paths
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that a rename publishes it; under a name of its own, so that two processes may race.
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _draw_archives(draft, images, size, seed, progress or (lambda _: None))
            (draft / _MARKER).write_text(json.dumps(arguments, indent=1) + "\n")
            draft.chmod(0o755)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if _is_drawn(folder, arguments):
            return paths  # by another process, meanwhile
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None
    return paths


def _is_drawn(folder: Path, arguments: dict[str, int]) -> bool:
    """Whether the folder holds the synthetic archive of these arguments; anything else in it is an UserError."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new folder for the synthetic archive")
    marker = folder / _MARKER
    if not marker.exists():
        if any(folder.iterdir()):
            raise UserError(
                f"{folder} is not empty and holds no {_MARKER}; give a new folder for the synthetic archive"
            )
        return False
    try:
        found = json.loads(marker.read_text())
    except ValueError:
        found = None
    if found != arguments:
        raise UserError(
            f"{folder} holds a synthetic archive of {found}, asked for is {arguments}; remove the folder or give another one"
        )
    return True


def _draw_archives(draft: Path, images: int, size: int, seed: int, progress: Callable[[int], None]) -> None:
    shots = _shots(images, seed)
    test = _test_patients(shots, seed)
    in_siim, without_row = _siim_members(shots, seed)
    image_list = draft / "nih" / "images_001" / "images"
    image_list.mkdir(parents=True)
    boxes, mask_rows, positives = [_BOX_HEADER], [], 0
    for number, shot in enumerate(shots):
        image = draw(shot.build, size, shot.planted, shot.view, np.random.default_rng(_key(seed, shot)))
        # NIH has a few hundred RGBA images among the gray ones; here they are two.
        (image_list / shot.name).write_bytes(_png(image.image, color=number in (2, 7)))
        if shot.patient in test:
            boxes += [f"{shot.name},{b.finding},{b.x},{b.y},{b.width},{b.height}" for b in image.boxes]
        if shot.name in in_siim:
            uid = _uid(seed, shot.name, "image")
            _write_dicom(draft / "siim" / "dicom-images-train", uid, shot, image.image, seed)
            if shot.name not in without_row:
                mask_rows += [f"{uid}, {rle}" for rle in _rles(image, twice=positives % 10 == 0)]
                positives += bool(image.crescents)
        progress(1)
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    for shot in shots:
        lists["test_list.txt" if shot.patient in test else "train_val_list.txt"].append(shot.name)
    for file, names in lists.items():
        _write_lines(draft / "nih" / file, names)
    _write_lines(draft / "nih" / "Data_Entry_2017.csv", [_LABEL_HEADER, *map(_label_row, shots)])
    _write_lines(draft / "nih" / "BBox_List_2017.csv", boxes)
    _write_lines(draft / "siim" / "train-rle.csv", ["ImageId, EncodedPixels", *sorted(mask_rows)])


def _key(seed: int, shot: _Shot) -> list[int]:
    """The seed of one image. Numbered from 1: a seed sequence takes [seed, patient] for [seed, patient, 0]."""
    return [seed, shot.patient, shot.follow_up + 1]


def _shots(images: int, seed: int) -> list[_Shot]:
    """Who is photographed, how often and with what: patients in turn, until there are enough images."""
    shots: list[_Shot] = []
    patient = 0
    while len(shots) < images:
        patient += 1
        rng = np.random.default_rng([seed, patient, 0])
        body, age = build(rng), int(rng.integers(18, 88))
        for follow_up in range(min(int(rng.geometric(1 / 2.2)), 12, images - len(shots))):
            sick = rng.random() >= _HEALTHY
            planted = frozenset(finding for finding in FINDINGS if rng.random() < _PREVALENCE and sick)
            view = "AP" if rng.random() < 0.4 else "PA"
            scan = _SCANS[int(rng.integers(len(_SCANS)))]
            shots.append(_Shot(patient, follow_up, body, age + follow_up // 2, view, scan, planted))
    return shots


def _test_patients(shots: list[_Shot], seed: int) -> frozenset[int]:
    """Whole patients, at random, until they have the test's share of the images."""
    test: set[int] = set()
    wanted = _TEST_SHARE * len(shots)
    for patient in np.random.default_rng([seed]).permutation(shots[-1].patient) + 1:
        if sum(shot.patient in test for shot in shots) >= wanted:
            break
        test.add(int(patient))
    return frozenset(test)


def _siim_members(shots: list[_Shot], seed: int) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the images that SIIM has too, and of those among them that its table has no row for."""
    positive = [shot.name for shot in shots if "Pneumothorax" in shot.planted]
    negative = [shot.name for shot in shots if "Pneumothorax" not in shot.planted]
    order = np.random.default_rng([seed, 0, 1]).permutation(len(negative))
    chosen = [negative[at] for at in order[: max(4, round(_NEGATIVES * len(positive)))]]
    return frozenset(positive + chosen), frozenset(chosen[-2:])


def _rles(image: DrawnImage, twice: bool) -> list[str]:
    """A row a mask; `twice`, as by two annotators who marked overlapping parts of it; -1 where there is none."""
    masks: list[Mask] = list(image.crescents)
    if not masks:
        return ["-1"]
    if twice:
        rows = np.flatnonzero(masks[0].any(axis=1))
        upper, lower = masks[0].copy(), masks[0].copy()
        upper[rows[len(rows) * 3 // 5] :] = False
        lower[: rows[len(rows) * 2 // 5]] = False
        masks[:1] = [upper, lower]
    return [encode(mask) for mask in masks]


def _label_row(shot: _Shot) -> str:
    findings = "|".join(sorted(shot.planted)) or "No Finding"
    width, height, mm = shot.scan
    return (
        f"{shot.name},{findings},{shot.follow_up},{shot.patient},{shot.age},{shot.build.sex},{shot.view},"
        f"{width},{height},{mm},{mm}"
    )


def _png(image: GrayImage, color: bool) -> bytes:
    pixels = cv2.merge([image, image, image, np.full_like(image, 255)]) if color else image
    return bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1])


def _uid(seed: int, name: str, part: str) -> str:
    """A DICOM UID (of the 2.25 root, for which anyone may draw a number) that says nothing of the NIH image."""
    drawn = hashlib.blake2b(f"phantom {seed} {name} {part}".encode(), digest_size=15).digest()
    return f"2.25.{int.from_bytes(drawn, 'big')}"


def _write_dicom(folder: Path, uid: str, shot: _Shot, image: GrayImage, seed: int) -> None:
    """A file with the tags and oddities of SIIM's: study/series/image.dcm, JPEG Baseline, 8 bits."""
    study, series = _uid(seed, shot.name, "study"), _uid(seed, shot.name, "series")
    dicom = pydicom.Dataset()
    dicom.file_meta = pydicom.dataset.FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dicom.SpecificCharacterSet = "ISO_IR 100"
    dicom.SOPClassUID, dicom.SOPInstanceUID = SecondaryCaptureImageStorage, uid
    dicom.StudyInstanceUID, dicom.SeriesInstanceUID = study, series
    dicom.StudyDate, dicom.StudyTime, dicom.AccessionNumber = "19010101", "000000.00", ""
    dicom.Modality, dicom.ConversionType, dicom.BodyPartExamined = "CR", "WSD", "CHEST"
    dicom.ReferringPhysicianName, dicom.SeriesDescription = "", f"view: {shot.view}"
    # One patient a file, whoever it is: that is why SIIM's patients have to be found through their NIH duplicates.
    dicom.PatientID = dicom.PatientName = f"anon-{uid[-12:]}"
    dicom.PatientBirthDate, dicom.PatientSex, dicom.ViewPosition = "", shot.build.sex, shot.view
    # Without the unit that the standard demands, as SIIM has it.
    age = pydicom.DataElement("PatientAge", "AS", str(shot.age), validation_mode=pydicom.config.IGNORE)
    dicom.add(age)
    dicom.StudyID, dicom.SeriesNumber, dicom.InstanceNumber, dicom.PatientOrientation = "", "1", "1", ""
    dicom.SamplesPerPixel, dicom.PhotometricInterpretation = 1, "MONOCHROME2"
    dicom.Rows, dicom.Columns = image.shape
    # The scan's spacing although the image is smaller, as SIIM has it.
    dicom.PixelSpacing = [shot.scan[2], shot.scan[2]]
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit, dicom.PixelRepresentation = 8, 8, 7, 0
    dicom.LossyImageCompression, dicom.LossyImageCompressionMethod = "01", "ISO_10918_1"
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., None]), quality=95, colorspace="GRAY")
    dicom.PixelData = encapsulate([jpeg])
    path = folder / study / series / f"{uid}.dcm"
    path.parent.mkdir(parents=True)
    dicom.save_as(path, enforce_file_format=True)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", newline="\n")

"""Synthetic data: drawn, thorax-like images on disk, in exactly the layout in which NIH and SIIM-ACR publish theirs.

anatomy.py draws the healthy thorax and lesions.py the planted findings; this module decides which patient has which
images and findings, and writes files that the readers of the real sources can read.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
import simplejpeg
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage

from cxrscale.io import rle_masks, storage
from cxrscale.sources.synthetic.anatomy import Anatomy, Mask, sample_anatomy
from cxrscale.sources.synthetic.lesions import FINDINGS, DrawnImage, draw
from cxrscale.types import Box, GrayImage, UserError

_MARKER = "synthetic.json"
_DRAWING = 2  # Raise it when the images change, so that older synthetic data is not taken for new.
_PUBLISHED_SIDE = 1024
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
    """Roots of the two synthetic sources, for sources.read("nih", ...) and sources.read("siim", ...)."""

    nih: Path
    siim: Path


@dataclass(frozen=True, slots=True)
class _ImagePlan:
    """One image to be drawn, and its row in the tables."""

    patient: int
    follow_up: int
    anatomy: Anatomy
    age: int
    view: str
    scan: tuple[int, int, float]
    """Width and height of the scan in pixels, and millimeters per pixel."""
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
    """Draw synthetic data and write it twice: as NIH publishes, `root/nih`, and as SIIM does, `root/siim`.

    Findings are lesions.FINDINGS, each in about 22% of the images; some 40% have none. Patients have 2.2 images on
    average; a quarter of the images are in the test list, and no patient is in both lists. Only the test images have
    boxes. The SIIM folder has all images with a pneumothorax and 1.5 times as many without. All of them are
    re-encoded NIH images; two of the negative ones have no row in the mask table.

    The same arguments give the same bytes (with the same versions of the libraries). The folder is published
    completely or not at all; if it already exists with these arguments, nothing is drawn.

    Args:
        root: a local folder that does not exist, is empty, or holds synthetic data of the same arguments.
        images: how many NIH images, 10 or more.
        size: side of the square images in pixels, 32 to 4096.
        seed: 0 or more.
        progress: called after every image with the number of images drawn since the last call: 1.

    Raises:
        UserError: an argument is out of its range; the folder holds something else or cannot be written.
    """
    if images < 10 or not 32 <= size <= 4096 or seed < 0:
        raise UserError(
            f"synthetic data: images={images} size={size} seed={seed}; "
            "give at least 10 images, a size of 32 to 4096, and a seed of 0 or more"
        )
    if storage.is_remote(root):
        raise UserError(f"{root}: synthetic data is drawn into a local folder; give a path")
    folder = storage.local_path(root).resolve()
    arguments = {"drawing": _DRAWING, "images": images, "size": size, "seed": seed}
    paths = SyntheticPaths(folder / "nih", folder / "siim")
    if _is_drawn(folder, arguments):
        return paths
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside the folder, so that a rename publishes it; under a unique name, so that two processes may race.
        draft = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            _draw_archives(draft, images, size, seed, progress or (lambda _: None))
            (draft / _MARKER).write_text(json.dumps(arguments, indent=1) + "\n")
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if _is_drawn(folder, arguments):
            return paths  # another process was faster
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None
    return paths


def _is_drawn(folder: Path, arguments: dict[str, int]) -> bool:
    """Whether the folder holds the synthetic data of these arguments; anything else in it is a UserError."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; give a new folder for the synthetic data")
    marker = folder / _MARKER
    if not marker.exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and has no {_MARKER}; give a new folder for the synthetic data")
        return False
    try:
        existing = json.loads(marker.read_text())
    except ValueError:
        existing = None
    if existing != arguments:
        raise UserError(
            f"{folder} holds synthetic data of {existing}, not of {arguments}; remove the folder or give another one"
        )
    return True


def _draw_archives(draft: Path, images: int, size: int, seed: int, progress: Callable[[int], None]) -> None:
    plans = _plan_images(images, seed)
    test = _test_patients(plans, seed)
    in_siim, without_row = _siim_members(plans, seed)
    image_folder = draft / "nih" / "images_001" / "images"
    image_folder.mkdir(parents=True)
    boxes, mask_rows, positives = [_BOX_HEADER], [], 0
    for number, plan in enumerate(plans):
        drawn = draw(plan.anatomy, size, plan.planted, plan.view, np.random.default_rng(_key(seed, plan)))
        # NIH has a few hundred RGBA images among the gray ones; here there are two.
        (image_folder / plan.name).write_bytes(_png(drawn.image, color=number in (2, 7)))
        if plan.patient in test:
            boxes += [_box_row(plan.name, box, size) for box in drawn.boxes]
        if plan.name in in_siim:
            uid = _uid(seed, plan.name, "image")
            _write_dicom(draft / "siim" / "dicom-images-train", uid, plan, drawn.image, seed)
            if plan.name not in without_row:
                mask_rows += [f"{uid}, {rle}" for rle in _rles(drawn, twice=positives % 10 == 0)]
                positives += bool(drawn.crescents)
        progress(1)
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    for plan in plans:
        lists["test_list.txt" if plan.patient in test else "train_val_list.txt"].append(plan.name)
    for file, names in lists.items():
        _write_lines(draft / "nih" / file, names)
    _write_lines(draft / "nih" / "Data_Entry_2017.csv", [_LABEL_HEADER, *map(_label_row, plans)])
    _write_lines(draft / "nih" / "BBox_List_2017.csv", boxes)
    _write_lines(draft / "siim" / "train-rle.csv", ["ImageId, EncodedPixels", *sorted(mask_rows)])


def _key(seed: int, plan: _ImagePlan) -> list[int]:
    """The seed of one image. Counted from 1, because [seed, patient, 0] already seeds the patient's anatomy."""
    return [seed, plan.patient, plan.follow_up + 1]


def _plan_images(images: int, seed: int) -> list[_ImagePlan]:
    """All images: patient by patient, with their number of images and findings, until there are enough images."""
    plans: list[_ImagePlan] = []
    patient = 0
    while len(plans) < images:
        patient += 1
        rng = np.random.default_rng([seed, patient, 0])
        anatomy, age = sample_anatomy(rng), int(rng.integers(18, 88))
        for follow_up in range(min(int(rng.geometric(1 / 2.2)), 12, images - len(plans))):
            sick = rng.random() >= _HEALTHY
            planted = frozenset(finding for finding in FINDINGS if rng.random() < _PREVALENCE and sick)
            view = "AP" if rng.random() < 0.4 else "PA"
            scan = _SCANS[int(rng.integers(len(_SCANS)))]
            plans.append(_ImagePlan(patient, follow_up, anatomy, age + follow_up // 2, view, scan, planted))
    return plans


def _test_patients(plans: list[_ImagePlan], seed: int) -> frozenset[int]:
    """Patients drawn at random until they have the test split's share of the images."""
    test: set[int] = set()
    wanted = _TEST_SHARE * len(plans)
    for patient in np.random.default_rng([seed]).permutation(plans[-1].patient) + 1:
        if sum(plan.patient in test for plan in plans) >= wanted:
            break
        test.add(int(patient))
    return frozenset(test)


def _siim_members(plans: list[_ImagePlan], seed: int) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the images that SIIM has too, and of those among them without a row in its table."""
    positive = [plan.name for plan in plans if "Pneumothorax" in plan.planted]
    negative = [plan.name for plan in plans if "Pneumothorax" not in plan.planted]
    order = np.random.default_rng([seed, 0, 1]).permutation(len(negative))
    chosen = [negative[at] for at in order[: max(4, round(_NEGATIVES * len(positive)))]]
    return frozenset(positive + chosen), frozenset(chosen[-2:])


def _rles(image: DrawnImage, twice: bool) -> list[str]:
    """One row per mask, or -1 without any; `twice` splits the first into two that overlap, as by two annotators."""
    masks: list[Mask] = list(image.crescents)
    if not masks:
        return ["-1"]
    if twice:
        rows = np.flatnonzero(masks[0].any(axis=1))
        upper, lower = masks[0].copy(), masks[0].copy()
        upper[rows[len(rows) * 3 // 5] :] = False
        lower[: rows[len(rows) * 2 // 5]] = False
        masks[:1] = [upper, lower]
    return [rle_masks.encode(mask) for mask in masks]


def _label_row(plan: _ImagePlan) -> str:
    findings = "|".join(sorted(plan.planted)) or "No Finding"
    width, height, mm = plan.scan
    return (
        f"{plan.name},{findings},{plan.follow_up},{plan.patient},{plan.age},{plan.anatomy.sex},{plan.view},"
        f"{width},{height},{mm},{mm}"
    )


def _box_row(name: str, box: Box, size: int) -> str:
    """A row of the box table, which counts pixels of an image of 1024 x 1024, as NIH's does."""
    scale = _PUBLISHED_SIDE / size
    values = (box.x * scale, box.y * scale, box.width * scale, box.height * scale)
    return ",".join((name, box.finding, *map(str, values)))


def _png(image: GrayImage, color: bool) -> bytes:
    pixels = cv2.merge([image, image, image, np.full_like(image, 255)]) if color else image
    return bytes(cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 3])[1])


def _uid(seed: int, name: str, part: str) -> str:
    """A DICOM UID (of root 2.25, under which anyone may draw a number) that does not reveal the NIH image."""
    # "phantom" is part of the hashed bytes: another word would change every UID, and with them the files and shards.
    drawn = hashlib.blake2b(f"phantom {seed} {name} {part}".encode(), digest_size=15).digest()
    return f"2.25.{int.from_bytes(drawn, 'big')}"


def _write_dicom(folder: Path, uid: str, plan: _ImagePlan, image: GrayImage, seed: int) -> None:
    """A file with the tags and irregularities of SIIM's: study/series/image.dcm, JPEG Baseline, 8 bits."""
    study, series = _uid(seed, plan.name, "study"), _uid(seed, plan.name, "series")
    dicom = pydicom.Dataset()
    dicom.file_meta = pydicom.dataset.FileMetaDataset()
    dicom.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dicom.SpecificCharacterSet = "ISO_IR 100"
    dicom.SOPClassUID, dicom.SOPInstanceUID = SecondaryCaptureImageStorage, uid
    dicom.StudyInstanceUID, dicom.SeriesInstanceUID = study, series
    dicom.StudyDate, dicom.StudyTime, dicom.AccessionNumber = "19010101", "000000.00", ""
    dicom.Modality, dicom.ConversionType, dicom.BodyPartExamined = "CR", "WSD", "CHEST"
    dicom.ReferringPhysicianName, dicom.SeriesDescription = "", f"view: {plan.view}"
    # A different patient in every file: this is why SIIM's patients must be found through their NIH duplicates.
    dicom.PatientID = dicom.PatientName = f"anon-{uid[-12:]}"
    dicom.PatientBirthDate, dicom.PatientSex, dicom.ViewPosition = "", plan.anatomy.sex, plan.view
    # Without the unit that the standard requires, as in SIIM.
    age = pydicom.DataElement("PatientAge", "AS", str(plan.age), validation_mode=pydicom.config.IGNORE)
    dicom.add(age)
    dicom.StudyID, dicom.SeriesNumber, dicom.InstanceNumber, dicom.PatientOrientation = "", "1", "1", ""
    dicom.SamplesPerPixel, dicom.PhotometricInterpretation = 1, "MONOCHROME2"
    dicom.Rows, dicom.Columns = image.shape
    # The spacing of the scan although the image is smaller, as in SIIM.
    dicom.PixelSpacing = [plan.scan[2], plan.scan[2]]
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit, dicom.PixelRepresentation = 8, 8, 7, 0
    dicom.LossyImageCompression, dicom.LossyImageCompressionMethod = "01", "ISO_10918_1"
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image[..., None]), quality=95, colorspace="GRAY")
    dicom.PixelData = encapsulate([jpeg])
    path = folder / study / series / f"{uid}.dcm"
    path.parent.mkdir(parents=True)
    dicom.save_as(path, enforce_file_format=True)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n", newline="\n")

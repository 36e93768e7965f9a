"""Canaries: a mark wherever a source can hold a text, and the whole way from raw files to a job package without it."""

from __future__ import annotations

import base64
import io
import os
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import wandb
from PIL import Image
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.encaps import encapsulate, get_frame

from cxrscale.cluster import job_package
from cxrscale.io import load_image
from cxrscale.shards import manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.cli.test_app import run
from tests.tiny import TINY_CLASSIFIER

WORD, NUMBER = "ZQXCANARY7", "98765432"
"""The marks; the second one where only digits are allowed."""
TEXT_VRS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT", "UI"}
NEEDED = {"SOPClassUID", "PhotometricInterpretation", "PresentationLUTShape", "VOILUTFunction", "BurnedInAnnotation"}
"""Keywords that decide how pixels are read; a mark there makes the image unreadable."""


# The marked archive


def marked_png(path: Path) -> bytes:
    """The file with the mark in every chunk that can hold a text."""
    data = path.read_bytes()
    exif = Image.Exif()
    exif[0x010E] = WORD
    packed = zlib.compress(WORD.encode() * 9)
    chunks = [
        (b"tEXt", b"PatientName\0" + WORD.encode()),
        (b"zTXt", b"Comment\0\0" + packed),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + WORD.encode()),
        (b"eXIf", exif.tobytes()[6:]),
        (b"prVt", WORD.encode()),
    ]
    extra = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return data[:33] + extra + data[33:] + WORD.encode()


def marked_jpeg(data: bytes) -> bytes:
    exif = Image.Exif()
    exif[0x010E] = WORD
    segments = [
        (0xE1, b"Exif\0\0" + exif.tobytes()[6:]),
        (0xFE, WORD.encode()),
        (0xED, b"Photoshop 3.0\0" + WORD.encode()),
    ]
    extra = b"".join(b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    return data[:2] + extra + data[2:]


def marked_dicom(path: Path, every: int) -> pydicom.Dataset:
    """The file with the mark in text elements of the standard (all: every=1), in a sequence, in a private element."""
    ds = pydicom.dcmread(path)
    elements = [
        (tag, vr)
        for tag, (vr, _, _, _, keyword) in DicomDictionary.items()
        if vr in TEXT_VRS and keyword not in NEEDED and tag >> 16 not in (0, 2)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mark in a list of codes, on purpose
        for tag, vr in elements[::every]:
            value = f"2.25.{NUMBER}" if vr == "UI" else WORD
            ds[tag] = DataElement(tag, vr, value, validation_mode=pydicom.config.IGNORE)
        ds.PatientName = ds.PatientID = ds.InstitutionName = ds.StudyDescription = WORD
        ds.SpecificCharacterSet = "ISO_IR 100"
        item = pydicom.Dataset()
        item.PatientID = WORD
        ds.OtherPatientIDsSequence = [item]
        ds.private_block(0x0011, WORD, create=True).add_new(1, "LO", WORD)
        ds.file_meta.ImplementationVersionName = ds.file_meta.SourceApplicationEntityTitle = WORD
        ds.file_meta.PrivateInformationCreatorUID = f"2.25.{NUMBER}"
        ds.file_meta.PrivateInformation = WORD.encode()
        ds.preamble = WORD.encode().ljust(128, b"\0")
        jpeg = marked_jpeg(get_frame(ds.PixelData, 0, number_of_frames=1))
        ds.PixelData = encapsulate([jpeg])
    return ds


def save(ds: pydicom.Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.save_as(path, enforce_file_format=True)


def marked_table(path: Path, out: Path, rename: dict[str, str]) -> None:
    """The table under the new names, with one more column."""
    header, *rows = path.read_text().splitlines()
    lines = [f"{header},{WORD}"]
    for row in rows:
        cells = row.split(",")
        cells += [""] * (header.count(",") + 1 - len(cells))
        cells[0] = rename[cells[0]]
        if path.name.startswith("Data_Entry"):
            cells[3] = NUMBER + cells[3]
            cells[6] = WORD if len(lines) % 9 == 0 else cells[6]  # the view
        lines.append(",".join([*cells, WORD]))
    out.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def marked(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic archive with marks; two files of each source cannot be read, and one image has text burned in."""
    root = tmp_path_factory.mktemp("marked") / f"{WORD}-hospital"
    images = root / "nih" / "images_001" / "images"
    images.mkdir(parents=True)
    names = {path.name: f"{WORD}-{path.name}" for path in sorted(drawn.nih.rglob("*.png"))}
    for path in drawn.nih.rglob("*.png"):
        (images / names[path.name]).write_bytes(marked_png(path))
    first, second = sorted(images.iterdir())[:2]
    first.write_bytes(first.read_bytes().replace(b"prVt", b"prQt", 1))  # its checksum is that of another name
    second.write_bytes(WORD.encode())
    for table in drawn.nih.glob("*.csv"):
        marked_table(table, root / "nih" / table.name, names)
    for table in drawn.nih.glob("*.txt"):
        (root / "nih" / table.name).write_text("\n".join(names[name] for name in table.read_text().split()))
    uids = {path.stem: f"{WORD}-{path.stem}" for path in sorted(drawn.siim.rglob("*.dcm"))}
    for number, path in enumerate(sorted(drawn.siim.rglob("*.dcm"), key=lambda path: path.stem)):
        ds = marked_dicom(path, every=1 if number in (0, 3, 4) else 200)
        if number == 0:
            ds["PhotometricInterpretation"].value = WORD
        if number == 1:
            ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"2.25.{NUMBER}")
        if number == 2:
            ds.BurnedInAnnotation = "YES"
        save(ds, root / "siim" / "dicom-images-train" / f"{WORD}-study" / f"{uids[path.stem]}.dcm")
    marked_table(next(drawn.siim.glob("*.csv")), root / "siim" / "train-rle.csv", uids)
    children = root / "kermany" / "train" / "NORMAL"
    children.mkdir(parents=True)
    for number, path in enumerate(sorted(drawn.nih.rglob("*.png"))[:6]):
        jpeg = io.BytesIO()
        Image.fromarray(load_image(path.read_bytes()).image_HW).save(jpeg, "JPEG")
        (children / f"IM-{NUMBER}{number}-0001.jpeg").write_bytes(marked_jpeg(jpeg.getvalue()) + WORD.encode())
    return root


# The search


def forms() -> list[bytes]:
    """The marks as they can stand in a file, in lower case."""
    result = []
    for mark in (WORD.lower().encode(), WORD.encode(), NUMBER.encode()):
        result += [mark.lower(), mark.decode().encode("utf-16-le").lower(), mark.hex().encode()]
        # base64 of the mark at each of the three positions, without the characters that depend on its neighbors
        result += [base64.b64encode(b"\0" * shift + mark)[4 if shift else 0 : -4].lower() for shift in range(3)]
    return result


FORMS = forms()


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of a file and of everything that is packed in it."""
    yield name, name.encode() + b"\n" + data
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        yield name, f"{table.schema.metadata} {table.to_pylist()}".encode()
    elif name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield from contents(f"{name}/{member.name}", file.read())
    elif data.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member_name in archive.namelist():
                yield from contents(f"{name}/{member_name}", archive.read(member_name))
    elif name.endswith(".png") and data.startswith(b"\x89PNG"):
        with suppress(OSError), Image.open(io.BytesIO(data)) as image:  # some are damaged on purpose
            image.load()
            yield name, str(image.info).encode()


def marks_in(root: Path) -> list[str]:
    """The files under a folder that hold a mark, in whatever form and however packed."""
    found = set()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            for name, data in contents(str(path.relative_to(root)), path.read_bytes()):
                if any(form in data.lower() for form in FORMS):
                    found.add(name)
    return sorted(found)


# The whole way


def go_all_the_way(marked: Path, out: Path, capsys: pytest.CaptureFixture[str], *local: str) -> None:
    """shard, audit, preview, train, threshold, evaluate, report, predict, submit; what is said goes to out/*.log."""
    said: list[str] = []

    def command(*words: str) -> None:
        code, lines, errors = run(capsys, *words)
        assert code == 0, errors
        said.extend([*lines, errors])

    nih, siim, runs = str(out / "nih"), str(out / "siim"), out / "runs"
    private = str(out.parent / "private.csv")
    command("shard", "nih", str(marked / "nih"), "pack.codec=source", "--out", nih, "--keep-map", private, *local)
    source = ["pack.codec=source", "--patients-from", nih]
    command("shard", "siim", str(marked / "siim"), *source, "--out", siim, *local)
    command("shard", "kermany", str(marked / "kermany"), "pack.codec=source", "--out", str(out / "kermany"), *local)
    command("shard", "nih", str(marked / "nih"), "pack.size=64", "--out", str(out / "jpeg"), *local)
    command("audit", nih, siim, "--out", str(out / "audit.html"))
    recipe = out / "tiny.yaml"
    recipe.write_text("train: {epochs: 1}\n")
    data = [*TINY_CLASSIFIER, f"data.shards=[{nih}]"]
    command("preview", str(recipe), *data, "--out", str(out / "preview.html"))
    given = [f"tracking.runs_dir={runs}", "tracking.name=tiny", "tracking.wandb=offline", "scaling.num_workers=1"]
    command("train", str(recipe), *data, *given, *local)
    trained = str(runs / "tiny")
    command("threshold", trained, "--resamples", "20")
    command("evaluate", trained, "--resamples", "20")
    command("predict", "--split", "train", "--run", trained)
    table = str(out.parent / "private-scores.csv")
    command("predict", "--split", "test", "--run", trained, "--id-map", private, "--out", table)
    (out / "commands.log").write_text("\n".join(said))
    checkout = out / "checkout"
    shutil.copytree(Path(job_package.__file__).parents[1], checkout / "cxrscale", ignore=lambda *_: ["__pycache__"])
    shutil.copytree(runs / "tiny", checkout / "mine")
    shutil.copy(private, checkout / "map.csv")
    shutil.copy(private, checkout / "cxrscale" / "map.csv")
    names = job_package.package_files(checkout)
    job_package.pack(checkout, names, out / "job.zip")
    shutil.rmtree(checkout)
    assert {Path(name).suffix for name in names} <= {".py", ".pyi", ".jinja", ".typed"}


def check(out: Path) -> None:
    assert marks_in(out) == []
    assert (out / "runs" / "tiny" / "report.html").is_file()
    assert list((out / "runs" / "tiny" / "wandb").rglob("*.wandb"))
    assert list((out / "runs" / "tiny" / "wandb").rglob("*.png")) == []
    log = (out / "commands.log").read_text()
    assert log.count("2 quarantined") >= 3
    assert "1 images have text burned in" in log
    for name in ("private.csv", "private-scores.csv"):
        assert WORD in (out.parent / name).read_text()
        assert stat.S_IMODE((out.parent / name).stat().st_mode) == 0o600
    for name in ("nih", "siim"):
        assert len((out / name / "quarantine.jsonl").read_text().splitlines()) == 2


def test_no_mark_of_the_archive_is_left_anywhere(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(out / "temporary"))
    (out / "temporary").mkdir(mode=0o750)
    wandb.teardown()  # ends the wandb-core of an earlier test: it writes under the umask that it was started with
    before = os.umask(0o027)
    try:
        go_all_the_way(marked, out, capsys, "--local")
    finally:
        os.umask(before)
    check(out)
    modes = {str(path.relative_to(out)): stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o027} == {}, "the umask is 027"
    assert modes["nih/manifest.parquet"] == modes["runs/tiny/best.pt"] == 0o640


@pytest.mark.slow
def test_no_mark_is_left_on_ray_either(
    ray_cluster: Any, marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    go_all_the_way(marked, out, capsys)
    check(out)
    assert marks_in(Path(ray_cluster.head_node.get_logs_dir_path())) == []


def test_files_are_named_to_a_person_at_a_terminal_only(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["shard", "nih", str(marked / "nih"), "pack.size=64", "pack.limit=5", "--out", str(tmp_path), "--local"]
    _, _, errors = run(capsys, *words)
    assert WORD not in errors
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, errors = run(capsys, *words)
    assert errors.count("quarantined /") == 2
    assert f"{WORD}-00000001_000.png: PNG is damaged: the CRC of the chunk '...' at byte" in errors


def test_the_search_finds_what_is_there(marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals = ["pack.patient_ids=original", "pack.codec=source", "--out", str(tmp_path / "out"), "--local"]
    assert run(capsys, "shard", "nih", str(marked / "nih"), *originals)[0] == 0
    found = marks_in(tmp_path / "out")
    assert {"manifest.parquet", "fingerprints.parquet", "quarantine.jsonl"} <= set(found)
    assert any(".tar/" in name for name in found)
    assert not any(name.endswith(".png") and not name.split("/")[-1].startswith(WORD) for name in found)
    every = {str(path.relative_to(marked)) for path in marked.rglob("*") if path.is_file()}
    assert every <= set(marks_in(marked)), "each file of the archive, by its name or content"
    (tmp_path / "forms").mkdir()
    for number, data in enumerate(
        [WORD.encode("utf-16"), base64.b64encode(b"x" + WORD.encode() + b"y"), NUMBER.encode()]
    ):
        (tmp_path / "forms" / str(number)).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "forms" / "3.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", WORD * 9)
    assert marks_in(tmp_path / "forms") == ["0", "1", "2", "3.pt/a"]


def test_the_pixels_stay_equal_to_the_bit(marked: Path, drawn: SyntheticPaths) -> None:
    """The marks are in the metadata alone: what the canary test packs are images that can be read."""
    for folder in ("nih", "siim"):
        suffix = {"nih": "*.png", "siim": "*.dcm"}[folder]
        ours = sorted((marked / folder).rglob(suffix))[3:]
        theirs = {path.name: path for path in Path(getattr(drawn, folder)).rglob(suffix)}
        for path in ours:
            other = theirs[path.name.removeprefix(f"{WORD}-")]
            image_HW = load_image(path.read_bytes(), name=path.name).image_HW
            assert np.array_equal(image_HW, load_image(other.read_bytes(), name=other.name).image_HW)


def test_an_image_with_text_burned_in_is_quarantined_on_request(
    marked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["shard", "siim", str(marked / "siim"), "pack.size=64", "pack.burned_in=quarantine", "--out", str(out)]
    code, lines, _ = run(capsys, *words, "--local")
    assert code == 0
    assert any("3 quarantined" in line for line in lines)
    assert "BurnedInAnnotation (0028,0301) is YES" in (out / "quarantine.jsonl").read_text()
    assert manifest.load(str(out)).metadata[0]["burned_in"] == 0

"""A round trip through a real archive: source, segmentation, report and capture in by C-STORE, found, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from cxrscale.inference.dicom_objects import KINDS, SC, SEG, SR
from tests.inference.dicom_objects.made import PATIENT, ellipse, make, predicted, read, source_file
from tests.servers import free_port

pytestmark = pytest.mark.slow


class Archive:
    """An Orthanc of its own on this machine."""

    def __init__(self, dicom_port: int, http_port: int) -> None:
        self.dicom_port, self.http_port = dicom_port, http_port

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer of its REST interface."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", data, timeout=10) as answer:
            content = answer.read()
        return content if path.endswith("/file") else json.loads(content)

    def store(self, *paths: Path) -> None:
        """C-STORE by DCMTK's storescu; Orthanc takes every presentation context."""
        words = [tool("storescu"), "-aec", "ORTHANC", "127.0.0.1", str(self.dicom_port), *map(str, paths)]
        # Its default contexts are only those of images; this proposes what each file needs.
        done = subprocess.run([words[0], "-R", *words[1:]], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def find(self, *keys: str) -> str:
        """C-FIND by DCMTK's findscu at the level of series."""
        words = [word for key in ("QueryRetrieveLevel=SERIES", *keys) for word in ("-k", key)]
        done = subprocess.run(
            [tool("findscu"), "-S", "-aec", "ORTHANC", "127.0.0.1", str(self.dicom_port), *words],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; it is in Debian's {'orthanc' if name == 'Orthanc' else 'dcmtk'}")
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    """An Orthanc that is empty, and gone after the test."""
    for name in ("storescu", "findscu"):
        tool(name)
    path = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin") or tool("Orthanc")
    made = Archive(free_port(), free_port())
    settings = {
        "Name": "test",
        "StorageDirectory": str(tmp_path / "db"),
        "IndexDirectory": str(tmp_path / "db"),
        "HttpPort": made.http_port,
        "DicomPort": made.dicom_port,
        "DicomAet": "ORTHANC",
        "RemoteAccessAllowed": False,
        "DicomAlwaysAllowFind": True,
        "Plugins": [],
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([path, str(tmp_path / "orthanc.json")], stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                made.ask("/system")
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text(errors="replace")[-2000:]
                time.sleep(0.1)
        yield made
    finally:
        process.terminate()
        process.wait(30)


def test_objects_are_stored_found_and_come_back(archive: Archive, tmp_path: Path) -> None:
    source = tmp_path / "image.dcm"
    source.write_bytes(source_file())
    mask_HW = ellipse(40, 34)
    made = {kind: make(tmp_path, kind, predicted(source, mask_HW)) for kind in KINDS}
    archive.store(source, *made.values())
    (study,) = archive.ask("/studies?expand")
    assert study["MainDicomTags"]["StudyInstanceUID"] == PATIENT["StudyInstanceUID"]
    assert study["PatientMainDicomTags"]["PatientID"] == PATIENT["PatientID"]
    series = [archive.ask(f"/series/{name}") for name in study["Series"]]
    assert sorted(one["MainDicomTags"]["Modality"] for one in series) == ["CR", "OT", "SEG", "SR"]
    for kind, modality in ((SEG, "SEG"), (SR, "SR"), (SC, "OT")):
        query = {"StudyInstanceUID": PATIENT["StudyInstanceUID"], "Modality": modality}
        (found,) = archive.ask("/tools/find", {"Level": "Instance", "Query": query})
        back, ours = archive.ask(f"/instances/{found}/file"), read(made[kind])
        (tmp_path / "back.dcm").write_bytes(back)
        returned = pydicom.dcmread(tmp_path / "back.dcm")
        assert returned == ours
        if kind == SEG:
            assert np.array_equal(returned.pixel_array.reshape(40, 34).astype(np.bool_), mask_HW)
        answer = archive.find(
            f"StudyInstanceUID={PATIENT['StudyInstanceUID']}", f"Modality={modality}", "SeriesInstanceUID"
        )
        assert ours.SeriesInstanceUID in answer
    # The same objects again are the same instances.
    archive.store(*made.values())
    assert archive.ask("/statistics")["CountInstances"] == 4

"""STOW-RS by a client of others: what is taken, what is refused, and the objects that come back."""

from __future__ import annotations

import io
from pathlib import Path

import pydicom
import pytest

from cxrscale.sources.synthetic.archive import SyntheticPaths
from tests.inference.serve.conftest import Served

client_module = pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed")


@pytest.fixture(scope="module")
def dicoms(drawn: SyntheticPaths) -> list[Path]:
    return sorted(drawn.siim.rglob("*.dcm"))[:3]


def test_a_client_of_dicomweb_stores_instances(served: Served, dicoms: list[Path]) -> None:
    instances = [pydicom.dcmread(path) for path in dicoms]
    response = client_module.DICOMwebClient(url=served.address).store_instances(datasets=instances)
    taken = [item.ReferencedSOPInstanceUID for item in response.ReferencedSOPSequence]
    assert taken == [one.SOPInstanceUID for one in instances]
    assert "FailedSOPSequence" not in response


def related(parts: list[bytes]) -> tuple[bytes, dict[str, str]]:
    body = b"".join(b"--xyz\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts)
    return body + b"--xyz--\r\n", {"Content-Type": 'multipart/related; type="application/dicom"; boundary=xyz'}


def test_the_objects_come_back_where_the_client_takes_them(served: Served, dicoms: list[Path]) -> None:
    body, headers = related([path.read_bytes() for path in dicoms])
    with served.client() as client:
        accept = {"Accept": 'multipart/related; type="application/dicom"'}
        answer = client.post("/studies", params={"model": "segmenter"}, content=body, headers=headers | accept)
    assert answer.status_code == 200
    boundary = answer.headers["content-type"].rpartition("boundary=")[2]
    parts = answer.content.split(f"--{boundary}".encode())[1:-1]
    made = [pydicom.dcmread(io.BytesIO(part.split(b"\r\n\r\n", 1)[1][:-2])) for part in parts]
    sources = [pydicom.dcmread(path) for path in dicoms]
    assert [one.StudyInstanceUID for one in made] == [one.StudyInstanceUID for one in sources]
    assert {one.Modality for one in made} <= {"SEG", "SR"}


def test_what_is_no_image_is_named_as_failed(served: Served, dicoms: list[Path]) -> None:
    body, headers = related([dicoms[0].read_bytes(), b"nothing"])
    with served.client() as client:
        some = client.post("/studies", content=body, headers=headers)
        none = client.post("/studies", content=related([b"nothing"])[0], headers=headers)
        torn = client.post("/studies", content=b"torn", headers=headers)
    assert (some.status_code, none.status_code, torn.status_code) == (202, 409, 422)
    assert len(some.json()["00081199"]["Value"]) == len(some.json()["00081198"]["Value"]) == 1

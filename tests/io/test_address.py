"""One rule for every spelling of an address."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.io import address, storage
from cxrscale.types import UserError

ACCEPTED = {
    "runs": "runs",
    "./runs": "./runs",
    "../runs": "../runs",
    "/data/a b/runs/": "/data/a b/runs/",
    "/data/50%": "/data/50%",
    "/data/[brackets]": "/data/[brackets]",
    "./s3:x": "./s3:x",
    "a:b": "a:b",
    "C:\\data": "C:\\data",
    "x/s3://y": "x/s3://y",
    "~/runs": str(Path("~/runs").expanduser()),
    "~": str(Path("~").expanduser()),
    "a~b": "a~b",
    "file:///data/x": "/data/x",
    "FILE:///data/x": "/data/x",
    "file://localhost/data/x": "/data/x",
    "file:/data/x": "/data/x",
    "file:///data/a%20b": "/data/a b",
    "local:///data/x": "/data/x",
    "s3://b": "s3://b",
    "s3://b/": "s3://b/",
    "s3://b/runs/x": "s3://b/runs/x",
    "S3://b/X": "s3://b/X",
    "gs://b/x": "gs://b/x",
    "GCS://b/x": "gcs://b/x",
    "az://container/x": "az://container/x",
    "abfss://container@account/x": "abfss://container@account/x",
    "https://host/x": "https://host/x",
    "memory:///x": "memory:///x",
    "s3://b/a..b/x": "s3://b/a..b/x",
}
REFUSED = {
    "": "an empty address",
    "  ": "an empty address",
    "a\nb": "control character",
    "a\0b": "control character",
    "file:///a%00b": "control character",
    "s3:/b/x": "write s3://b/x",
    "s3:b": "write s3://b",
    "S3:/b": "write s3://b",
    "gs:/b": "write gs://b",
    "https:/host": "write https://host",
    "s3://": "names no bucket",
    "s3:///x": "names no bucket",
    "s3://b/../c": "holds '..'",
    "foo://x": "foo:// is not supported",
    "hdfs://namenode/x": "hdfs:// is not supported",
    "FTP://x": "ftp:// is not supported",
    "file://other/x": "names the machine 'other'",
    "file://runs": "names the machine 'runs'",
    "file://": "names the machine ''",
    "file:x": "write file:///folder",
    "local://x": "names the machine 'x'",
    "simplecache::s3://b/x": "chained file systems",
    "s3://key:secret@b/x": "with credentials in it",
}


@pytest.mark.parametrize(("given", "expected"), ACCEPTED.items())
def test_an_address_has_one_spelling(given: str, expected: str) -> None:
    assert address.normalize(given) == expected
    assert address.normalize(expected) == expected
    assert storage.is_remote(given) == ("://" in expected and not expected.startswith("x/"))


@pytest.mark.parametrize(("given", "message"), REFUSED.items())
def test_what_is_no_address_is_one_line_everywhere(given: str, message: str) -> None:
    for use in (storage.is_remote, storage.local_path, storage.join, storage.absolute, storage.exists, storage.read):
        with pytest.raises(UserError) as caught:
            use(given)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), min_size=1))
def test_any_text_is_an_address_or_one_line(text: str) -> None:
    try:
        once = address.normalize(text)
    except UserError:
        return
    assert address.normalize(once) == once


def test_the_parts_of_an_address_are_joined() -> None:
    assert storage.join("S3://b/runs/", "x", "y") == "s3://b/runs/x/y"
    assert storage.join("file:/data", "x") == "/data/x"
    assert storage.absolute("runs") == str(Path.cwd() / "runs")

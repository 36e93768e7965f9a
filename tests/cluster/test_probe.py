"""Measurements of this machine: versions, disks, addresses, and all light measurements together."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cxrscale
from cxrscale.cluster import probe


def test_versions_are_those_of_this_process_without_build_suffixes() -> None:
    versions = probe.versions()
    assert set(versions) == {"python", "cxrscale", *probe.PACKAGES}
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__.partition("+")[0]
    version, _, digest = versions["cxrscale"].partition(" ")
    assert version == cxrscale.__version__
    assert len(digest.strip("()")) == 8
    assert probe.versions() == versions


def test_a_disk_is_measured_and_no_file_remains(tmp_path: Path) -> None:
    result = probe.measure_disk(str(tmp_path), size=2**20)
    assert result["path"] == str(tmp_path)
    assert min(result["free"], result["write"], result["read"]) > 0
    assert list(tmp_path.iterdir()) == []


def test_the_disk_of_a_missing_folder_is_that_of_its_parent(tmp_path: Path) -> None:
    result = probe.measure_disk(str(tmp_path / "not" / "yet"), size=2**20)
    assert result["path"] == str(tmp_path / "not" / "yet")
    assert result["write"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_write_permission_has_an_error() -> None:
    result = probe.measure_disk("/proc", size=2**20)
    assert result["error"]
    assert "write" not in result


def test_a_local_folder_is_reached_and_left_empty(tmp_path: Path) -> None:
    for write in (True, False):
        result = probe.reach_address(str(tmp_path), write=write)
        assert set(result) == {"seconds"}
        assert 0 <= result["seconds"] < 10
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_has_an_error(tmp_path: Path) -> None:
    assert probe.reach_address(str(tmp_path / "missing"), write=False)["error"] == probe.ABSENT
    (tmp_path / "file").write_bytes(b"")
    error = probe.reach_address(str(tmp_path / "file"))["error"]
    assert str(tmp_path / "file") in error
    assert "\n" not in error


def test_an_endpoint_that_never_answers_takes_only_the_timeout() -> None:
    # TEST-NET-1 (RFC 5737): no host has this address. In a process of its own: fsspec keeps a file system's endpoint.
    code = "from cxrscale.cluster import probe; print(probe.reach_address('s3://lonely/runs', timeout=1.0))"
    environment = os.environ | {"AWS_ENDPOINT_URL": "http://192.0.2.1:9", "AWS_MAX_ATTEMPTS": "1"}
    start = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "'error': " in ran.stdout
    assert time.monotonic() - start < 30


def test_light_facts_have_everything_that_the_doctor_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    read, written = tmp_path / "read", tmp_path / "written"
    read.mkdir()
    facts = probe.light_facts({"runs folder": str(tmp_path)}, (str(read),), (str(written),))
    assert set(facts) == {
        *("versions", "no_bytecode", "auth_mode", "cpus", "memory", "shm", "open_files"),
        *("disks", "reads", "writes"),
    }
    assert facts["cpus"] >= 1
    assert facts["memory"] > 2**28
    assert (facts["auth_mode"], facts["no_bytecode"]) == ("token", True)
    assert set(facts["disks"]) == {"runs folder"}
    assert set(facts["reads"][str(read)]) == {"seconds"}
    assert set(facts["writes"][str(written)]) == {"seconds"}

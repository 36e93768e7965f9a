"""Verification finds whatever differs from what was packed."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrscale.shards import manifest
from cxrscale.shards.verify import verify
from cxrscale.types import UserError


@pytest.fixture
def copy(nih_shards: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(nih_shards, tmp_path / "copy"))


def test_a_whole_set_has_no_fault(nih_shards: str) -> None:
    assert verify(nih_shards) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(copy: Path, place: float, bit: int) -> None:
    tar = sorted(copy.glob("*.tar"))[0]
    whole = tar.read_bytes()
    damaged = bytearray(whole)
    damaged[int(place * len(damaged))] ^= 1 << bit
    tar.write_bytes(damaged)
    try:
        faults = verify(str(copy))
    finally:
        tar.write_bytes(whole)
    assert len(faults) == 1
    assert tar.name in faults[0]


def test_a_missing_an_extra_and_a_short_tar_are_found(copy: Path) -> None:
    first, second, *_ = sorted(copy.glob("*.tar"))
    first.rename(copy / "extra.tar")
    second.write_bytes(second.read_bytes()[:-1])
    faults = verify(str(copy))
    assert f"{first.name}: missing" in faults
    assert "extra.tar: not in the manifest" in faults
    assert any(second.name in fault and "bytes, the manifest says" in fault for fault in faults)


def test_no_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{manifest.NAME} does not exist; make the shards"):
        verify(str(tmp_path))

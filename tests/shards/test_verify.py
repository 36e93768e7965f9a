"""Verification finds every difference from the packed bytes."""

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


def test_an_intact_dataset_has_no_fault(nih_shards: str) -> None:
    assert verify(nih_shards) == []


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(copy: Path, position: float, bit: int) -> None:
    tar = sorted(copy.glob("*.tar"))[0]
    original = tar.read_bytes()
    damaged = bytearray(original)
    damaged[int(position * len(damaged))] ^= 1 << bit
    tar.write_bytes(damaged)
    try:
        faults = verify(str(copy))
    finally:
        tar.write_bytes(original)
    assert len(faults) == 1
    assert tar.name in faults[0]


def test_missing_extra_and_truncated_tars_are_found(copy: Path) -> None:
    first, second, *_ = sorted(copy.glob("*.tar"))
    first.rename(copy / "extra.tar")
    second.write_bytes(second.read_bytes()[:-1])
    faults = verify(str(copy))
    assert f"{first.name}: missing" in faults
    assert "extra.tar: not in the manifest" in faults
    assert any(second.name in fault and "bytes, the manifest has" in fault for fault in faults)


def test_a_missing_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{manifest.NAME} does not exist; make the shards"):
        verify(str(tmp_path))

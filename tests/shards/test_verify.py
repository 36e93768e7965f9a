"""Verification finds every difference from the packed bytes."""

import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrscale.config import Pack
from cxrscale.shards import build, contents, leakage, manifest
from cxrscale.shards.repair import repair
from cxrscale.shards.verify import verify
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.small_datasets import rewrite_manifest


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


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_damaged_table_is_one_line_for_whoever_opens_it(copy: Path) -> None:
    flip(copy / manifest.NAME, 5000)
    with pytest.raises(UserError, match=r"manifest\.parquet is damaged \(differs from its digest in dataset\.json"):
        manifest.load(str(copy))
    assert verify(str(copy)) == ["manifest.parquet: differs from its digest in dataset.json"]
    flip(copy / manifest.NAME, 5000)
    flip(copy / manifest.FINGERPRINTS, 5000)
    with pytest.raises(UserError, match=r"fingerprints\.parquet is damaged"):
        leakage.merged_patients(leakage.join_datasets(str(copy)))
    flip(copy / contents.NAME, 200)
    with pytest.raises(UserError, match=r"dataset\.json is damaged or was edited"):
        manifest.load(str(copy))


def test_a_damaged_page_of_an_older_dataset_is_one_line_too(copy: Path) -> None:
    (copy / contents.NAME).unlink()
    whole = (copy / manifest.NAME).read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    seen, positions, table = 0, range(4, footer, footer // 25), manifest.load(str(copy)).table
    for position in positions:
        flip(copy / manifest.NAME, position)
        try:
            if verify(str(copy)):
                seen += 1
            else:  # in the header of a page, which has no checksum
                assert manifest.load(str(copy)).table.equals(table)
        except UserError:
            seen += 1
        (copy / manifest.NAME).write_bytes(whole)
    assert seen > 0.8 * len(positions), "its pages have checksums"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("label.Effusion", 1, "has another label Effusion than"),
        ("patient", "somebody", "has another patient than"),
        ("split", "train", "has another split than"),
        ("image_offset", 512, "has no image in"),
    ],
)
def test_rows_are_held_against_the_members_of_their_tars(
    column: str, value: str | int, message: str, copy: Path
) -> None:
    data = manifest.load(str(copy))
    position = data.table.column_names.index(column)
    values = data.table[column].to_pylist()
    row = next(row for row in range(len(values)) if values[row] != value and data.split[row] != "train")
    values[row] = value
    changed = data.table.set_column(position, column, pa.array(values, data.table.schema.field(column).type))
    rewrite_manifest(copy, changed.drop_columns("root"), data.metadata[0])
    assert any(f"row of {data.image_id[row]} {message}" in line for line in verify(str(copy)))


def test_repair_brings_indices_and_fingerprints_back_to_the_bit_and_nothing_else(copy: Path, nih_shards: str) -> None:
    index = sorted(copy.glob("*.idx"))[0]
    index.unlink()
    flip(copy / manifest.FINGERPRINTS, 5000)
    flip(copy / "ledger.json", 40)
    assert len(verify(str(copy))) == 3
    assert repair(str(copy)) == [f"{index.name}: rewritten", "fingerprints.parquet: rewritten"]
    assert [line.split(":")[0] for line in verify(str(copy))] == ["ledger.json"]
    for name in (index.name, manifest.FINGERPRINTS):
        assert (copy / name).read_bytes() == Path(nih_shards, name).read_bytes()
    tar = sorted(copy.glob("*.tar"))[0]
    flip(tar, 5000)
    index.unlink()
    assert repair(str(copy)) == [f"{index.name}: not rebuilt, {tar.name} is damaged"]


@pytest.mark.parametrize("codec", ["jpeg", "png", "source"])
def test_fingerprints_are_those_of_the_stored_images(codec: str, drawn: SyntheticPaths, tmp_path: Path) -> None:
    settings = Pack.model_validate({"size": 48, "codec": codec, "limit": 5})
    build.build_shards("nih", str(drawn.nih), settings, str(tmp_path), local=True)
    (tmp_path / manifest.FINGERPRINTS).unlink()
    assert repair(str(tmp_path)) == ["fingerprints.parquet: rewritten"]
    assert verify(str(tmp_path)) == []


def test_the_name_of_a_dataset_covers_every_file(copy: Path) -> None:
    listed = contents.read(str(copy))
    assert listed is not None
    assert manifest.load(str(copy)).digest == listed.digest
    assert set(listed.files) == {path.name for path in copy.iterdir()} - {contents.NAME}


def test_a_dataset_that_was_cut_short_before_its_last_file_is_completed(
    drawn: SyntheticPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, out = Pack(size=48, samples_per_shard=5, limit=10), tmp_path / "set"
    whole = tmp_path / "whole"
    build.build_shards("nih", str(drawn.nih), settings, str(whole), local=True)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(contents, "write", die)
        with pytest.raises(KeyboardInterrupt):
            build.build_shards("nih", str(drawn.nih), settings, str(out), local=True)
    assert (out / manifest.NAME).exists()
    assert build.build_shards("nih", str(drawn.nih), settings, str(out), local=True).images == 10
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_a_dataset_without_dataset_json_loads_with_a_line(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copy / contents.NAME).unlink()
    with caplog.at_level(logging.WARNING, "cxrscale"):
        assert len(manifest.load(str(copy))) == len(manifest.load(str(copy))) > 0
    assert caplog.text.count("is of an older version: it has no dataset.json") == 1
    assert verify(str(copy)) == []

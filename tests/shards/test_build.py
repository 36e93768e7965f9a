"""From sources to splits: every policy, hashed patient IDs, duplicates between sources and within one."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.shards import build, manifest
from cxrscale.shards.splits import overlapping_patients
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import ImageRecord, UserError


@pytest.fixture(scope="module")
def records(drawn: SyntheticPaths) -> list[ImageRecord]:
    return sources.read("nih", str(drawn.nih)).records


@pytest.mark.parametrize("policy", ["official", "random", "chexnet", "kfold"])
def test_no_policy_puts_a_patient_into_two_splits(policy: str, records: list[ImageRecord]) -> None:
    split = build.assign(records, Pack.model_validate({"split": policy, "folds": 4}))
    assert overlapping_patients([record.patient for record in records], split) == []
    expected = {f"fold{n}" for n in range(4)} if policy == "kfold" else {"train", "val", "test"}
    assert set(split) == expected


def test_the_official_split_is_the_published_test_list(records: list[ImageRecord]) -> None:
    split = build.assign(records, Pack())
    assert [name == "test" for name in split] == [record.split == "test" for record in records]


def test_the_user_can_give_lists(records: list[ImageRecord], tmp_path: Path) -> None:
    ids = [record.image_id for record in records]
    (tmp_path / "train.txt").write_text("\n".join(ids[:50]))
    (tmp_path / "val.txt").write_text("\n".join(ids[50:60]))
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("train", "val")}
    split = build.assign(records, Pack(split="lists", split_lists=lists))
    assert split == ["train"] * 50 + ["val"] * 10 + ["unlisted"] * 20
    with pytest.raises(UserError, match=r"pack\.split=lists needs pack\.split_lists"):
        build.assign(records, Pack(split="lists"))


def test_images_without_a_label_get_a_split_of_their_own(drawn: SyntheticPaths) -> None:
    siim = sources.read("siim", str(drawn.siim)).records
    split = build.assign(siim, Pack(masks=True))
    assert [name == build.UNLABELED for name in split] == [record.rles is None for record in siim]
    assert build.UNLABELED in split


def test_no_original_patient_name_is_in_a_shard(drawn: SyntheticPaths, siim_shards: str) -> None:
    import pydicom

    names = set()
    for path in drawn.siim.rglob("*.dcm"):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        names |= {str(header.PatientID).encode(), str(header.PatientName).encode(), str(header.StudyDate).encode()}
    names.discard(b"")
    content = b"".join(path.read_bytes() for path in sorted(Path(siim_shards).iterdir()) if path.is_file())
    assert names
    assert [name for name in names if name in content] == []


def test_siim_inherits_patients_and_splits_from_its_nih_duplicates(nih_shards: str, siim_shards: str) -> None:
    nih, siim = manifest.load(nih_shards), manifest.load(siim_shards)
    assert siim.metadata[0]["patients_from"] == "nih"
    split_of = dict(zip(nih.patient.tolist(), nih.split.tolist(), strict=True))
    for patient, split in zip(siim.patient.tolist(), siim.split.tolist(), strict=True):
        assert split in (split_of[patient], build.UNLABELED)


def test_patients_cannot_be_taken_from_a_dataset_without_these_images(drawn: SyntheticPaths, tmp_path: Path) -> None:
    siim = Path(shutil.copytree(drawn.siim, tmp_path / "siim"))
    for path in sorted(siim.rglob("*.dcm"))[1:]:
        path.unlink()
    one, out = str(tmp_path / "one"), str(tmp_path / "out")
    build.build_shards("nih", str(drawn.nih), Pack(size=64, limit=1), one, local=True)
    with pytest.raises(UserError, match=r"--patients-from .*it has none of these \d+ images"):
        build.build_shards("siim", str(siim), Pack(size=64), out, patients_from_dataset=one, local=True)


def test_patients_who_share_an_image_are_merged(drawn: SyntheticPaths, tmp_path: Path) -> None:
    nih = Path(shutil.copytree(drawn.nih, tmp_path / "nih"))
    first, *_, last = sorted(nih.rglob("*.png"))
    shutil.copy(first, last)
    records = sources.read("nih", str(nih)).records
    merged = build.merge_duplicates(records, Pack(), local=True)
    after = {record.image_id: record.patient for record in merged}
    assert after[first.name] == after[last.name]
    before = {record.image_id: record.patient for record in records}
    assert before[first.name] != before[last.name]
    changed = [name for name in after if after[name] != before[name]]
    assert {before[name] for name in changed} == {max(before[first.name], before[last.name])}


def test_a_manifest_has_the_metadata_of_its_dataset(nih_shards: str) -> None:
    metadata = manifest.load(nih_shards).metadata[0]
    assert metadata["pack"]["size"] == 64
    assert len(metadata["input"]) == 64
    assert 0 < metadata["pixel_std"] < 0.5
    assert np.isclose(sum(tar["bytes"] for tar in metadata["shards"].values()) % 512, 0)

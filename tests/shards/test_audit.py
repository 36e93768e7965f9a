"""The audit counts as the tables do, names every planted leak, and reports what cannot be checked."""

import csv
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.io import decode_mask, encode_jpeg, load_image, read_artifact, resize_image, write_artifact
from cxrscale.reporting import audit_page
from cxrscale.shards import Audit, Leaks, audit, build, contents, duplicates, leakage, manifest
from cxrscale.shards.audit_models import LabelCounts
from cxrscale.shards.verify import verify
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.conftest import keyed
from tests.small_datasets import rewrite_manifest

SETTINGS = Pack(size=64, samples_per_shard=20)


@pytest.fixture(scope="module")
def strangers(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The synthetic SIIM images under their own patients and splits, as without a dataset of NIH."""
    out = str(tmp_path_factory.mktemp("strangers") / "siim")
    build.build_shards("siim", str(drawn.siim), SETTINGS.model_copy(update={"masks": True}), out, local=True)
    return out


def rewritten(root: str, out: Path, change: Callable[[pa.Table], pa.Table], **metadata: Any) -> str:
    """A copy of a dataset with another manifest."""
    shutil.copytree(root, out)
    data = manifest.load(root)
    rewrite_manifest(out, change(data.table.drop_columns("root")), {**data.metadata[0], **metadata})
    return str(out)


def with_split(table: pa.Table, image_id: str, split: str) -> pa.Table:
    """The table with one image moved to a split."""
    moved = [
        split if name == image_id else old
        for name, old in zip(table["image_id"].to_pylist(), table["split"].to_pylist(), strict=True)
    ]
    return table.set_column(table.column_names.index("split"), "split", pa.array(moved))


def same(table: pa.Table) -> pa.Table:
    return table


def a_patient_with_two_images(root: str) -> tuple[str, str]:
    """(patient, one of its images) in train."""
    data = manifest.load(root)
    rows = data.rows("train")
    names, counts = np.unique(data.patient[rows].astype(str), return_counts=True)
    patient = str(names[counts > 1][0])
    return patient, str(data.image_id[rows][data.patient[rows] == patient][0])


def test_counts_are_those_of_the_tables(drawn: SyntheticPaths, nih_shards: str) -> None:
    with next(drawn.nih.glob("Data_Entry*.csv")).open() as file:
        table = list(csv.DictReader(file))
    result, data = audit.audit(nih_shards), manifest.load(nih_shards)
    our_split = dict(zip(data.image_id.tolist(), data.split.tolist(), strict=True))
    split_of = {row["Image Index"]: our_split[keyed("nih", row["Image Index"])] for row in table}
    assert result.images == len(table)
    assert result.leaks.patients == len({row["Patient ID"] for row in table})
    assert result.splits == data.split_counts()
    assert list(result.splits) == ["train", "val", "test"]
    for finding, by_split in result.findings.items():
        for split, counts in by_split.items():
            rows = [row for row in table if split_of[row["Image Index"]] == split]
            present = sum(finding in row["Finding Labels"].split("|") for row in rows)
            assert counts == LabelCounts(present=present, absent=len(rows) - present, unlabeled=0)
    for split, count in result.no_finding.items():
        healthy = (row["Finding Labels"] == "No Finding" and split_of[row["Image Index"]] == split for row in table)
        assert count == sum(healthy)
    for groups, column in ((result.sex, "Patient Gender"), (result.view, "View Position")):
        totals = {value: sum(images.values()) for value, images in groups.items()}
        assert totals == {value: sum(row[column] == value for row in table) for value in totals}
    for band, images in result.age.items():
        low, high = map(int, band.replace("81+", "81-120").split("-"))
        assert sum(images.values()) == sum(low <= int(row["Patient Age"]) <= high for row in table)
    assert sum(sum(images.values()) for images in result.age.values()) == len(table)


def test_pixel_and_mask_statistics_are_those_of_the_stored_images(nih_shards: str, siim_shards: str) -> None:
    pixels: list[npt.NDArray[np.uint8]] = []
    areas = []
    for root in (nih_shards, siim_shards):
        for line in manifest.load(root).table.to_pylist():
            pixels.append(load_image(audit_page.read_member(line, "image")).image_HW)
            if line["mask_offset"] is not None:
                areas.append(decode_mask(audit_page.read_member(line, "mask")).mean())
    result = audit.audit(nih_shards, siim_shards)
    stored = np.concatenate([image.ravel() for image in pixels]) / 255
    # The statistics are computed before JPEG compression.
    assert result.pixels.mean == pytest.approx(stored.mean(), abs=2e-4)
    assert result.pixels.std == pytest.approx(stored.std(), abs=2e-4)
    filled = [area for area in areas if area]
    masks = result.masks
    assert (masks.labeled, masks.with_pixels) == (len(areas), len(filled))
    assert masks.area_counts == tuple(np.histogram(filled, bins=masks.area_edges)[0].tolist())
    assert masks.area_quantiles["50%"] == pytest.approx(np.median(filled))
    assert (masks.present_but_empty, masks.absent_but_filled) == ((), ())


def test_an_audit_survives_its_file_even_without_masks(nih_shards: str, tmp_path: Path) -> None:
    result = audit.audit(nih_shards)
    assert np.isnan(list(result.masks.area_quantiles.values())).all()
    address = str(tmp_path / "audit.json")
    write_artifact(address, result)
    assert read_artifact(Audit, address, "run `cxrscale audit` again").model_dump_json() == result.model_dump_json()


def leaks_of(*roots: str) -> Leaks:
    return leakage.find_leaks(leakage.join_datasets(*roots))


def test_a_valid_pair_has_no_leak(nih_shards: str, siim_shards: str) -> None:
    for root in (nih_shards, siim_shards):
        leaks = leaks_of(root)
        assert leaks.verdict == ("No leak found: no patient and no image is in two splits.",)
        assert leaks.not_checked == ()
    leaks = leaks_of(nih_shards, siim_shards)
    assert leaks.not_checked == ()
    assert leaks.verdict[0] == "No leak found: no patient and no image is in two splits."
    assert leaks.patients_in_two_splits == ()
    assert leaks.duplicates.between_splits == ()
    nih, siim = manifest.load(nih_shards), manifest.load(siim_shards)
    both = set(nih.patient.tolist()) & set(siim.patient.tolist())
    shared = leaks.patients_in_two_datasets
    assert [entry.patient for entry in shared] == [f"nih:{patient}" for patient in sorted(both)]
    assert {entry.also for entry in shared} == {()}
    assert leaks.patients == len(set(nih.patient.tolist()))


def test_a_patient_in_two_splits_is_named(nih_shards: str, tmp_path: Path) -> None:
    patient, image_id = a_patient_with_two_images(nih_shards)
    leaky = rewritten(nih_shards, tmp_path / "leaky", lambda table: with_split(table, image_id, "test"))
    result = audit.audit(leaky)
    (entry,) = result.leaks.patients_in_two_splits
    assert entry.patient == f"nih:{patient}"
    assert entry.images["test"] == image_id
    assert entry.splits["test"] == 1
    start = f"LEAK: 1 patient in two splits, e.g. nih:{patient} in test ({image_id}) and "
    assert result.leaks.verdict[0].startswith(start)
    page = Path(audit_page.write(result, str(tmp_path / "leaky.html"))).read_text()
    assert f"LEAK: 1 patient in two splits, e.g. nih:{patient}" in page
    assert "Patients in two splits" in page


def test_unlabeled_images_leak_nothing(nih_shards: str, tmp_path: Path) -> None:
    _, image_id = a_patient_with_two_images(nih_shards)
    aside = rewritten(nih_shards, tmp_path / "aside", lambda table: with_split(table, image_id, build.UNLABELED))
    result = audit.audit(aside)
    assert result.leaks.patients_in_two_splits == ()
    assert result.splits[build.UNLABELED] == 1
    assert list(result.splits)[-1] == build.UNLABELED


def test_a_duplicate_in_another_dataset_is_named_with_its_patient(nih_shards: str, strangers: str) -> None:
    nih, siim = manifest.load(nih_shards), manifest.load(strangers)
    leaks = leaks_of(nih_shards, strangers)
    between = leaks.duplicates.between_datasets
    split = dict(zip([*nih.image_id, *siim.image_id], [*nih.split, *siim.split], strict=True))
    patient = dict(zip([*nih.image_id, *siim.image_id], [*nih.patient, *siim.patient], strict=True))
    assert leaks.duplicates.pairs == len(between) == len(siim)
    leaking = [pair for pair in between if build.UNLABELED not in pair.splits and pair.splits[0] != pair.splits[1]]
    assert leaking == list(leaks.duplicates.between_splits)
    assert len(leaking) > 3
    for pair in leaking:
        assert pair.splits == tuple(split[name] for name in pair.images)
        names = zip(("nih", "siim"), pair.images, strict=True)
        assert pair.patients == tuple(f"{namespace}:{patient[name]}" for namespace, name in names)
        assert pair.datasets == (nih_shards, strangers)
    named = {entry.patient for entry in leaks.patients_in_two_splits}
    assert named >= {pair.patients[0] for pair in leaking}
    assert leaking[0].images[1] in leaks.verdict[1]
    assert leaks.not_checked == ()
    reverse = leaks_of(strangers, nih_shards).duplicates.between_splits
    assert {frozenset(pair.images) for pair in reverse} == {frozenset(pair.images) for pair in leaking}


def test_what_could_not_be_checked_is_reported(strangers: str, nih_shards: str, tmp_path: Path) -> None:
    leaks = leaks_of(strangers)
    (unknown,) = leaks.not_checked
    count = len(manifest.load(strangers))
    assert leaks.images_of_unknown_patients == count
    assert f"the patients of {count} of {count} images of {strangers} are unknown" in unknown
    assert "--patients-from" in unknown
    assert "NIH" in unknown
    lost = [{"image_id": "x.png", "path": "x.png", "reason": "<b>cut</b> short"}]
    foreign = rewritten(nih_shards, tmp_path / "foreign", same, source="other", patients_from="other", quarantined=lost)
    ids = [f"other-{n}" for n in range(len(manifest.load(nih_shards)))]
    data = manifest.load(foreign)
    renamed = data.table.drop_columns("root").set_column(0, "image_id", pa.array(ids))
    rewrite_manifest(foreign, renamed, data.metadata[0])
    (Path(foreign) / manifest.FINGERPRINTS).unlink()
    result = audit.audit(nih_shards, foreign)
    not_checked = " ".join(result.leaks.not_checked)
    assert "have independent patient IDs (nih, other)" in not_checked
    assert f"{len(ids)} images of {foreign} have no fingerprint" in not_checked
    assert "1 quarantined image could not be read" in not_checked
    assert result.leaks.verdict[0].startswith("No leak found in what could be checked")
    page = Path(audit_page.write(result, str(tmp_path / "page"))).read_text()
    assert "&lt;b&gt;cut&lt;/b&gt; short" in page


def test_images_without_a_duplicate_in_the_other_dataset_have_no_known_patient(
    nih_shards: str, siim_shards: str, strangers: str, tmp_path: Path
) -> None:
    own = dict(zip(manifest.load(strangers).image_id, manifest.load(strangers).patient, strict=True))
    data = manifest.load(siim_shards)
    names = [
        own[name] if row < 2 else patient
        for row, (name, patient) in enumerate(zip(data.image_id, data.patient, strict=True))
    ]

    def orphaned(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index("patient"), "patient", pa.array(names))

    root = rewritten(siim_shards, tmp_path / "siim", orphaned)
    # Without NIH they are recognized by their hashes; with NIH, by patients that NIH does not have.
    (alone,) = leaks_of(root).not_checked
    assert f"the patients of 2 of {len(data)} images" in alone
    stranger = rewritten(nih_shards, tmp_path / "nih", same)
    (Path(stranger) / manifest.FINGERPRINTS).unlink()
    beside, *_ = leaks_of(stranger, root).not_checked
    assert f"the patients of 2 of {len(data)} images" in beside
    assert leaks_of(nih_shards, root).not_checked == (), "their copies in NIH have the patients"


def test_datasets_of_version_0_1_are_still_read(siim_shards: str, strangers: str, tmp_path: Path) -> None:
    # They have `patients` and `repeats` where the pack section has `patient_ids` and `duplicates` today.
    for number, root in enumerate((siim_shards, strangers)):
        pack = dict(manifest.load(root).metadata[0]["pack"])
        pack |= {"patients": pack.pop("patient_ids"), "repeats": pack.pop("duplicates").replace("merge", "unite")}
        old = rewritten(root, tmp_path / str(number), same, pack=pack, version="0.1.0")
        Path(old, contents.NAME).unlink()
        assert dict(audit.audit(old).datasets[0].pack) == pack
        assert leaks_of(old).model_dump_json() == leaks_of(root).model_dump_json().replace(root, old)
        assert verify(old) == []


def test_damaged_fingerprints_are_one_line(nih_shards: str, tmp_path: Path) -> None:
    root = rewritten(nih_shards, tmp_path / "nih", same)
    (Path(root) / manifest.FINGERPRINTS).write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"fingerprints\.parquet is damaged \(16 bytes"):
        audit.audit(root)


# The real images


@pytest.fixture(scope="module")
def real_shards(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Datasets of the 240 NIH images and of the SIIM images, each with its own patients."""
    out = tmp_path_factory.mktemp("real")
    settings = Pack(size=256)
    build.build_shards("nih", str(real / "nih"), settings, str(out / "nih"), local=True)
    masked = settings.model_copy(update={"masks": True})
    build.build_shards("siim", str(real / "siim"), masked, str(out / "siim"), local=True)
    return str(out / "nih"), str(out / "siim")


@pytest.fixture(scope="module")
def quoted(real: Path) -> dict[str, str]:
    """Our ID of a SIIM image -> ours of the NIH image that is the same."""
    with (real / "siim" / "same_image_in_nih.csv").open() as file:
        return {keyed("siim", row["siim_id"]): keyed("nih", row["nih_id"]) for row in csv.DictReader(file)}


def test_the_real_duplicates_are_those_quoted(real_shards: tuple[str, str], quoted: dict[str, str]) -> None:
    leaks = leaks_of(*real_shards)
    assert {pair.images[1]: pair.images[0] for pair in leaks.duplicates.between_datasets} == quoted
    assert leaks.duplicates.pairs == len(quoted) == 37
    (alone,) = [line for line in leaks.not_checked if "unknown" in line]
    assert "the patients of 2 of 39 images" in alone, "the two files of siim/original are not among the 240"


CHANGES: dict[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    "resized": lambda gray: resize_image(gray, 512),
    "re-encoded": lambda gray: load_image(encode_jpeg(gray, 75)).image_HW,
    "windowed": lambda gray: np.clip((gray.astype(np.float32) - 20) * 255 / 215, 0, 255).astype(np.uint8),
}


@pytest.fixture(scope="module")
def real_images(real: Path, quoted: dict[str, str]) -> list[npt.NDArray[np.uint8]]:
    """The 37 SIIM images in the order of `quoted`."""
    path = {keyed("siim", record.image_id): record.path for record in sources.read("siim", str(real / "siim")).records}
    return [load_image(Path(path[name]).read_bytes(), name=path[name]).image_HW for name in quoted]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_nothing_else(
    change: str, real_images: Sequence[npt.NDArray[np.uint8]], real_shards: tuple[str, str], quoted: dict[str, str]
) -> None:
    cv2.setNumThreads(1)
    prints = [duplicates.fingerprint(CHANGES[change](gray)) for gray in real_images]
    stored = pq.read_table(Path(real_shards[0]) / manifest.FINGERPRINTS).to_pylist()
    pairs = duplicates.find_between(
        np.stack([np.frombuffer(item.dhash, dtype=np.uint8) for item in prints]),
        np.stack([np.frombuffer(item.thumbnail, dtype=np.uint8) for item in prints]),
        np.stack([np.frombuffer(row["dhash"], dtype=np.uint8) for row in stored]),
        np.stack([np.frombuffer(row["thumbnail"], dtype=np.uint8) for row in stored]),
    )
    names = list(quoted)
    assert [(names[a], stored[b]["image_id"]) for a, b in pairs.tolist()] == list(quoted.items())

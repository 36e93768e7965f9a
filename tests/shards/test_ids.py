"""IDs in datasets: nobody without the key finds an image or a patient of the archive's list, and whoever has it can."""

import csv
import hashlib
import json
import logging
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale import sources
from cxrscale.config import PATIENT_KEY, STATE_HOME, Pack
from cxrscale.shards import audit, build, ids, manifest
from cxrscale.shards.ids import Key
from cxrscale.shards.verify import verify
from cxrscale.sources.nih import read_table
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import ImageRecord, UserError
from tests.conftest import keyed

SETTINGS = Pack(size=64, samples_per_shard=20)


@pytest.fixture
def without_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has given no key; the state folder."""
    monkeypatch.delenv(PATIENT_KEY)
    monkeypatch.setenv(STATE_HOME, str(tmp_path / "state"))
    return tmp_path / "state"


def key_of(text: str, folder: Path) -> Pack:
    """Settings with a key of its own."""
    (folder / f"{text}.key").write_text(text + "\n")
    return SETTINGS.model_copy(update={"key_file": str(folder / f"{text}.key")})


@settings(max_examples=40)
@given(st.binary(min_size=1, max_size=200).filter(lambda key: key.strip() != b""), st.text(), st.text())
def test_a_hash_is_keyed_blake2b_and_no_byte_of_the_key_is_lost(secret: bytes, source: str, name: str) -> None:
    key = ids._key(secret, "key")
    used = secret if len(secret) <= 64 else hashlib.blake2b(secret).digest()
    text = f"{source}:{name}".encode()
    assert key.hash(source, name) == hashlib.blake2b(text, key=used, digest_size=8).hexdigest()
    assert ids._key(secret + b"x", "key").hash(source, name) != key.hash(source, name)
    assert ids._key(secret + b"x", "key").fingerprint != key.fingerprint
    assert len({key.fingerprint, key.hash(source, name), used.hex()[:16]}) == 3


def test_the_key_is_in_no_text_about_it() -> None:
    assert "secret text" not in repr(Key(b"secret text"))


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_key_is_refused(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENT_KEY, empty)
    with pytest.raises(UserError, match=r"CXRSCALE_PATIENT_KEY is empty, which would hide nobody; give a long"):
        ids.read_key(Pack())
    (tmp_path / "key").write_text(empty)
    with pytest.raises(UserError, match=r"key is empty"):
        ids.read_key(Pack(key_file=str(tmp_path / "key")))


def test_without_a_key_a_random_one_is_made_once_kept_private_and_said(
    without_key: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cxrscale"):
        first, second = ids.read_key(Pack()), ids.read_key(Pack())
    path = without_key / "cxrscale" / "patient.key"
    assert first == second
    assert [record.getMessage() for record in caplog.records] == [
        f"made a random key for patient and image ids: {path}; keep it, datasets of different keys cannot be joined"
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["patient.key"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(path.read_text().strip()) == 64
    assert path.read_text().strip() not in caplog.text


def test_the_users_key_file_and_the_variable_with_its_content_are_one_key(
    without_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ids.read_key(Pack())
    path = ids.user_key_file()
    assert ids.read_key(Pack(key_file=str(path))) == made
    monkeypatch.setenv(PATIENT_KEY, path.read_text().strip())
    assert ids.read_key(Pack()) == made
    assert path.is_relative_to(without_key)


def test_those_that_begin_at_once_make_one_key(without_key: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len({key and key.secret for key in pool.map(ids.read_key, [Pack()] * 8)}) == 1
    assert [entry.name for entry in (without_key / "cxrscale").iterdir()] == ["patient.key"]


def test_a_key_file_that_others_can_read_is_refused(without_key: Path) -> None:
    ids.read_key(Pack())
    path = without_key / "cxrscale" / "patient.key"
    path.chmod(0o640)
    with pytest.raises(UserError, match=r"patient\.key can be read by other users; run `chmod 600"):
        ids.read_key(Pack())


def test_a_state_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, without_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_key.write_text("in the way")
    with pytest.raises(UserError, match=r"state/cxrscale/patient\.key: Not a directory; set CXRSCALE_PATIENT_KEY or"):
        ids.read_key(Pack())
    monkeypatch.setenv(STATE_HOME, "relative/is/ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ids.user_key_file() == tmp_path / "home" / ".local/state/cxrscale/patient.key"
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match=r"no home folder to keep a key in; set CXRSCALE_PATIENT_KEY or pack\.key_file"):
        ids.user_key_file()


def test_original_ids_need_no_key(drawn: SyntheticPaths, without_key: Path, tmp_path: Path) -> None:
    chosen = SETTINGS.model_copy(update={"patient_ids": "original", "limit": 8})
    build.build_shards("nih", str(drawn.nih), chosen, str(tmp_path / "out"), local=True)
    data = manifest.load(str(tmp_path / "out"))
    records = {record.image_id: record for record in sources.read("nih", str(drawn.nih)).records}
    assert set(data.image_id) < set(records)
    assert all(records[name].patient == patient for name, patient in zip(data.image_id, data.patient, strict=True))
    assert data.metadata[0]["key_fingerprint"] is None
    assert not without_key.exists()


# What cannot be compared is not joined


def test_datasets_of_different_keys_are_not_joined(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    other, siim = str(tmp_path / "nih"), str(tmp_path / "siim")
    build.build_shards("nih", str(drawn.nih), key_of("other", tmp_path), other, local=True)
    with pytest.raises(UserError, match=r"nih \(ids of the key [0-9a-f]{16}\) and .*cannot be used together, because"):
        manifest.load(nih_shards, other)
    with pytest.raises(UserError, match="cannot be used together"):
        audit.audit(nih_shards, other)
    with pytest.raises(UserError, match=r"--patients-from .* it has ids of the key .*, this command the key .*; give"):
        build.build_shards("siim", str(drawn.siim), SETTINGS, siim, patients_from_dataset=other, local=True)
    original = Pack(patient_ids="original")
    with pytest.raises(UserError, match=r"this command pack\.patient_ids=original"):
        build.build_shards("siim", str(drawn.siim), original, siim, patients_from_dataset=other, local=True)
    assert not Path(siim).exists()


def test_a_dataset_is_not_continued_with_another_key(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds shards of ids of another key, or the source's own; give another --out"):
        build.build_shards("nih", str(drawn.nih), key_of("other", tmp_path), nih_shards, local=True)


HASHED = {"pack": {"patient_ids": "hashed"}, "source": "nih"}
OURS, THEIRS = {**HASHED, "key_fingerprint": "a" * 16}, {**HASHED, "key_fingerprint": "b" * 16}
ORIGINAL = {"pack": {"patient_ids": "original"}, "source": "nih"}
OF_0_1 = {"pack": {"patients": "hashed"}, "source": "nih"}


@pytest.mark.parametrize(
    ("one", "other", "joined"),
    [
        (OURS, OURS, True),
        (OURS, THEIRS, False),
        (OURS, {**THEIRS, "source": "kermany"}, False),
        (OURS, ORIGINAL, False),
        (OURS, {**ORIGINAL, "source": "kermany"}, True),
        (OURS, HASHED, False),
        (OURS, OF_0_1, False),
        (HASHED, OF_0_1, True),
        (ORIGINAL, HASHED, False),
        (ORIGINAL, {**HASHED, "source": "siim"}, True),
        (ORIGINAL, {**HASHED, "source": "siim", "patients_from": "nih"}, False),
        (OURS, {"pack": {}}, True),
    ],
)
def test_what_is_joined(one: dict[str, Any], other: dict[str, Any], joined: bool) -> None:
    for pair in ((one, other), (other, one)):
        if joined:
            ids.refuse_other_keys(("a", "b"), pair)
        else:
            with pytest.raises(UserError, match=r"a \(.*\) and b \(.*\) cannot be used together"):
                ids.refuse_other_keys(("a", "b"), pair)


def test_an_older_dataset_still_loads_and_says_so_once(
    drawn: SyntheticPaths, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = SETTINGS.model_copy(update={"patient_ids": "original", "limit": 8})
    root = tmp_path / "old"
    build.build_shards("nih", str(drawn.nih), chosen, str(root), local=True)
    data = manifest.load(str(root))
    old = {name: value for name, value in data.metadata[0].items() if name not in ("key_fingerprint", "burned_in")}
    old["pack"] = {**old["pack"], "patient_ids": "hashed"}
    manifest.write(str(root / manifest.NAME), data.table.drop_columns("root"), old)
    (root / "dataset.json").unlink()
    with caplog.at_level(logging.WARNING, "cxrscale"):
        assert len(manifest.load(str(root))) == len(manifest.load(str(root))) == 8
    assert caplog.text.count(f"{root} is of an older version: its image ids are the source's own") == 1
    assert caplog.text.count(f"{root} is of an older version: it has no dataset.json") == 1
    assert verify(str(root)) == []
    assert audit.audit(str(root)).images == 8


# The private map


def test_the_map_leads_from_our_ids_to_the_sources_own(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    private, out = tmp_path / "private" / "map.csv", str(tmp_path / "siim")
    (tmp_path / "private").mkdir()
    private.write_text("of an earlier call, which everyone can read")
    private.chmod(0o644)
    before = os.umask(0)
    try:
        chosen = SETTINGS.model_copy(update={"masks": True})
        options = {"patients_from_dataset": nih_shards, "keep_map": str(private), "local": True}
        build.build_shards("siim", str(drawn.siim), chosen, out, **options)  # type: ignore[arg-type]
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    records = {record.image_id: record for record in sources.read("siim", str(drawn.siim)).records}
    with private.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["source_image_id"] for row in rows} == set(records)
    assert all(row["image_id"] == keyed("siim", row["source_image_id"]) for row in rows)
    assert {row["source_patient"] for row in rows} == {""}, "every image has its patient from NIH"
    data = manifest.load(out)
    assert dict(zip(data.image_id, data.patient, strict=True)) == {row["image_id"]: row["patient"] for row in rows}
    assert ids.read_map(str(private))[data.image_id[0]] in records


def test_a_map_inside_the_dataset_or_in_a_bucket_is_refused(drawn: SyntheticPaths, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "link").symlink_to(out)
    for inside in (out / "map.csv", out / "a" / "b.csv", tmp_path / "link" / "map.csv"):
        with pytest.raises(UserError, match=r"(map|b)\.csv is inside the dataset .*; keep it apart from it"):
            build.build_shards("nih", str(drawn.nih), SETTINGS, str(out), keep_map=str(inside), local=True)
    with pytest.raises(UserError, match="the map is private, so it stays on a local disk"):
        build.build_shards("nih", str(drawn.nih), SETTINGS, str(out), keep_map="s3://a/map.csv", local=True)
    assert not out.exists()


def test_names_that_are_not_utf_8_are_hashed_and_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9,\n.png")
    assert len(Key(b"key").hash("nih", name)) == 16
    ids.write_map(str(tmp_path / "map.csv"), str(tmp_path / "out"), [("a", name, "p", "")])
    assert ids.read_map(str(tmp_path / "map.csv")) == {"a": name}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n1,2\n",
        b"\xff\xfe",
        b'image_id,source_image_id\n"1',
        b"image_id,source_image_id,patient,source_patient\n1,2\n",
    ],
)
def test_a_file_that_is_no_map_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "map.csv").write_bytes(content)
    with pytest.raises(
        UserError, match=r"map\.csv is not a map of ids; give the file that `cxrscale shard --keep-map` wrote"
    ):
        ids.read_map(str(tmp_path / "map.csv"))


# Who has the archive's list, but not the key


def guesses(record: ImageRecord) -> Iterator[str]:
    """What can be made of an image of the archive's list: ids, and hashes with the keys that everyone knows."""
    for name in {record.image_id, record.patient, record.image_id.rpartition(".")[0], record.patient.lstrip("0")}:
        yield name
        yield str(manifest.image_key(name))
        for text in (name, f"{record.source}:{name}"):
            for key in (b"", b"cxrscale"):
                for size in (8, 32):
                    yield hashlib.blake2b(text.encode(), key=key, digest_size=size).hexdigest()
            yield from (hashlib.new(kind, text.encode()).hexdigest() for kind in ("md5", "sha256"))


def samples(root: Path) -> Iterator[dict[str, Any]]:
    """The JSON member of every sample."""
    for path in root.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    yield json.load(tar.extractfile(member))  # type: ignore[arg-type]


def said(root: Path) -> set[str]:
    """Every id and name in a dataset: columns, JSON members, member names, indices, metadata."""
    found: set[str] = set()
    for path in root.glob("*.parquet"):
        table = pq.read_table(path)
        found |= {
            str(value)
            for name in ("image_id", "patient", "key")
            if name in table.column_names
            for value in table[name].to_pylist()
        }
    for path in root.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {member.name.split(".")[0] for member in tar}
    found |= {sample[name] for sample in samples(root) for name in ("image_id", "patient")}
    for path in root.glob("*.idx"):
        found |= {word.split(".")[0] for word in path.read_text().split() if "." in word}
    return found


def reidentified(root: Path, records: list[ImageRecord]) -> int:
    """How many images of the archive's list can be recognized in a dataset by their ids."""
    known = said(root)
    return sum(any(guess in known for guess in guesses(record)) for record in records)


@pytest.mark.parametrize("source", ["nih", "siim"])
def test_nobody_without_the_key_is_identified(
    source: str, drawn: SyntheticPaths, nih_shards: str, siim_shards: str, tmp_path: Path
) -> None:
    records = sources.read(source, str(getattr(drawn, source))).records
    assert reidentified(Path({"nih": nih_shards, "siim": siim_shards}[source]), records) == 0
    own_ids = SETTINGS.model_copy(update={"patient_ids": "original"})
    build.build_shards(source, str(getattr(drawn, source)), own_ids, str(tmp_path / "original"), local=True)
    assert reidentified(tmp_path / "original", records) == len(records), "the attack works where ids are not hashed"


def test_kermany_names_are_hashed(tmp_path: Path) -> None:
    import cv2
    import numpy as np

    folder = tmp_path / "kermany" / "train" / "PNEUMONIA"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(3):
        cv2.imwrite(str(folder / f"person{number}_virus_6.jpeg"), rng.integers(0, 255, (64, 64), dtype=np.uint8))
    build.build_shards("kermany", str(tmp_path / "kermany"), SETTINGS, str(tmp_path / "out"), local=True)
    assert reidentified(tmp_path / "out", sources.read("kermany", str(tmp_path / "kermany")).records) == 0
    assert b"person" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


# The real images


@pytest.fixture(scope="module")
def real_nih(real: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of all NIH images that are here."""
    root = tmp_path_factory.mktemp("real")
    archive = root / "archive"
    for folder in ("nih", "nih_more"):
        shutil.copytree(real / folder / "images", archive / "images", dirs_exist_ok=True)
    for table in [*(real / "nih").glob("*.csv"), *(real / "nih").glob("*.txt")]:
        shutil.copy(table, archive)
    build.build_shards("nih", str(archive), Pack(size=128), str(root / "nih"), local=True)
    return str(root / "nih")


@pytest.mark.slow
def test_none_of_the_real_images_is_identified(real: Path, real_nih: str) -> None:
    """The attacker has the whole label table: 112,120 images of 30,805 patients."""
    table = read_table(str(real / "nih" / "Data_Entry_2017_v2020.csv"))
    records = [
        ImageRecord(image_id=name, source="nih", path="", patient=entry.patient) for name, entry in table.items()
    ]
    assert len(records) == 112_120
    assert len(manifest.load(real_nih)) >= 240
    known = said(Path(real_nih))
    assert [guess for record in records for guess in guesses(record) if guess in known] == []


@pytest.mark.slow
@pytest.mark.parametrize(("source", "folder"), [("siim", "siim"), ("siim", "siim_more"), ("rsna", "rsna")])
def test_real_twins_have_the_patient_the_split_and_the_boxes_of_their_image(
    source: str, folder: str, real: Path, real_nih: str, tmp_path: Path
) -> None:
    with (real / folder / "same_image_in_nih.csv").open() as file:
        twins = {keyed(source, row[f"{source}_id"]): row["nih_id"] for row in csv.DictReader(file)}
    assert len(twins) == {"siim": 37, "siim_more": 14, "rsna": 183}[folder]
    archive = Path(shutil.copytree(real / folder, tmp_path / "archive"))
    shutil.rmtree(archive / "original", ignore_errors=True)
    if source == "siim":
        shutil.copy(real / "siim" / "train-rle.csv", archive)
    chosen = Pack(size=128, masks=source == "siim")
    out = str(tmp_path / "out")
    build.build_shards(source, str(archive), chosen, out, patients_from_dataset=real_nih, local=True)
    nih, ours = manifest.load(real_nih), manifest.load(out)
    row_of = {name: row for row, name in enumerate(nih.image_id.tolist())}
    assert set(ours.image_id) == set(twins)
    present = 0
    for name, patient, split in zip(ours.image_id, ours.patient, ours.split, strict=True):
        row = row_of.get(keyed("nih", twins[name]))
        present += row is not None
        expected = ("train", name) if row is None else (nih.split[row], nih.patient[row])
        assert (split, patient) == expected, twins[name]
    assert present == {"siim": 37, "siim_more": 14, "rsna": 100}[folder], "of these the NIH image is here"
    assert audit.audit(real_nih, out).leaks.patients_in_two_splits == ()
    boxes = {keyed(source, record.image_id): len(record.boxes) for record in sources.read(source, str(archive)).records}
    assert {sample["image_id"]: len(sample["boxes"]) for sample in samples(Path(out))} == boxes
    assert sum(count > 0 for count in boxes.values()) == (61 if source == "rsna" else 0)

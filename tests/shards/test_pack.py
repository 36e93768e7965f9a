"""Packing: the same bytes however it is run, no image lost, no partial file."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.shards import build, layout, manifest, pack
from cxrscale.shards.verify import verify
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import ImageRecord, UnreadableImageError, UserError
from tests.conftest import keyed

SETTINGS = Pack(size=64, samples_per_shard=20)


def contents(root: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(root).iterdir()) if path.is_file()}


def test_a_second_run_does_nothing(drawn: SyntheticPaths, nih_shards: str) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in Path(nih_shards).iterdir()}
    again = build.build_shards("nih", str(drawn.nih), SETTINGS, nih_shards, local=True)
    assert not again.fresh
    assert {path.name: path.stat().st_mtime_ns for path in Path(nih_shards).iterdir()} == before


def test_the_input_digest_is_that_of_version_0_1() -> None:
    """Else `cxrscale shard` would refuse to touch an older dataset instead of reporting that it is complete."""
    records = [ImageRecord(image_id="a.png", source="nih", path="", patient="p", findings={"Mass": 1})]
    plans = layout.plan_shards(records, ["train"], Pack())
    expected = {
        "keep": "d12a2583e2c77796314191b830e8898446a2f666bd60c4e866676cbb27d800b2",
        "merge": "97ecbe8fe48556cc75606b5d721d19f9bd1d1ee5be25011e168f408d5da49a16",
    }
    for choice, digest in expected.items():
        assert layout.input_digest(plans, Pack.model_validate({"duplicates": choice})) == digest


@pytest.mark.smoke
@pytest.mark.usefixtures("ray_cluster")
def test_ray_tasks_write_the_same_bytes(drawn: SyntheticPaths, nih_shards: str, tmp_path: Path) -> None:
    build.build_shards("nih", str(drawn.nih), SETTINGS, str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(nih_shards)


def test_other_settings_do_not_overwrite(drawn: SyntheticPaths, nih_shards: str) -> None:
    with pytest.raises(UserError, match="holds shards of another source, other settings or another version"):
        build.build_shards("nih", str(drawn.nih), Pack(size=48, samples_per_shard=20), nih_shards, local=True)


def test_an_interrupted_run_is_resumed_and_gives_the_same_bytes(
    drawn: SyntheticPaths, nih_shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    script = (
        "import sys; from cxrscale.config import Pack; from cxrscale.shards import build, pack\n"
        "settings = Pack(size=64, samples_per_shard=20)\n"
        "pack.pack(build.prepare('nih', sys.argv[1], settings, local=True), settings, sys.argv[2], local=True,"
        " progress=lambda *_: _[0] and (print('shard', flush=True), __import__('time').sleep(60)))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(drawn.nih), str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"shard\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (out / manifest.NAME).exists()
    (out / ".tmp-killed-train-00001.tar").write_bytes(b"half a tar")
    finished = time.time_ns()
    build.build_shards("nih", str(drawn.nih), SETTINGS, str(out), local=True)
    assert contents(out) == contents(nih_shards)
    kept = [path for path in out.glob("*.tar") if path.stat().st_mtime_ns < finished]
    assert len(kept) == 1, "the shard that was finished before the kill is kept"


def test_a_corrupt_image_is_quarantined_and_the_others_are_packed(drawn: SyntheticPaths, tmp_path: Path) -> None:
    shutil.copytree(drawn.nih, tmp_path / "nih")
    images = sorted((tmp_path / "nih").rglob("*.png"))
    damaged = bytearray(images[3].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    images[3].write_bytes(damaged)
    images[5].write_bytes(b"")
    packed = build.build_shards("nih", str(tmp_path / "nih"), SETTINGS, str(tmp_path / "out"), local=True)
    listed = [json.loads(line) for line in (tmp_path / "out" / pack.QUARANTINE).read_text().splitlines()]
    assert (packed.images, packed.quarantined) == (78, 2)
    assert {line["image_id"] for line in listed} == {keyed("nih", images[n].name) for n in (3, 5)}
    assert {name for line in listed for name in line} == {"image_id", "reason"}, "a path names the patient"
    assert all(line["reason"] for line in listed)
    assert not any(images[n].stem in line["reason"] for n in (3, 5) for line in listed)
    assert verify(str(tmp_path / "out")) == []


def test_the_manifest_points_at_every_member(nih_shards: str, siim_shards: str) -> None:
    for root in (nih_shards, siim_shards):
        data = manifest.load(root)
        for row in range(len(data)):
            line = {name: data.table[name][row].as_py() for name in data.table.column_names}
            content = (Path(root) / line["shard"]).read_bytes()
            start = line["json_offset"]
            sample = json.loads(content[start : start + line["json_length"]])
            assert sample["image_id"] == line["image_id"]
            assert sample["patient"] == line["patient"]
            assert sample["labels"] == {
                name: line[manifest.LABEL + name] for name in data.findings() if line[manifest.LABEL + name] is not None
            }
            start = line["image_offset"]
            image = cv2.imdecode(np.frombuffer(content[start : start + line["image_length"]], np.uint8), 0)
            assert image is not None
            assert image.shape == (64, 64)


def test_positives_have_masks_and_negatives_have_empty_ones(siim_shards: str) -> None:
    data = manifest.load(siim_shards)
    positive = data.labels(("Pneumothorax",))[:, 0] == 1
    pixels = data.column("mask_pixels")
    assert positive.sum() > 3
    assert (pixels[positive] > 0).all()
    assert (pixels[data.labels(("Pneumothorax",))[:, 0] == 0] == 0).all()
    assert np.isnan(pixels[data.split == build.UNLABELED].astype(float)).all()


def test_webdataset_can_read_the_shards(siim_shards: str) -> None:
    data = manifest.load(siim_shards)
    samples: list[dict[str, Any]] = []
    for path in sorted(Path(siim_shards).glob("*.tar")):
        with path.open("rb") as stream:  # WebDataset(path) would leave its file open
            members = webdataset.tariterators.tar_file_expander([{"url": path.name, "stream": stream}])
            samples += webdataset.tariterators.group_by_keys(members)
    assert len(samples) == len(data)
    assert {json.loads(sample["json"])["image_id"] for sample in samples} == set(data.image_id.tolist())
    assert all("." not in sample["__key__"] for sample in samples)


def test_the_source_codec_keeps_the_original_bytes(drawn: SyntheticPaths, tmp_path: Path) -> None:
    records = {keyed("nih", record.image_id): record for record in sources.read("nih", str(drawn.nih)).records}
    build.build_shards("nih", str(drawn.nih), Pack(codec="source", limit=5), str(tmp_path / "out"), local=True)
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member) for member in tar}
            for name, file in members.items():
                if name.endswith(".json"):
                    assert file is not None
                    image_id = json.load(io.TextIOWrapper(file))["image_id"]
                    stored = members[name.replace(".json", ".png")]
                    assert stored is not None
                    assert stored.read() == Path(records[image_id].path).read_bytes()


def test_the_plan_does_not_depend_on_the_order_of_the_records() -> None:
    records = [
        ImageRecord(image_id=f"{patient}_{k}.png", source="nih", path="", patient=patient)
        for patient in "abcdefgh"
        for k in range(3)
    ]
    split = ["train" if record.patient < "f" else "test" for record in records]
    settings = Pack(samples_per_shard=4)
    forward = layout.plan_shards(records, split, settings)
    backward = layout.plan_shards(records[::-1], split[::-1], settings)
    assert forward == backward
    assert [plan.name for plan in forward] == [f"test-{n:05d}.tar" for n in range(3)] + [
        f"train-{n:05d}.tar" for n in range(4)
    ]
    packed = [record for plan in forward for _, record in plan.records]
    assert sorted(record.image_id for record in packed) == sorted(record.image_id for record in records)


def test_an_id_that_occurs_twice_is_refused() -> None:
    twice = [ImageRecord(image_id="a.png", source="nih", path=path, patient="p") for path in ("x", "y")]
    with pytest.raises(UserError, match=r"a\.png is in the source twice"):
        layout.plan_shards(twice, ["train", "train"], Pack())


def test_ids_that_differ_only_in_dots_get_different_keys() -> None:
    keys = layout._member_keys(["1.2.3", "1_2.3", "1_2_3"])
    assert len(set(keys.values())) == 3
    assert not any("." in key for key in keys.values())


def test_an_unwritable_target_is_one_line(drawn: SyntheticPaths, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="a part of this path is a file"):
        build.build_shards("nih", str(drawn.nih), SETTINGS, str(tmp_path / "file" / "out"), local=True)


def test_a_full_disk_is_one_line_and_the_same_command_resumes(
    drawn: SyntheticPaths, nih_shards: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    limited = (
        "import resource, signal, sys; from cxrscale.config import Pack; from cxrscale.shards import build\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "build.build_shards('nih', sys.argv[1], Pack(size=64, samples_per_shard=20), sys.argv[2], local=True)"
    )
    failed = subprocess.run(
        [sys.executable, "-c", limited, str(drawn.nih), str(out)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert failed.returncode != 0
    assert "no space left" in failed.stderr
    assert list(out.glob("*.tar")) == []
    assert list(out.glob(".tmp-*")) == []
    build.build_shards("nih", str(drawn.nih), SETTINGS, str(out), local=True)
    assert contents(out) == contents(nih_shards)


@pytest.mark.parametrize("path", ["/data/Jane/Doe.png", "s3://data/Jane/Doe.png"])
@pytest.mark.parametrize("named", ["{path} is a folder", "Doe.png: the header says 'Jane Doe'", "b'{path}' is odd"])
def test_a_stored_reason_does_not_name_the_file(path: str, named: str) -> None:
    record = ImageRecord(image_id="0123456789abcdef", source="nih", path=path, patient="p")
    reason = pack._stored_reason(UnreadableImageError(named.format(path=path)), record)
    assert not any(name in reason for name in ("Jane", "Doe", "data"))
    assert reason

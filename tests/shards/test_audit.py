"""The audit counts what the tables say, names every leak that was planted, and says what it cannot know."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.io.images import decode_mask, encode_jpeg, load_image, resize_image
from cxrscale.reporting import audit_page
from cxrscale.shards import audit, build, duplicates, leakage, manifest
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError

SETTINGS = Pack(size=64, samples_per_shard=20)


@pytest.fixture(scope="module")
def strangers(drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The synthetic archive's SIIM side under patients and splits of its own, as one would shard it without NIH."""
    out = str(tmp_path_factory.mktemp("strangers") / "siim")
    build.build("siim", str(drawn.siim), SETTINGS.model_copy(update={"masks": True}), out, local=True)
    return out


def rewritten(root: str, out: Path, change: Callable[[pa.Table], pa.Table], **about: Any) -> str:
    """A copy of a dataset with another manifest."""
    shutil.copytree(root, out)
    data = manifest.load(root)
    manifest.write(str(out / manifest.NAME), change(data.table.drop_columns("root")), {**data.about[0], **about})
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
    who = str(names[counts > 1][0])
    return who, str(data.image_id[rows][data.patient[rows] == who][0])


def test_counts_are_the_tables(drawn: SyntheticPaths, nih_shards: str) -> None:
    with next(drawn.nih.glob("Data_Entry*.csv")).open() as file:
        table = list(csv.DictReader(file))
    found, data = audit.audit(nih_shards), manifest.load(nih_shards)
    home = dict(zip(data.image_id.tolist(), data.split.tolist(), strict=True))
    assert found["images"] == len(table)
    assert found["patients"] == len({row["Patient ID"] for row in table})
    assert found["splits"] == data.split_counts()
    assert list(found["splits"]) == ["train", "val", "test"]
    for finding, states in found["findings"].items():
        for split, state in states.items():
            rows = [row for row in table if home[row["Image Index"]] == split]
            present = sum(finding in row["Finding Labels"].split("|") for row in rows)
            assert state == {"present": present, "absent": len(rows) - present, "unlabelled": 0}
    for split, count in found["no_finding"].items():
        healthy = (row["Finding Labels"] == "No Finding" and home[row["Image Index"]] == split for row in table)
        assert count == sum(healthy)
    for key, column in (("sex", "Patient Gender"), ("view", "View Position")):
        told = {value: sum(counts.values()) for value, counts in found[key].items()}
        assert told == {value: sum(row[column] == value for row in table) for value in told}
    for band, counts in found["age"].items():
        low, high = map(int, band.split("-"))
        assert sum(counts.values()) == sum(low <= int(row["Patient Age"]) <= high for row in table)
    assert sum(sum(counts.values()) for counts in found["age"].values()) == len(table)


def test_pixels_and_masks_are_those_stored(nih_shards: str, siim_shards: str) -> None:
    pixels: list[npt.NDArray[np.uint8]] = []
    areas = []
    for root in (nih_shards, siim_shards):
        for line in manifest.load(root).table.to_pylist():
            pixels.append(load_image(audit_page._member(line, "image")).image_HW)
            if line["mask_offset"] is not None:
                areas.append(decode_mask(audit_page._member(line, "mask")).mean())
    found = audit.audit(nih_shards, siim_shards)
    everything = np.concatenate([image.ravel() for image in pixels]) / 255
    # They were streamed before JPEG rounded them.
    assert found["pixels"]["mean"] == pytest.approx(everything.mean(), abs=2e-4)
    assert found["pixels"]["std"] == pytest.approx(everything.std(), abs=2e-4)
    filled = [area for area in areas if area]
    masks = found["masks"]
    assert (masks["labeled"], masks["with_pixels"]) == (len(areas), len(filled))
    assert masks["area_counts"] == np.histogram(filled, bins=masks["area_edges"])[0].tolist()
    assert masks["area_quantiles"]["50%"] == pytest.approx(np.median(filled))
    assert (masks["present_but_empty"], masks["absent_but_filled"]) == ([], [])


def test_a_sound_pair_has_no_leak(nih_shards: str, siim_shards: str) -> None:
    for root in (nih_shards, siim_shards):
        found = audit.audit(root)
        assert found["verdict"] == ["No leak found: no patient and no image stands in two splits."]
        assert found["not_checked"] == []
    found = audit.audit(nih_shards, siim_shards)
    assert found["not_checked"] == []
    assert found["verdict"][0] == "No leak found: no patient and no image stands in two splits."
    assert found["patients_in_two_splits"] == found["duplicates"]["between_splits"] == []
    nih, siim = manifest.load(nih_shards), manifest.load(siim_shards)
    both = set(nih.patient.tolist()) & set(siim.patient.tolist())
    assert [entry["patient"] for entry in found["patients_in_two_sets"]] == [f"nih:{who}" for who in sorted(both)]
    assert {tuple(entry["also"]) for entry in found["patients_in_two_sets"]} == {()}
    assert found["patients"] == len(set(nih.patient.tolist()))


def test_a_patient_in_two_splits_is_named(nih_shards: str, tmp_path: Path) -> None:
    who, image_id = a_patient_with_two_images(nih_shards)
    leaky = rewritten(nih_shards, tmp_path / "leaky", lambda table: with_split(table, image_id, "test"))
    found = audit.audit(leaky)
    (entry,) = found["patients_in_two_splits"]
    assert entry["patient"] == f"nih:{who}"
    assert entry["images"]["test"] == image_id
    assert entry["splits"]["test"] == 1
    assert found["verdict"][0].startswith(f"LEAK: 1 patient in two splits, e.g. nih:{who} in test ({image_id}) and ")
    page = Path(audit_page.write(found, [leaky], str(tmp_path / "leaky.html"))).read_text()
    assert f"LEAK: 1 patient in two splits, e.g. nih:{who}" in page
    assert "Patients in two splits" in page


def test_images_that_nobody_trains_on_leak_nothing(nih_shards: str, tmp_path: Path) -> None:
    _, image_id = a_patient_with_two_images(nih_shards)
    aside = rewritten(nih_shards, tmp_path / "aside", lambda table: with_split(table, image_id, build.UNLABELED))
    found = audit.audit(aside)
    assert found["patients_in_two_splits"] == []
    assert found["splits"][build.UNLABELED] == 1
    assert list(found["splits"])[-1] == build.UNLABELED


def test_a_duplicate_across_sets_is_named_with_its_patient(nih_shards: str, strangers: str) -> None:
    nih, siim = manifest.load(nih_shards), manifest.load(strangers)
    found = audit.audit(nih_shards, strangers)
    split = dict(zip([*nih.image_id, *siim.image_id], [*nih.split, *siim.split], strict=True))
    patient = dict(zip([*nih.image_id, *siim.image_id], [*nih.patient, *siim.patient], strict=True))
    assert found["duplicates"]["pairs"] == len(found["duplicates"]["between_sets"]) == len(siim)
    leaks = [pair for pair in found["duplicates"]["between_sets"] if build.UNLABELED not in pair["splits"]]
    leaks = [pair for pair in leaks if pair["splits"][0] != pair["splits"][1]]
    assert leaks == found["duplicates"]["between_splits"]
    assert len(leaks) > 3
    for pair in leaks:
        assert pair["splits"] == [split[name] for name in pair["images"]]
        assert pair["patients"] == [
            f"{s}:{patient[name]}" for s, name in zip(("nih", "siim"), pair["images"], strict=True)
        ]
        assert pair["shards"] == [nih_shards, strangers]
    named = {entry["patient"] for entry in found["patients_in_two_splits"]}
    assert named >= {pair["patients"][0] for pair in leaks}
    assert leaks[0]["images"][1] in found["verdict"][1]
    assert found["not_checked"] == []
    turned = audit.audit(strangers, nih_shards)
    assert {frozenset(pair["images"]) for pair in turned["duplicates"]["between_splits"]} == {
        frozenset(pair["images"]) for pair in leaks
    }


def test_it_says_what_it_could_not_check(strangers: str, nih_shards: str, tmp_path: Path) -> None:
    found = audit.audit(strangers)
    (unknown,) = found["not_checked"]
    count = len(manifest.load(strangers))
    assert found["pictures_of_unknown_patients"] == count
    assert f"the patients of {count} of {count} images of {strangers} are unknown" in unknown
    assert "--patients-from" in unknown
    assert "NIH" in unknown
    lost = [{"image_id": "x.png", "path": "x.png", "reason": "<b>cut</b> short"}]
    foreign = rewritten(nih_shards, tmp_path / "foreign", same, source="other", patients_from="other", quarantined=lost)
    ids = [f"other-{n}" for n in range(len(manifest.load(nih_shards)))]
    table = pq.read_table(Path(foreign) / manifest.NAME)
    renamed = table.set_column(0, "image_id", pa.array(ids))
    pq.write_table(renamed, Path(foreign) / manifest.NAME)
    (Path(foreign) / manifest.FINGERPRINTS).unlink()
    found = audit.audit(nih_shards, foreign)
    said = " ".join(found["not_checked"])
    assert "name their patients independently (nih, other)" in said
    assert f"{len(ids)} images of {foreign} have no fingerprint" in said
    assert "1 quarantined image could not be read" in said
    assert found["verdict"][0].startswith("No leak found in what could be checked")
    page = Path(audit_page.write(found, [nih_shards, foreign], str(tmp_path / "page"))).read_text()
    assert "&lt;b&gt;cut&lt;/b&gt; short" in page


def test_adopted_images_without_a_duplicate_have_no_patient(
    nih_shards: str, siim_shards: str, strangers: str, tmp_path: Path
) -> None:
    own = dict(zip(manifest.load(strangers).image_id, manifest.load(strangers).patient, strict=True))
    data = manifest.load(siim_shards)
    names = [
        own[name] if row < 2 else who for row, (name, who) in enumerate(zip(data.image_id, data.patient, strict=True))
    ]

    def orphaned(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index("patient"), "patient", pa.array(names))

    root = rewritten(siim_shards, tmp_path / "siim", orphaned)
    # Far from NIH, they are recognized by their names; beside it, by names that NIH has not.
    (alone,) = audit.audit(root)["not_checked"]
    assert f"the patients of 2 of {len(data)} images" in alone
    stranger = rewritten(nih_shards, tmp_path / "nih", same)
    (Path(stranger) / manifest.FINGERPRINTS).unlink()
    beside, *_ = audit.audit(stranger, root)["not_checked"]
    assert f"the patients of 2 of {len(data)} images" in beside
    assert audit.audit(nih_shards, root)["not_checked"] == [], "their copies in NIH tell whose they are"


def test_damaged_fingerprints_are_one_line(nih_shards: str, tmp_path: Path) -> None:
    root = rewritten(nih_shards, tmp_path / "nih", same)
    (Path(root) / manifest.FINGERPRINTS).write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"fingerprints\.parquet cannot be read"):
        audit.audit(root)


class Page(HTMLParser):
    """What a page is made of, checked for tags that close one another."""

    EMPTY = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.open += [tag] if tag not in self.EMPTY else []
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open[:-1] if tag not in self.EMPTY else self.open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(nih_shards: str, siim_shards: str, tmp_path: Path) -> None:
    roots = [nih_shards, siim_shards]
    found = audit.audit(*roots)
    written = audit_page.write(found, roots, str(tmp_path / "audit.html"))
    text = Path(written).read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.count["svg"] > 3
    assert page.count["img"] == audit_page.EXAMPLES
    assert "script" not in page.count
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert "http" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(name in text for name in ("Cardiomegaly", "augment.mean=", "pack.size=64", found["manifest"]))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((tmp_path / "audit.json").read_text(), parse_constant=refuse) == found
    assert audit_page.render(found, roots) == text


def test_examples_show_findings_and_masks(siim_shards: str, nih_shards: str) -> None:
    sets = leakage.join_datasets(nih_shards)
    data = sets.data
    shown = audit_page.examples(sets)
    assert {"Cardiomegaly", "Effusion", "Mass"} <= {name for e in shown for name in e.title.split(", ")}
    assert len({example.image_id for example in shown}) == audit_page.EXAMPLES
    assert all(example.caption.startswith("train") for example in shown[:8])
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = manifest.Manifest(data.table.take(order), data.digest, data.about)
    assert [e.image_id for e in audit_page.examples(replace(sets, data=shuffled))] == [e.image_id for e in shown]
    masked = audit_page.examples(leakage.join_datasets(siim_shards))
    assert [bool(example.outline) for example in masked].count(True) >= 4
    assert all(("mask" in example.caption) == bool(example.outline) for example in masked)


def test_an_outline_is_on_its_masks_border() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 10:20] = True
    numbers = [float(number) for number in re.findall(r"[\d.]+", audit_page._outline(mask))]
    assert set(numbers[::2]) == {10.5, 19.5}
    assert set(numbers[1::2]) == {5.5, 8.5}


def test_a_lost_tar_leaves_a_page_that_says_so(nih_shards: str, tmp_path: Path) -> None:
    root = rewritten(nih_shards, tmp_path / "nih", same)
    for tar in Path(root).glob("*.tar"):
        tar.unlink()
    page = Path(audit_page.write(audit.audit(root), [root], str(tmp_path / "audit.json"))).read_text()
    assert page.count("cannot be read: run `cxrscale verify`") == audit_page.EXAMPLES


def test_sets_in_a_bucket_are_audited_there(s3: str, siim_shards: str) -> None:
    files = fsspec.filesystem("s3")
    files.put(siim_shards, f"{s3}/audited/", recursive=True)
    root = f"{s3}/audited/{Path(siim_shards).name}"
    page = audit_page.write(audit.audit(root), [root], f"{s3}/audit.html")
    assert page == f"{s3}/audit.html"
    text = files.cat_file(page).decode()
    assert text.count("data:image/jpeg") == audit_page.EXAMPLES
    assert "cannot be read" not in text
    assert json.loads(files.cat_file(f"{s3}/audit.json"))["shards"] == [root]


# The real images


@pytest.fixture(scope="module")
def real_shards(real: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The 240 NIH and the SIIM images as shards, each under its own patients."""
    out = tmp_path_factory.mktemp("real")
    settings = Pack(size=256)
    build.build("nih", str(real / "nih"), settings, str(out / "nih"), local=True)
    build.build("siim", str(real / "siim"), settings.model_copy(update={"masks": True}), str(out / "siim"), local=True)
    return str(out / "nih"), str(out / "siim")


@pytest.fixture(scope="module")
def quoted(real: Path) -> dict[str, str]:
    """SIIM id -> NIH id of the images that are the same."""
    with (real / "siim" / "same_image_in_nih.csv").open() as file:
        return {row["siim_id"]: row["nih_id"] for row in csv.DictReader(file)}


def test_the_real_duplicates_are_those_quoted(real_shards: tuple[str, str], quoted: dict[str, str]) -> None:
    found = audit.audit(*real_shards)
    pairs = {pair["images"][1]: pair["images"][0] for pair in found["duplicates"]["between_sets"]}
    assert pairs == quoted
    assert found["duplicates"]["pairs"] == len(quoted) == 37
    (alone,) = [line for line in found["not_checked"] if "unknown" in line]
    assert "the patients of 2 of 39 images" in alone, "the two files of siim/original are not among the 240"


CHANGES: dict[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]] = {
    "resized": lambda gray: resize_image(gray, 512),
    "re-encoded": lambda gray: load_image(encode_jpeg(gray, 75)).image_HW,
    "windowed": lambda gray: np.clip((gray.astype(np.float32) - 20) * 255 / 215, 0, 255).astype(np.uint8),
}


@pytest.fixture(scope="module")
def real_images(real: Path, quoted: dict[str, str]) -> list[npt.NDArray[np.uint8]]:
    """The 37 SIIM images in the order of `quoted`."""
    path = {record.image_id: record.path for record in sources.read("siim", str(real / "siim"))}
    return [load_image(Path(path[name]).read_bytes(), name=path[name]).image_HW for name in quoted]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_nothing_else(
    change: str, real_images: Sequence[npt.NDArray[np.uint8]], real_shards: tuple[str, str], quoted: dict[str, str]
) -> None:
    cv2.setNumThreads(1)
    marks = [duplicates.fingerprint(CHANGES[change](gray)) for gray in real_images]
    stored = pq.read_table(Path(real_shards[0]) / manifest.FINGERPRINTS).to_pylist()
    pairs = duplicates.find_between(
        np.stack([np.frombuffer(mark.dhash, dtype=np.uint8) for mark in marks]),
        np.stack([np.frombuffer(mark.thumbnail, dtype=np.uint8) for mark in marks]),
        np.stack([np.frombuffer(row["dhash"], dtype=np.uint8) for row in stored]),
        np.stack([np.frombuffer(row["thumbnail"], dtype=np.uint8) for row in stored]),
    )
    names = list(quoted)
    assert [(names[a], stored[b]["image_id"]) for a, b in pairs.tolist()] == list(quoted.items())

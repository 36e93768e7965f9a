"""What splits and datasets share: patients, images, and what cannot be told of either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cxrscale.config import Pack
from cxrscale.io import storage
from cxrscale.shards import build, duplicates, manifest
from cxrscale.shards.build import UNLABELED
from cxrscale.shards.manifest import Manifest
from cxrscale.types import ImageRecord, UserError

UNRELIABLE_PATIENT_IDS = ("siim", "rsna")
"""Sources that give each file a patient of its own, although the images are NIH's, whose patients have several."""


@dataclass(frozen=True, slots=True)
class JoinedDatasets:
    """Datasets joined, and which row is whose."""

    data: Manifest
    roots: tuple[str, ...]
    member_N: npt.NDArray[np.int64]
    """(N,) which of the roots each row is from."""
    spaces: tuple[str, ...]
    """For each root, the archive that named its patients: a name is the same person's only within one."""


def join_datasets(*roots: str) -> JoinedDatasets:
    """The datasets of some folders or addresses.

    Raises:
        UserError: a folder holds no dataset, or two of them hold an image of the same id.
    """
    data = manifest.load(*roots)
    place = {root: s for s, root in enumerate(roots)}
    member_N = np.array([place[root] for root in data.column("root").tolist()], dtype=np.int64)
    return JoinedDatasets(data, roots, member_N, tuple(str(a.get("patients_from", a["source"])) for a in data.about))


def find_leaks(sets: JoinedDatasets) -> dict[str, Any]:
    """What the audit says of leaks.

    A patient is known by its name and the archive that gave it, and two patients whose images are the same image
    are one. Images of the split `unlabeled` are trained on by nobody: they leak nothing.

    Returns:
        verdict and not_checked, in sentences; patients, the number of persons (an image whose patient is unknown is
        one); patients_in_two_splits and patients_in_two_sets; duplicates, the pairs of images that are the same.

    Raises:
        UserError: fingerprints cannot be read.
    """
    named = _namespaced_patients(sets)
    pairs, unmarked = _duplicate_pairs(sets)
    person = duplicates.merge_patients(named, pairs.tolist())
    nameless_N = _unreliable_patients(sets)
    told = {who for who, own in zip(person, nameless_N.tolist(), strict=True) if not own}
    unknown_N = nameless_N & np.array([who not in told for who in person])
    crossing, joint = _shared(sets, named, nameless_N, person)
    alike = _duplicates_by_place(sets, named, pairs)
    open_questions = [
        *_unknown_patients(sets, unknown_N),
        *_separate_namespaces(sets, nameless_N),
        *_not_compared(sets, unmarked),
    ]
    return {
        "verdict": _verdict(crossing, joint, alike, open_questions),
        "not_checked": open_questions,
        "patients": len(set(person)),
        "pictures_of_unknown_patients": int(unknown_N.sum()),
        "patients_in_two_splits": crossing,
        "patients_in_two_sets": joint,
        "duplicates": {"pairs": len(pairs), **alike},
    }


def merged_patients(sets: JoinedDatasets) -> list[str]:
    """(N,) who each image shows: patients are one where the same archive names them alike or they share an image.

    12 s for the 112,120 images of ChestX-ray14.

    Raises:
        UserError: fingerprints cannot be read.
    """
    pairs, _ = _duplicate_pairs(sets)
    return duplicates.merge_patients(_namespaced_patients(sets), pairs.tolist())


def _namespaced_patients(sets: JoinedDatasets) -> list[str]:
    return [f"{sets.spaces[s]}:{who}" for s, who in zip(sets.member_N.tolist(), sets.data.patient, strict=True)]


def _duplicate_pairs(sets: JoinedDatasets) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """Pairs of rows that show the same image, (P, 2); and for each root, how many images have no fingerprint."""
    row_of = {image_id: row for row, image_id in enumerate(sets.data.image_id.tolist())}
    marks: dict[int, tuple[bytes, bytes]] = {}
    for root in sets.roots:
        address = storage.join(root, manifest.FINGERPRINTS)
        if storage.exists(address):
            table = _fingerprints(address)
            columns = (table[name].to_pylist() for name in table.column_names)
            marks |= {
                row_of[name]: (dhash, thumb) for name, dhash, thumb in zip(*columns, strict=True) if name in row_of
            }
    rows = np.array(sorted(marks), dtype=np.int64)
    hashes = np.frombuffer(b"".join(marks[row][0] for row in rows.tolist()), dtype=np.uint8).reshape(len(rows), -1)
    thumbs = np.frombuffer(b"".join(marks[row][1] for row in rows.tolist()), dtype=np.uint8).reshape(len(rows), -1)
    missing = np.bincount(np.delete(sets.member_N, rows), minlength=len(sets.roots))
    unmarked = {root: int(missing[s]) for s, root in enumerate(sets.roots) if missing[s]}
    return (rows[duplicates.find_within(hashes, thumbs)] if len(rows) else np.empty((0, 2), dtype=np.int64)), unmarked


def _fingerprints(address: str) -> pa.Table:
    try:
        return pq.read_table(pa.BufferReader(storage.read(address)), columns=["image_id", "dhash", "thumbnail"])
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{address} cannot be read ({error}); remove it and {manifest.NAME} beside it, then `cxrscale shard` again"
        ) from None


def _shared(
    sets: JoinedDatasets, named: Sequence[str], nameless_N: npt.NDArray[np.bool_], person: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The persons that stand in two splits, those that stand in two sets, and where they do."""
    homes: dict[str, list[int]] = {}
    for row, who in enumerate(person):
        homes.setdefault(who, []).append(row)
    split, ids, member = sets.data.split.tolist(), sets.data.image_id.tolist(), sets.member_N.tolist()

    def entry(who: str, rows: Iterable[int]) -> dict[str, Any]:
        where: dict[str, list[str]] = {}
        for row in rows:
            where.setdefault(split[row], []).append(ids[row])
        return {
            "patient": who,
            "also": sorted({named[row] for row in rows if not nameless_N[row]} - {who}),
            "shards": [sets.roots[s] for s in sorted({member[row] for row in rows})],
            "splits": {name: len(found) for name, found in sorted(where.items())},
            "images": {name: found[0] for name, found in sorted(where.items())},
        }

    whose = sorted(homes.items())
    return (
        [entry(who, rows) for who, rows in whose if len({split[row] for row in rows} - {UNLABELED}) > 1],
        [entry(who, rows) for who, rows in whose if len({member[row] for row in rows}) > 1],
    )


def _duplicates_by_place(
    sets: JoinedDatasets, named: Sequence[str], pairs: npt.NDArray[np.int64]
) -> dict[str, list[dict[str, Any]]]:
    """Pairs of images that are the same: those between splits leak; those within one count twice."""
    split, ids, member = sets.data.split.tolist(), sets.data.image_id.tolist(), sets.member_N.tolist()
    found: dict[str, list[dict[str, Any]]] = {"between_splits": [], "between_sets": [], "within_a_set_and_split": []}
    for a, b in pairs.tolist():
        entry = {
            "images": [ids[a], ids[b]],
            "patients": [named[a], named[b]],
            "shards": [sets.roots[member[a]], sets.roots[member[b]]],
            "splits": [split[a], split[b]],
        }
        leaks = split[a] != split[b] and UNLABELED not in (split[a], split[b])
        if leaks:
            found["between_splits"].append(entry)
        if member[a] != member[b]:
            found["between_sets"].append(entry)
        elif not leaks:
            found["within_a_set_and_split"].append(entry)
    return found


def _verdict(
    crossing: Sequence[Any], joint: Sequence[Any], alike: Mapping[str, Sequence[Any]], open_questions: Sequence[str]
) -> list[str]:
    """A few plain sentences; a leak begins with LEAK."""
    copies = alike["between_splits"]
    lines = []
    if not crossing:
        scope = " in what could be checked" if open_questions else ""
        lines.append(f"No leak found{scope}: no patient and no image stands in two splits.")
        if joint:
            patients = _count(len(joint), "patient")
            images = _count(len(alike["between_sets"]), "image")
            lines.append(f"In two datasets, but always in the same split: {patients}, {images}.")
        return lines
    first = crossing[0]
    homes = " and ".join(f"{name} ({image})" for name, image in first["images"].items() if name != UNLABELED)
    lines.append(f"LEAK: {_count(len(crossing), 'patient')} in two splits, e.g. {first['patient']} in {homes}.")
    if copies:
        (one, other), (here, there) = copies[0]["images"], copies[0]["splits"]
        lines.append(
            f"LEAK: {_count(len(copies), 'image')} in two splits, e.g. {one} in {here}, which is {other} in {there}."
        )
    return lines


def _count(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}s"


# What could not be told


def _unreliable_patients(sets: JoinedDatasets) -> npt.NDArray[np.bool_]:
    """(N,) images whose patient the archive does not tell, and whose copy, if one was looked for, was not found."""
    data, spaces, member_N = sets.data, sets.spaces, sets.member_N
    patients: dict[str, set[str]] = {}
    for s, about in enumerate(data.about):
        if about["source"] == spaces[s]:
            patients.setdefault(spaces[s], set()).update(data.patient[member_N == s].tolist())
    nameless_N = data.patient == data.image_id
    for s, about in enumerate(data.about):
        own = member_N == s
        if about["source"] == spaces[s]:
            nameless_N |= own & (about["source"] in UNRELIABLE_PATIENT_IDS)
        elif spaces[s] in patients:
            nameless_N |= own & ~np.isin(data.patient.astype(str), sorted(patients[spaces[s]]))
        else:
            # Only this setting: a manifest of another version may have fields that this one does not know.
            settings = Pack(patient_ids=about["pack"].get("patient_ids", about["pack"].get("patients", "original")))
            hashed = [build.hash_patient_id(_record(about, name), settings) for name in data.image_id[own]]
            nameless_N[own] |= data.patient[own] == np.array(hashed, dtype=object)
    return np.asarray(nameless_N, dtype=np.bool_)


def _record(about: Mapping[str, Any], image_id: str) -> ImageRecord:
    """What an archive without patients says of an image: it is its own patient."""
    return ImageRecord(image_id=image_id, source=about["source"], path="", patient=image_id)


def _unknown_patients(sets: JoinedDatasets, unknown_N: npt.NDArray[np.bool_]) -> list[str]:
    lines = []
    for s, root in enumerate(sets.roots):
        own = sets.member_N == s
        count, whole = int((unknown_N & own).sum()), int(own.sum())
        if not count:
            continue
        source = sets.data.about[s]["source"]
        hint = " (NIH ChestX-ray14)" if source in UNRELIABLE_PATIENT_IDS else ""
        hint += ", all of them" if count < whole else ""
        lines.append(
            f"the patients of {count:,} of {whole:,} images of {root} are unknown, so it cannot be told whether one "
            f"of them stands in two splits; shard it again as `cxrscale shard {source} ARCHIVE --patients-from SHARDS`, with a "
            f"dataset that holds the same images under their patients{hint}"
        )
    return lines


def _separate_namespaces(sets: JoinedDatasets, nameless_N: npt.NDArray[np.bool_]) -> list[str]:
    """Sets that name patients independently of one another; where all are unknown, that was said already."""
    roots, spaces = sets.roots, sets.spaces
    naming = [s for s in range(len(roots)) if not nameless_N[sets.member_N == s].all()]
    return [
        f"{roots[a]} and {roots[b]} name their patients independently ({spaces[a]}, {spaces[b]}), so a patient of "
        "both is seen only where they share an image; nothing can be done about the rest"
        for place, a in enumerate(naming)
        for b in naming[place + 1 :]
        if spaces[a] != spaces[b]
    ]


def _not_compared(sets: JoinedDatasets, unmarked: Mapping[str, int]) -> list[str]:
    """Images that no other was compared with."""
    lines = [
        f"{count:,} images of {root} have no fingerprint, so copies of them cannot be found; remove {manifest.NAME} "
        "there and run `cxrscale shard` again"
        for root, count in unmarked.items()
    ]
    lost = sum(len(about["quarantined"]) for about in sets.data.about)
    if lost:
        lines.append(
            f"{_count(lost, 'quarantined image')} could not be read and had no part in any comparison; mend the "
            "files, or leave them out"
        )
    return lines

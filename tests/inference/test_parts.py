"""Parts of Parquet: what comes back is what was written, whatever the paths and findings are called."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrscale.config import Recipe
from cxrscale.inference import Prediction, Provenance, journal, parts
from cxrscale.types import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(["\udc80", "\udcff"]), max_size=8)
LINES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)
NUMBER = st.floats(allow_nan=False)
KEYS = st.sampled_from(["Mass", "Pleural_Thickening", "a.b", "\u00e9"])


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


PREDICTIONS = st.builds(
    Prediction,
    path=TEXT,
    image_id=TEXT,
    probabilities=st.dictionaries(KEYS, NUMBER),
    calls=st.dictionaries(KEYS, st.booleans()),
    logits=st.dictionaries(KEYS, NUMBER),
    gate=st.dictionaries(KEYS, NUMBER, max_size=1),
    gate_call=optional(st.booleans()),
    mask_rle=optional(LINES),
    mask_area=optional(st.integers(0, 2**40)),
    mask_area_mm2=optional(NUMBER),
    height=optional(st.integers(1, 2**20)),
    width=optional(st.integers(1, 2**20)),
    spacing_mm=optional(st.tuples(NUMBER, NUMBER)),
    error=TEXT,
    unreachable=st.booleans(),
    ood_distance=optional(NUMBER),
    warnings=st.lists(LINES, max_size=3).map(tuple),
    objects=st.dictionaries(st.sampled_from(["dicom-sr", "overlay"]), LINES),
    object_errors=st.dictionaries(st.sampled_from(["dicom-sr", "overlay"]), LINES),
)


@settings(max_examples=30)
@given(st.lists(PREDICTIONS, min_size=1, max_size=5))
def test_what_is_read_is_what_was_written(rows: list[Prediction]) -> None:
    content = parts.encode(rows)
    assert list(parts.decode(content, "part")) == rows
    for one, state in zip(rows, parts.decode_state(content, "part", ("overlay",)), strict=True):
        assert (state.path, state.error, state.unreachable) == (one.path, one.error, one.unreachable)
        for field in ("objects", "object_errors"):
            mine, theirs = getattr(one, field), getattr(state, field)
            assert theirs == {kind: name for kind, name in mine.items() if kind == "overlay"}


def test_findings_keep_their_order() -> None:
    rows = [Prediction("a", calls={"c": True}), Prediction("b", calls={"a": True, "b": False, "c": True})]
    assert [list(one.calls) for one in parts.decode(parts.encode(rows), "part")] == [["c"], ["a", "b", "c"]]


def test_a_damaged_part_is_one_line() -> None:
    content = bytearray(parts.encode([Prediction("a", probabilities={"Mass": 0.25})]))
    content[len(content) // 2] ^= 1
    with pytest.raises(UserError, match="remove it: its images are predicted again"):
        list(parts.decode(bytes(content), "part"))


def test_after_a_damaged_part_is_removed_no_other_is_overwritten(tmp_path: Path) -> None:
    about = Provenance(run="run", checkpoint="c", manifest="m", thresholds="", recipe=Recipe())
    kept = journal.Journal(str(tmp_path), about)
    rows = [Prediction(name, probabilities={"Mass": 0.5}) for name in "abc"]
    for one in rows:
        kept.add([one])
        kept.flush()
    (tmp_path / "parts" / "00001.parquet").unlink()
    kept = journal.Journal(str(tmp_path), about)
    assert kept.done == {"a", "c"}
    kept.add([replace(rows[1], height=7)])
    kept.flush()
    again = journal.Journal(str(tmp_path), about)
    assert list(again.newest(["a", "b", "c"])) == [rows[0], replace(rows[1], height=7), rows[2]]


@given(st.permutations(range(12)), st.lists(st.integers(3, 6), min_size=5, max_size=5), st.integers(0, 11))
@settings(max_examples=8)
def test_rows_come_in_the_order_of_the_inputs(done: list[int], sizes: list[int], again: int) -> None:
    """Whatever the order in which they were done, in parts of whatever size; of an input done twice the newer row."""
    about = Provenance(run="run", checkpoint="c", manifest="m", thresholds="", recipe=Recipe())
    with TemporaryDirectory() as out:
        kept = journal.Journal(out, about)
        left = [(number, 1) for number in done] + [(again, 2)]
        for size in sizes:
            kept.add([Prediction(str(number), height=height) for number, height in left[:size]])
            kept.flush()
            left = left[size:]
        found = list(journal.Journal(out, about).newest([str(number) for number in range(13)]))
    heights = dict([*((number, 1) for number in done), (again, 2)][: sum(sizes)])
    assert [(one.path, one.height) for one in found] == [(str(n), heights[n]) for n in sorted(heights)]

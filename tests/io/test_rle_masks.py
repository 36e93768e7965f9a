"""Run-length encodings: against a slow loop, there and back, and on every string of the real table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cxrscale.io import rle_masks

TABLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "siim" / "train-rle.csv"
SIDE = (1024, 1024)


def loop_decode(rle: str, shape: tuple[int, int]) -> rle_masks.Mask:
    """The obvious loop: slow, and easy to compare with the definition of the format."""
    flat = np.zeros(shape[0] * shape[1], dtype=np.bool_)
    numbers = [int(word) for word in rle.split()]
    position = 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        position += start
        flat[position : position + length] = True
        position += length
    return np.ascontiguousarray(flat.reshape(shape[1], shape[0]).T)


def real_rows() -> list[tuple[str, str]]:
    """(image id, encoding) of every row of the published table."""
    if not TABLE.exists():
        pytest.skip(f"the real mask table {TABLE.name} is missing")
    with TABLE.open(newline="") as file:
        return [(row[0], row[1]) for row in list(csv.reader(file))[1:]]


@pytest.mark.parametrize(
    ("rle", "pixels"),
    [
        ("0 1", [(0, 0)]),
        ("1 2", [(1, 0), (2, 0)]),
        ("2 2", [(2, 0), (0, 1)]),  # a run continues at the top of the next column
        ("0 1 2 1", [(0, 0), (0, 1)]),  # the second start counts from the end of the first run
        ("11 1", [(2, 3)]),
        ("0 2 0 1", [(0, 0), (1, 0), (2, 0)]),  # runs that touch
        (" 4 1 ", [(1, 1)]),  # blanks around, as in SIIM's cells
        ("4 0", []),
        ("-1", []),
        (" -1", []),
    ],
)
def test_decode_by_hand(rle: str, pixels: list[tuple[int, int]]) -> None:
    mask = rle_masks.decode(rle, (3, 4))
    assert mask.dtype == np.bool_
    assert mask.shape == (3, 4)
    assert mask.flags.c_contiguous
    assert sorted(zip(*(axis.tolist() for axis in np.nonzero(mask)), strict=True)) == sorted(pixels)


def test_encode_by_hand() -> None:
    mask = np.zeros((3, 4), dtype=np.bool_)
    assert rle_masks.encode(mask) == "-1"
    mask[2, 0] = mask[0, 1] = mask[2, 3] = True
    assert rle_masks.encode(mask) == "2 2 7 1"
    assert rle_masks.encode(np.ones((3, 4), dtype=np.bool_)) == "0 12"
    assert rle_masks.encode(np.zeros((0, 4), dtype=np.bool_)) == "-1"


def test_encode_takes_any_memory_layout() -> None:
    mask = np.random.default_rng(0).random((24, 40)) < 0.3
    assert rle_masks.encode(np.asfortranarray(mask)) == rle_masks.encode(mask)
    assert rle_masks.encode(mask[::2, ::-3]) == rle_masks.encode(np.ascontiguousarray(mask[::2, ::-3]))


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=24)))
def test_any_mask_survives_encoding_and_decoding(mask: rle_masks.Mask) -> None:
    rle = rle_masks.encode(mask)
    assert np.array_equal(rle_masks.decode(rle, mask.shape), mask)
    if mask.any():
        assert np.array_equal(loop_decode(rle, mask.shape), mask)


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, tuple[int, int]]:
    """An encoding, not always the shortest one, and the shape of an image that contains it."""
    numbers = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
    width = draw(st.integers(1, 9))
    height = max(1, -(-sum(map(sum, numbers)) // width)) + draw(st.integers(0, 3))
    return " ".join(f"{start} {length}" for start, length in numbers), (height, width)


@given(runs())
def test_any_encoding_is_decoded_like_the_loop(case: tuple[str, tuple[int, int]]) -> None:
    rle, shape = case
    mask = rle_masks.decode(rle, shape)
    assert np.array_equal(mask, loop_decode(rle, shape))
    assert np.array_equal(rle_masks.decode(rle_masks.encode(mask), shape), mask)


@given(st.lists(arrays(np.bool_, (7, 5)), max_size=4))
@settings(max_examples=50)
def test_union_is_or(parts: list[rle_masks.Mask]) -> None:
    expected = np.any([np.zeros((7, 5), dtype=np.bool_), *parts], axis=0)
    assert np.array_equal(rle_masks.union([rle_masks.encode(part) for part in parts], (7, 5)), expected)


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ("", "blank"),
        ("   ", "blank"),
        ("1 2 3", "3 numbers"),
        ("1 2 x 4", "'x'"),
        ("1 -2", "'-2'"),
        ("-1 3", "'-1'"),
        ("1.0 2", "'1.0'"),
        ("+1 2", r"'\+1'"),
        ("1_0 2", "'1_0'"),
        ("٣ 2", "only non-negative integers"),
        ("11 2", "end at pixel 13 of 12"),
        ("0 99999999999999999999999 1 1", "end at pixel"),
    ],
)
def test_a_wrong_encoding_gives_the_reason(rle: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle_masks.decode(rle, (3, 4))
    with pytest.raises(ValueError, match=message):
        rle_masks.union(["-1", rle], (3, 4))


def test_a_wrong_shape_or_mask_gives_the_reason() -> None:
    with pytest.raises(ValueError, match="shape is 0 x 4"):
        rle_masks.decode("-1", (0, 4))
    with pytest.raises(ValueError, match="shape is 3 x -1"):
        rle_masks.union([], (3, -1))
    with pytest.raises(ValueError, match="uint8"):
        rle_masks.encode(np.zeros((3, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="threshold it first"):
        rle_masks.encode(np.zeros((1, 3, 4), dtype=np.bool_))


def test_the_real_table_is_reproduced_exactly() -> None:
    positive = [(image_id, rle) for image_id, rle in real_rows() if rle.strip() != rle_masks.EMPTY]
    assert len(positive) == 3576
    rows_of: dict[str, int] = {}
    for image_id, _ in positive:
        rows_of[image_id] = rows_of.get(image_id, 0) + 1
    single = back = 0
    for image_id, rle in positive:
        same = rle_masks.encode(rle_masks.decode(rle, SIDE)) == rle.strip()
        back += same
        if rows_of[image_id] == 1:
            single += 1
            assert same, image_id
    assert single == 2045
    assert back == 3576  # also the rows of images with several masks


def test_the_real_table_is_decoded_like_the_loop() -> None:
    strings = [rle for _, rle in real_rows() if rle.strip() != rle_masks.EMPTY]
    for rle in [*strings[::300], max(strings, key=len)]:
        assert np.array_equal(rle_masks.decode(rle, SIDE), loop_decode(rle, SIDE))


def test_real_images_with_several_masks() -> None:
    rles_of: dict[str, list[str]] = {}
    for image_id, rle in real_rows():
        rles_of.setdefault(image_id, []).append(rle)
    several = {image_id: rles for image_id, rles in rles_of.items() if len(rles) > 1}
    assert len(several) == 624
    overlapping = 0
    for rles in several.values():
        parts = [np.count_nonzero(rle_masks.decode(rle, SIDE)) for rle in rles]
        union = np.count_nonzero(rle_masks.union(rles, SIDE))
        assert max(parts) <= union <= sum(parts)
        overlapping += int(union < sum(parts))
    assert overlapping == 183

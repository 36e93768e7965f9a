"""The same image is found however it was stored; different images are not taken for duplicates."""

from random import Random

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cxrscale.shards import duplicates


def image(seed: int, side: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rough = rng.normal(size=(12, 12)).astype(np.float32)
    smooth = cv2.resize(rough, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(128 + 40 * smooth, 0, 255), dtype=np.uint8)


def prints(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    items = [duplicates.fingerprint(image_HW) for image_HW in images]
    hashes = np.frombuffer(b"".join(item.dhash for item in items), dtype=np.uint8).reshape(-1, 32)
    return hashes, np.frombuffer(b"".join(item.thumbnail for item in items), dtype=np.uint8).reshape(-1, 1024)


@pytest.mark.parametrize("change", ["resize", "jpeg", "window"])
def test_a_changed_copy_is_found_and_nothing_else(change: str) -> None:
    originals = [image(seed) for seed in range(20)]
    copies = []
    for original in originals[:10]:
        if change == "resize":
            copies.append(cv2.resize(original, (128, 128), interpolation=cv2.INTER_AREA))
        elif change == "jpeg":
            copies.append(cv2.imdecode(cv2.imencode(".jpg", original, [cv2.IMWRITE_JPEG_QUALITY, 75])[1], 0))
        else:
            copies.append(np.clip((original.astype(np.float32) - 10) * 1.04, 0, 255).astype(np.uint8))
    pairs = duplicates.find_between(*prints(copies), *prints(originals))
    assert pairs.tolist() == [[i, i] for i in range(10)]


def test_an_image_that_occurs_twice_is_found() -> None:
    images = [image(0), image(1), image(0)]
    assert duplicates.find_within(*prints(images)).tolist() == [[0, 2]]


@settings(max_examples=20)
@given(a=st.integers(0, 10_000), b=st.integers(0, 10_000))
def test_different_images_are_not_duplicates(a: int, b: int) -> None:
    pairs = duplicates.find_between(*prints([image(a)]), *prints([image(b)]))
    assert (len(pairs) == 1) == (a == b)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), block=st.sampled_from([1, 7, 1024]), noise=st.floats(0, 12))
def test_blocks_give_the_same_pairs_as_one_by_one_comparison(seed: int, block: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    first = [image(int(n)) for n in rng.integers(0, 1000, size=rng.integers(0, 5))]
    second = [np.clip(p + rng.normal(0, noise, p.shape), 20, 200).astype(np.uint8) for p in first[::2]] + [image(0)]
    (hashes_A, thumbs_A), (hashes_B, thumbs_B) = prints(first), prints(second)

    def correlation(one: np.ndarray, other: np.ndarray) -> float:
        first, second = (p.reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel() for p in (one, other))
        return float(np.corrcoef(first, second)[0, 1])

    def unexplained(by: np.ndarray, target: np.ndarray) -> float:
        order = sorted(range(1024), key=lambda pixel: by[pixel])
        left = [np.var(target[order[start : start + 16]].astype(float)) for start in range(0, 1024, 16)]
        return float(np.mean(left) / np.var(target.astype(float)))

    def same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
        distance = np.bitwise_count(one[0] ^ other[0]).sum()
        similarity = correlation(one[1], other[1])
        share = min(unexplained(one[1], other[1]), unexplained(other[1], one[1]))
        assume(abs(similarity - duplicates.MIN_CORRELATION) > 1e-5)  # float32 may round either way there
        assume(abs(share - duplicates.MAX_UNEXPLAINED) > 1e-9)
        return bool(
            distance <= duplicates.MAX_DISTANCE
            and similarity >= duplicates.MIN_CORRELATION
            and share <= duplicates.MAX_UNEXPLAINED
        )

    prints_A = list(zip(hashes_A, thumbs_A, strict=True))
    prints_B = list(zip(hashes_B, thumbs_B, strict=True))
    expected = [[a, b] for a, one in enumerate(prints_A) for b, other in enumerate(prints_B) if same(one, other)]
    every = prints_A + prints_B
    within = [[a, b] for b, other in enumerate(every) for a, one in enumerate(every[:b]) if same(one, other)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK", block)
        assert duplicates.find_between(hashes_A, thumbs_A, hashes_B, thumbs_B).tolist() == expected
        together = np.concatenate([hashes_A, hashes_B]), np.concatenate([thumbs_A, thumbs_B])
        assert duplicates.find_within(*together).tolist() == sorted(within)


def test_blank_images_are_not_duplicates() -> None:
    blank = [np.full((64, 64), gray, dtype=np.uint8) for gray in (0, 0, 255, 255)]
    assert duplicates.find_within(*prints(blank)).tolist() == []


@st.composite
def joined(draw: st.DrawFn) -> tuple[list[str], list[tuple[int, int]]]:
    """Patients of images, and pairs of their rows."""
    patients = draw(st.lists(st.integers(0, 15).map(lambda n: f"p{n}"), min_size=1, max_size=40))
    row = st.integers(0, len(patients) - 1)
    return patients, draw(st.lists(st.tuples(row, row), max_size=25))


@given(images=joined(), order=st.randoms(use_true_random=False))
def test_merged_patients_are_the_connected_ones(images: tuple[list[str], list[tuple[int, int]]], order: Random) -> None:
    patients, pairs = images
    groups = {name: {name} for name in patients}  # the slow method: merge complete sets, again and again
    for a, b in pairs:
        together = groups[patients[a]] | groups[patients[b]]
        groups |= dict.fromkeys(together, together)
    expected = [min(groups[name]) for name in patients]
    assert duplicates.merge_patients(patients, pairs) == expected
    assert duplicates.merge_patients(expected, pairs) == expected
    reverse = [(b, a) for a, b in pairs]
    order.shuffle(reverse)
    assert duplicates.merge_patients(patients, reverse) == expected
    assert duplicates.merge_patients(patients, np.array(pairs, dtype=np.int64).reshape(-1, 2).tolist()) == expected


def test_a_long_chain_of_duplicates_is_one_patient() -> None:
    patients = [f"p{n:05d}" for n in range(20_000)]
    chain = [(n + 1, n) for n in reversed(range(len(patients) - 1))]
    assert set(duplicates.merge_patients(patients, chain)) == {"p00000"}


def test_a_pair_beyond_the_rows_is_refused() -> None:
    for pair in [(0, 2), (-1, 0)]:
        with pytest.raises(IndexError):
            duplicates.merge_patients(["a", "b"], [pair])

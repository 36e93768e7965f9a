"""No patient is ever in two splits, and the shares are as configured."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale.shards import duplicates, splits
from cxrscale.sources import nih, siim
from cxrscale.types import UserError

patients = st.lists(st.integers(0, 40).map(lambda n: f"p{n}"), min_size=1, max_size=200)


@given(owner=patients, val=st.floats(0, 0.5), test=st.floats(0, 0.5), seed=st.integers(0, 5))
def test_random_never_splits_a_patient(owner: list[str], val: float, test: float, seed: int) -> None:
    split = splits.random(owner, val, test, seed)
    assert splits.overlapping_patients(owner, split.tolist()) == []
    assert (split == splits.TEST).sum() <= round(test * len(owner))
    assert (split == splits.VAL).sum() <= round(val * len(owner))


@given(owner=patients, val=st.floats(0, 0.9), seed=st.integers(0, 5))
def test_official_keeps_the_test_list_and_never_splits_a_patient(owner: list[str], val: float, seed: int) -> None:
    published = ["test" if int(name[1:]) % 4 == 0 else "train_val" for name in owner]
    split = splits.official(owner, published, val, seed)
    assert splits.overlapping_patients(owner, split.tolist()) == []
    assert [name == "test" for name in published] == (split == splits.TEST).tolist()


@given(owner=patients, seed=st.integers(0, 3))
def test_the_order_of_the_images_does_not_matter(owner: list[str], seed: int) -> None:
    expected = dict(zip(owner, splits.random(owner, 0.2, 0.2, seed).tolist(), strict=True))
    shuffled = list(reversed(owner))
    assert dict(zip(shuffled, splits.random(shuffled, 0.2, 0.2, seed).tolist(), strict=True)) == expected


def test_shares_are_exact_while_patients_with_one_image_are_left() -> None:
    owner = [f"p{n}" for n in range(1000) for _ in range(1 + n % 3)]
    split = splits.random(owner, 0.1, 0.2, seed=0)
    assert (split == splits.TEST).sum() == round(0.2 * len(owner))
    assert (split == splits.VAL).sum() == round(0.1 * len(owner))


def test_a_leaking_official_list_is_refused() -> None:
    with pytest.raises(UserError, match="patient a is in the official test list and outside it"):
        splits.official(["a", "a"], ["test", "train_val"], 0.1, 0)


def test_overlapping_patients_finds_the_shared_patient() -> None:
    assert splits.overlapping_patients(["a", "b", "a"], ["train", "train", "val"]) == ["a"]


def test_seeds_draw_different_splits() -> None:
    owner = [f"p{n}" for n in range(100)]
    assert np.any(splits.random(owner, 0.2, 0.2, 0) != splits.random(owner, 0.2, 0.2, 1))


def _patients_in(owner: list[str], split: splits.Splits) -> dict[str, int]:
    return dict(Counter(dict(zip(owner, split.tolist(), strict=True)).values()))


@given(owner=patients, seed=st.integers(0, 5))
def test_chexnet_counts_patients_and_never_splits_one(owner: list[str], seed: int) -> None:
    split = splits.chexnet(owner, seed)
    assert splits.overlapping_patients(owner, split.tolist()) == []
    counts = _patients_in(owner, split)
    if len(set(owner)) >= 3:
        assert (counts["val"], counts["test"]) == (max(1, round(len(set(owner)) * 1672 / 30805)), 1)
    else:
        assert counts == {"train": len(set(owner))}
    reverse = list(reversed(owner))
    assert splits.chexnet(reverse, seed).tolist() == list(reversed(split.tolist()))


def test_chexnet_has_the_sizes_of_the_paper() -> None:
    owner = [f"{n:08d}" for n in range(30_805)]
    for seed in range(2):
        assert _patients_in(owner, splits.chexnet(owner, seed)) == {"train": 28_744, "val": 1_672, "test": 389}
    ten_times = [f"{n:08d}" for n in range(3_080)]
    assert _patients_in(ten_times, splits.chexnet(ten_times, 0)) == {"train": 2_874, "val": 167, "test": 39}


def test_chexnet_on_the_published_table(real: Path) -> None:
    owner = [entry.patient for entry in nih.read_table(str(real / "nih" / "Data_Entry_2017_v2020.csv")).values()]
    split = splits.chexnet(owner, seed=0)
    assert _patients_in(owner, split) == splits.CHEXNET_PATIENTS
    assert splits.overlapping_patients(owner, split.tolist()) == []


@st.composite
def images(draw: st.DrawFn) -> tuple[list[str], list[float], list[float], int, int]:
    """Patients, labels, mask sizes, a number of folds that fits, and a seed."""
    owner = draw(st.lists(st.integers(0, 30).map(lambda n: f"p{n}"), min_size=1, max_size=150))
    if len(set(owner)) < 2:
        owner.append("another")
    label = st.sampled_from([0.0, 0.0, 1.0, np.nan])
    size = st.one_of(st.just(np.nan), st.integers(0, 5000).map(float))
    positive = draw(st.lists(label, min_size=len(owner), max_size=len(owner)))
    pixels = draw(st.lists(size, min_size=len(owner), max_size=len(owner)))
    return owner, positive, pixels, draw(st.integers(2, min(6, len(set(owner))))), draw(st.integers(0, 3))


@given(drawn=images(), with_masks=st.booleans())
def test_folds_are_balanced_and_never_share_a_patient(
    drawn: tuple[list[str], list[float], list[float], int, int], with_masks: bool
) -> None:
    owner, positive, pixels, folds, seed = drawn
    split = splits.kfold(owner, positive, pixels if with_masks else None, folds, seed)
    names = [f"fold{number}" for number in range(folds)]
    assert set(split) == set(names)
    assert splits.overlapping_patients(owner, split.tolist()) == []
    sizes = [int((split == name).sum()) for name in names]
    assert max(sizes) - min(sizes) <= max(Counter(owner).values())
    sick = {name for name, label in zip(owner, positive, strict=True) if label == 1}
    if len(sick) >= folds:
        assert {fold for name, fold in zip(owner, split, strict=True) if name in sick} == set(names)


@given(drawn=images())
def test_folds_depend_on_the_images_not_on_their_order(
    drawn: tuple[list[str], list[float], list[float], int, int],
) -> None:
    owner, positive, pixels, folds, seed = drawn
    split = splits.kfold(owner, positive, pixels, folds, seed)
    reverse = splits.kfold(owner[::-1], positive[::-1], pixels[::-1], folds, seed)
    assert reverse.tolist() == split.tolist()[::-1]


@given(drawn=images(), pairs=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=8))
def test_no_duplicate_is_in_two_splits_once_patients_are_merged(
    drawn: tuple[list[str], list[float], list[float], int, int], pairs: list[tuple[int, int]]
) -> None:
    owner, positive, pixels, _, seed = drawn
    same = [(a % len(owner), b % len(owner)) for a, b in pairs]
    merged = duplicates.merge_patients(owner, same)
    results = [splits.random(merged, 0.2, 0.2, seed), splits.chexnet(merged, seed)]
    if len(set(merged)) >= 2:
        results.append(splits.kfold(merged, positive, pixels, 2, seed))
    for split in results:
        assert all(split[a] == split[b] for a, b in same)
        assert splits.overlapping_patients(owner, split.tolist()) == []


def test_seeds_draw_different_folds() -> None:
    owner = [f"p{n}" for n in range(60)]
    sick = [n % 3 == 0 for n in range(60)]
    assert np.any(splits.kfold(owner, sick, None, 3, 0) != splits.kfold(owner, sick, None, 3, 1))


@pytest.mark.parametrize("folds", [-1, 0, 1, 4])
def test_impossible_numbers_of_folds_are_refused(folds: int) -> None:
    with pytest.raises(UserError, match=f"folds={folds}: give 2 up to the number of patients, 3"):
        splits.kfold(["a", "b", "c", "c"], [1, 0, 0, 1], None, folds, 0)


def test_folds_of_the_published_masks_are_balanced(real: Path) -> None:
    rows = siim.read_table(str(real / "siim" / "train-rle.csv"))
    sizes = [sum(int(length) for rle in rles for length in rle.split()[1::2]) for rles in rows.values()]
    sick = np.array(sizes) > 0
    split = splits.kfold(list(rows), sick, sizes, 5, seed=0)
    names = [f"fold{number}" for number in range(5)]
    assert sorted(int((split == name).sum()) for name in names) == [2409, 2409, 2409, 2410, 2410]
    assert sorted(int((sick & (split == name)).sum()) for name in names) == [533, 534, 534, 534, 534]
    quartiles = np.searchsorted(np.quantile(np.array(sizes)[sick], [0.25, 0.5, 0.75]), np.array(sizes)[sick])
    for name in names:
        assert np.ptp(np.bincount(quartiles[split[sick] == name])) <= 3


def test_lists_assign_their_images() -> None:
    split = splits.from_lists(["a", "b", "c", "d"], {"train": {"a", "c"}, "holdout": ["b", "b"]})
    assert split.tolist() == ["train", "holdout", "train", splits.UNLISTED]
    assert splits.from_lists([], {}).tolist() == []


@given(split_of=st.dictionaries(st.text(max_size=5), st.sampled_from(["train", "val", None])))
def test_any_lists_are_reproduced(split_of: dict[str, str | None]) -> None:
    lists = {split: {name for name, assigned in split_of.items() if assigned == split} for split in ("train", "val")}
    assert splits.from_lists(list(split_of), lists).tolist() == [
        split or splits.UNLISTED for split in split_of.values()
    ]


def test_impossible_lists_are_refused() -> None:
    with pytest.raises(UserError, match="list val: image 'b' is also in list train"):
        splits.from_lists(["a", "b"], {"train": {"a", "b"}, "val": {"b"}})
    with pytest.raises(UserError, match="list val: the source has no image 'x'"):
        splits.from_lists(["a", "b"], {"train": {"a", "b"}, "val": {"x"}})

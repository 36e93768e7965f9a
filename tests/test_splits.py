"""No patient ever stands in two splits, and shares come out as asked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cxrscale import splits
from cxrscale.schema import InputError

patients = st.lists(st.integers(0, 40).map(lambda n: f"p{n}"), min_size=1, max_size=200)


@given(who=patients, val=st.floats(0, 0.5), test=st.floats(0, 0.5), seed=st.integers(0, 5))
def test_random_never_parts_a_patient(who: list[str], val: float, test: float, seed: int) -> None:
    split = splits.random(who, val, test, seed)
    assert splits.crossing(who, split.tolist()) == []
    assert (split == splits.TEST).sum() <= round(test * len(who))
    assert (split == splits.VAL).sum() <= round(val * len(who))


@given(who=patients, val=st.floats(0, 0.9), seed=st.integers(0, 5))
def test_official_keeps_the_test_list_and_never_parts_a_patient(who: list[str], val: float, seed: int) -> None:
    archive = ["test" if int(name[1:]) % 4 == 0 else "train_val" for name in who]
    split = splits.official(who, archive, val, seed)
    assert splits.crossing(who, split.tolist()) == []
    assert [name == "test" for name in archive] == (split == splits.TEST).tolist()


@given(who=patients, seed=st.integers(0, 3))
def test_the_order_of_the_archive_does_not_matter(who: list[str], seed: int) -> None:
    there = dict(zip(who, splits.random(who, 0.2, 0.2, seed).tolist(), strict=True))
    shuffled = list(reversed(who))
    assert dict(zip(shuffled, splits.random(shuffled, 0.2, 0.2, seed).tolist(), strict=True)) == there


def test_shares_are_met_to_the_picture_when_single_pictures_are_left() -> None:
    who = [f"p{n}" for n in range(1000) for _ in range(1 + n % 3)]
    split = splits.random(who, 0.1, 0.2, seed=0)
    assert (split == splits.TEST).sum() == round(0.2 * len(who))
    assert (split == splits.VAL).sum() == round(0.1 * len(who))


def test_a_leaking_official_list_is_refused() -> None:
    with pytest.raises(InputError, match="patient a is in the official test list and outside it"):
        splits.official(["a", "a"], ["test", "train_val"], 0.1, 0)


def test_crossing_finds_the_shared_patient() -> None:
    assert splits.crossing(["a", "b", "a"], ["train", "train", "val"]) == ["a"]


def test_seeds_draw_different_splits() -> None:
    who = [f"p{n}" for n in range(100)]
    assert np.any(splits.random(who, 0.2, 0.2, 0) != splits.random(who, 0.2, 0.2, 1))

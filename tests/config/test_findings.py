"""Findings: present, absent or unlabeled."""

import numpy as np
import pytest

from cxrscale.config.findings import (
    ABSENT,
    NIH14,
    NO_FINDING,
    PRESENT,
    age_band,
    closed_world,
    has_no_finding,
    label_row,
)


def test_a_finding_that_is_not_listed_is_absent() -> None:
    states = closed_world(["Mass"], ("Mass", "Nodule"))
    assert states == {"Mass": PRESENT, "Nodule": ABSENT}


def test_no_finding_means_all_absent() -> None:
    states = closed_world([NO_FINDING], NIH14)
    assert set(states.values()) == {ABSENT}


def test_an_unknown_finding_is_named() -> None:
    with pytest.raises(ValueError, match="unknown finding 'Masses'; known ones: Mass"):
        closed_world(["Masses"], ("Mass",))


def test_unlabeled_is_nan_and_not_no_finding() -> None:
    row = label_row({"Mass": ABSENT}, ("Mass", "Nodule"))
    assert row[0] == 0
    assert np.isnan(row[1])
    assert has_no_finding(np.stack([row, np.zeros(2, dtype=np.float32)])).tolist() == [False, True]


def test_ages_are_grouped_into_bands() -> None:
    ages = [0, 18, 19, 40, 41, 60, 61, 80, 81, 115, None, np.nan, -1]
    expected = ["0-18"] * 2 + ["19-40"] * 2 + ["41-60"] * 2 + ["61-80"] * 2 + ["81+"] * 2 + ["unknown"] * 3
    assert age_band(np.array(ages, dtype=object)).tolist() == expected
    assert age_band(np.array([18.9, 30.0])).tolist() == ["0-18", "19-40"]

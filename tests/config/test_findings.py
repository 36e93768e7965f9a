"""Findings: present, absent, unlabeled."""

import numpy as np
import pytest

from cxrscale.config.findings import ABSENT, NIH14, NO_FINDING, PRESENT, closed_world, has_no_finding, label_row


def test_what_is_not_listed_is_absent() -> None:
    states = closed_world(["Mass"], ("Mass", "Nodule"))
    assert states == {"Mass": PRESENT, "Nodule": ABSENT}


def test_no_finding_is_all_absent() -> None:
    states = closed_world([NO_FINDING], NIH14)
    assert set(states.values()) == {ABSENT}


def test_an_unknown_finding_is_named() -> None:
    with pytest.raises(ValueError, match="'Masses' is none of Mass"):
        closed_world(["Masses"], ("Mass",))


def test_unlabeled_is_nan_and_never_no_finding() -> None:
    row = label_row({"Mass": ABSENT}, ("Mass", "Nodule"))
    assert row[0] == 0
    assert np.isnan(row[1])
    assert has_no_finding(np.stack([row, np.zeros(2, dtype=np.float32)])).tolist() == [False, True]

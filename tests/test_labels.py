"""Findings: present, absent, unlabelled."""

import numpy as np
import pytest

from cxrscale import labels


def test_what_is_not_listed_is_absent() -> None:
    states = labels.closed_world(["Mass"], ("Mass", "Nodule"))
    assert states == {"Mass": labels.PRESENT, "Nodule": labels.ABSENT}


def test_no_finding_is_all_absent() -> None:
    states = labels.closed_world([labels.NO_FINDING], labels.NIH14)
    assert set(states.values()) == {labels.ABSENT}


def test_an_unknown_finding_is_named() -> None:
    with pytest.raises(ValueError, match="'Masses' is none of Mass"):
        labels.closed_world(["Masses"], ("Mass",))


def test_unlabelled_is_nan_and_never_no_finding() -> None:
    row = labels.to_row({"Mass": labels.ABSENT}, ("Mass", "Nodule"))
    assert row[0] == 0
    assert np.isnan(row[1])
    assert labels.no_finding(np.stack([row, np.zeros(2, dtype=np.float32)])).tolist() == [False, True]

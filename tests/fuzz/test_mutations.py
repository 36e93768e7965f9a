"""Damaged files and tables are refused with a reason or read; no crash, no hang, and no damage passes a checksum."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fuzz.campaign import (
    CRASH,
    DEATH,
    HANG,
    OTHER,
    REFUSED,
    SAME,
    WARNED,
    Outcome,
    campaign,
    read_damaged,
    table,
)
from tests.fuzz.mutations import KINDS, mutated

RUNS = 60
SEED = 20


def test_damaged_inputs_are_refused_or_read() -> None:
    outcomes = campaign(list(KINDS), RUNS, SEED)
    print(table(outcomes))
    assert [outcome for outcome in outcomes if outcome.is_fault or outcome.status == WARNED] == []
    assert len(outcomes) == RUNS * len(KINDS)
    for kind in KINDS:  # harmless damage would prove nothing
        assert sum(outcome.status == REFUSED for outcome in outcomes if outcome.kind == kind) > RUNS / 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_is_the_same_damage(kind: str) -> None:
    inputs = [mutated(kind, SEED, number) for number in range(30)]
    assert inputs == [mutated(kind, SEED, number) for number in range(30)]
    assert len({data for _, data in inputs}) > 20
    assert {which for which, _ in inputs} == set(range(len(KINDS[kind].files())))


@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_inputs_are_read_unchanged(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for which, data in enumerate(KINDS[kind].files()):
        monkeypatch.setattr("tests.fuzz.campaign.mutated", lambda *_, which=which, data=data: (which, data))
        outcome = read_damaged(kind, 0, which, tmp_path)
        assert (outcome.status, outcome.message) == (SAME, "")


@pytest.mark.parametrize("kind", ["nih-labels", "nih-boxes", "siim-masks", "rsna-labels"])
def test_one_value_too_many_or_too_few_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any row: otherwise the values after it would be read into the wrong columns."""
    for which, data in enumerate(KINDS[kind].files()):
        lines = data.decode().splitlines()
        for number, line in enumerate(lines[:4]):
            # Trailing commas of some rows are not values.
            body = line.rstrip(",")
            cells, end = body.split(","), line[len(body) :]
            damaged = [[*cells[:at], "0", *cells[at:]] for at in range(len(cells) + 1)]
            damaged += [cells[:at] + cells[at + 1 :] for at in range(len(cells))]
            for row in damaged:
                table = "\n".join([*lines[:number], ",".join(row) + end, *lines[number + 1 :]]).encode()
                monkeypatch.setattr("tests.fuzz.campaign.mutated", lambda *_, which=which, table=table: (which, table))
                outcome = read_damaged(kind, 0, which, tmp_path)
                assert (outcome.status, row) == (REFUSED, row)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyError("x"), CRASH, "KeyError: \"'x'\" at test_mutations.py"),
        (UserWarning("y"), "warned", "UserWarning: y"),
        (ValueError("two\nlines"), CRASH, "ValueError"),
    ],
)
def test_any_other_exception_is_a_fault(
    error: Exception, status: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_damaged("png", 0, 0, tmp_path)  # so that the undamaged image is cached

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tests.fuzz.campaign.load_image", fails)
    outcome = read_damaged("png", 0, 0, tmp_path)
    assert outcome.status == status
    assert outcome.message.startswith(message)
    assert outcome.is_fault


def third_dies(kind: str, seed: int, number: int, _: Path) -> Outcome:
    if number == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Outcome(kind, seed, number, REFUSED)


def second_hangs(kind: str, seed: int, number: int, _: Path) -> Outcome:
    if number == 1:
        time.sleep(600)
    return Outcome(kind, seed, number, REFUSED)


def always_fails(*_: object) -> Outcome:
    raise LookupError("a bug in the campaign")


def test_a_death_is_counted_and_the_campaign_continues() -> None:
    outcomes = campaign(["png"], 4, SEED, attempt=third_dies)
    assert [outcome.status for outcome in outcomes] == [REFUSED, REFUSED, DEATH, REFUSED]
    assert outcomes[2].message == f"exit code {-signal.SIGSEGV}"


def test_a_hang_is_counted_and_the_campaign_continues() -> None:
    outcomes = campaign(["png"], 3, SEED, attempt=second_hangs, wall=3.0)
    assert [outcome.status for outcome in outcomes] == [REFUSED, HANG, REFUSED]


def test_a_bug_in_the_campaign_is_not_an_outcome() -> None:
    with pytest.raises(RuntimeError, match="a bug in the campaign"):
        campaign(["png"], 2, SEED, attempt=always_fails)


def test_what_counts_as_a_fault() -> None:
    assert Outcome("png", 0, 0, OTHER).is_fault
    assert not Outcome("jpeg", 0, 0, OTHER).is_fault
    assert Outcome("siim-masks", 0, 0, REFUSED, seconds=3.0).is_fault
    assert "png                  1        0        1" in table([Outcome("png", 0, 0, OTHER)])

"""Artifacts survive their JSON file, and a file that does not fit is one line with the field and the remedy."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cxrscale.io import Artifact, ArtifactPart, Number, read_artifact, storage, write_artifact
from cxrscale.types import UserError


class Bound(ArtifactPart):
    low: Number
    high: Number


class Sample(Artifact):
    schema_version: int = 2
    name: str
    """Documented."""
    auc: Number
    bounds: tuple[Bound, ...] = ()
    counts: Mapping[str, int] = {}


SAMPLE = Sample(name="a", auc=math.nan, bounds=(Bound(low=0.25, high=math.nan),), counts={"test": 3})
REMEDY = "run `cxrscale evaluate` again"


def message_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_artifact(Sample, str(path), REMEDY)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    assert text.endswith("; " + REMEDY)
    return text.removeprefix(str(path)).removesuffix("; " + REMEDY)


def test_an_artifact_survives_its_file_and_nan_is_null(tmp_path: Path) -> None:
    address = str(tmp_path / "folder" / "sample.json")
    write_artifact(address, SAMPLE)
    text = storage.read(address).decode()
    assert text.endswith("}\n")
    assert '\n  "schema_version": 2,\n' in text
    content = json.loads(text)
    assert content["auc"] is None
    assert content["bounds"] == [{"low": 0.25, "high": None}]
    again = read_artifact(Sample, address, REMEDY)
    assert math.isnan(again.auc)
    assert math.isnan(again.bounds[0].high)
    assert again.model_dump_json() == SAMPLE.model_dump_json()


def test_what_is_read_and_what_is_made_is_checked_and_frozen() -> None:
    with pytest.raises(ValidationError, match="infinity cannot be written as JSON"):
        Sample(name="a", auc=math.inf)
    with pytest.raises(ValidationError, match="frozen"):
        SAMPLE.name = "b"  # type: ignore[misc]
    assert Sample.model_fields["name"].description == "Documented."


def test_a_missing_file_and_broken_json_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    assert message_of(path) == " does not exist"
    path.write_text('{"name": "a",')
    assert message_of(path).startswith(" is not valid JSON (")
    path.write_bytes(b'"\xff"')
    assert message_of(path).startswith(" is not valid JSON (")
    path.write_text("[]")
    assert message_of(path) == " is not a JSON object"


GOOD = {"schema_version": 2, "name": "a", "auc": 0.5}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**GOOD, "extra": 1}, ": field extra is unknown"),
        ({"schema_version": 2, "name": "a"}, ": field auc is missing"),
        ({"schema_version": 2}, ": field name is missing (and 1 more)"),
        (
            {**GOOD, "auc": "x\ny"},
            r": field auc is 'x\ny': input should be a valid number, unable to parse string as a number",
        ),
        ({**GOOD, "auc": 1e999}, ": field auc is inf: infinity cannot be written as JSON"),
        ({**GOOD, "bounds": [{"low": 1}]}, ": field bounds.0.high is missing"),
        ({**GOOD, "counts": {"test": None}}, ": field counts.test is None: input should be a valid integer"),
        ({**GOOD, "schema_version": 1}, ": schema_version is 1, this version of cxrscale reads 2"),
        ({"name": "a", "auc": 0.5}, ": field schema_version is missing"),
    ],
)
def test_a_file_that_does_not_fit_names_the_field(tmp_path: Path, content: dict[str, Any], reason: str) -> None:
    path = tmp_path / "sample.json"
    path.write_text(json.dumps(content))
    assert message_of(path) == reason

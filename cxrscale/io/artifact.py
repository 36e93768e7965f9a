"""JSON files that one command writes and another reads: typed, frozen, with a schema version.

An artifact is a subclass of `Artifact`; its fields are its schema, and a nested object is an `ArtifactPart`:

    class Thresholds(Artifact):
        schema_version: int = 1
        threshold: Mapping[str, Number]

A file ends with the field `seal`, a digest of the file itself (see `io.seal`).

Raise `schema_version` when a field is renamed, removed or means something else: files of the version before are then
refused with one line instead of being misread.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from cxrscale.io import seal, storage
from cxrscale.types import UserError, one_line


def _null_to_nan(value: Any) -> Any:
    return math.nan if value is None else value


def _finite_or_nan(value: float) -> float:
    if math.isinf(value):
        raise ValueError("infinity cannot be written as JSON")
    return value


def _nan_to_null(value: float) -> float | None:
    return None if math.isnan(value) else value


Number = Annotated[
    float,
    BeforeValidator(_null_to_nan),
    AfterValidator(_finite_or_nan),
    PlainSerializer(_nan_to_null, return_type=float | None, when_used="json"),
]
"""A float that may be NaN (not defined for this data); JSON has no NaN, so the file holds null."""


class ArtifactPart(BaseModel):
    """A nested object of an artifact; the sentence under a field documents it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Artifact(ArtifactPart):
    """The content of one JSON file; subclasses give `schema_version` its default."""

    schema_version: int
    """Version of the fields of this kind of artifact; a file of another version is refused."""


Model = TypeVar("Model", bound=Artifact)


def encode_artifact(artifact: Artifact) -> bytes:
    """An artifact as sealed, indented JSON; NaN becomes null."""
    fields = artifact.model_dump_json(indent=2).removesuffix("\n}")
    return seal.close(f'{fields},\n  "{seal.FIELD}": "{seal.BLANK}"\n}}\n'.encode())


def write_artifact(address: str, artifact: Artifact) -> None:
    """Write what `encode_artifact` returns, atomically.

    Args:
        address: a local path or an fsspec address.
    """
    storage.write(address, encode_artifact(artifact))


def read_artifact(model: type[Model], address: str, remedy: str) -> Model:
    """Read what `write_artifact` wrote.

    Args:
        model: the artifact's class.
        address: a local path or an fsspec address.
        remedy: what the user can do when the file is missing or unusable: "run `cxrscale threshold RUN` again".

    Raises:
        UserError: the file is missing, is not JSON, has an unknown, missing or wrong field, or another schema version;
            or it does not fit its seal.
    """
    if not storage.exists(address):
        raise UserError(f"{address} does not exist; {remedy}")
    return decode_artifact(model, storage.read(address), address, remedy)


def decode_artifact(model: type[Model], data: bytes, address: str, remedy: str) -> Model:
    """The artifact in a file's bytes; the other arguments and the errors are those of `read_artifact`."""
    seal.check(data, address, f"{remedy}, or remove its field {seal.FIELD!r} where the change is meant")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise UserError(f"{address} is not valid JSON ({one_line(error, limit=120)}); {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{address} is not a JSON object; {remedy}")
    content.pop(seal.FIELD, None)
    expected = model.model_fields["schema_version"].default
    if "schema_version" not in content:
        raise UserError(f"{address}: field schema_version is missing; {remedy}")
    if content["schema_version"] != expected:
        raise UserError(
            f"{address}: schema_version is {content['schema_version']!r:.40}, this version of cxrscale reads "
            f"{expected}; {remedy}"
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{address}: {_first_error(error)}; {remedy}") from None


def _first_error(error: ValidationError) -> str:
    """The first thing that pydantic has against a file, in one line."""
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = {"missing": "is missing", "extra_forbidden": "is unknown"}.get(first["type"])
    if reason is None:
        message = first["msg"].removeprefix("Value error, ")
        value = one_line(repr(first["input"]))
        reason = f"is {value:.60}: {message[:1].lower()}{message[1:]}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"field {field} {reason}{more}"

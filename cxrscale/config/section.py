"""The base class of all sections of a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _one_or_more(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""One name or several; a single name `train` is read as `[train]`."""


class Section(BaseModel):
    """A frozen group of settings; the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

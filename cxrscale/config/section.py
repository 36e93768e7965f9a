"""The base class of all sections of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _one_or_more(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""One name or several; a single name `train` is read as `[train]`."""


MAX_SEED = 2**32 - 1
"""NumPy's and Optuna's generators take no larger seed."""
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


@dataclass(frozen=True)
class NotLearned:
    """Marks a field that does not change what is learned: a run may be resumed with another value of it."""


NOT_LEARNED = NotLearned()


class Section(BaseModel):
    """A frozen group of settings; the docstring under a field is its help text. No number is infinite or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    learned: ClassVar[bool] = True
    """Whether the section's fields change what is learned, but for those that are marked `NOT_LEARNED`."""

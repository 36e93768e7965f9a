"""Recipes of runs and searches: YAML whose last line is a seal."""

from __future__ import annotations

from typing import Any

from cxrscale import config
from cxrscale.io import seal, storage


def write_sealed_yaml(address: str, text: str) -> None:
    """Write the text and its seal, atomically."""
    storage.write(address, seal.closed_text(text))


def read_sealed_yaml(address: str) -> dict[str, Any]:
    """The content of a YAML file, which need not have a seal.

    Raises:
        UserError: it does not exist, is no YAML, or does not fit its seal.
    """
    remedy = "take it from a backup, or remove its last line where the change is meant"
    return config.read_yaml(seal.read(address, remedy), address)

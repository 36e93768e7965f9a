"""Files of tensors that others may have forged: nothing in them runs, and they take no more memory than their size."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cxrscale.io import seal


def load_tensors(content: bytes) -> Any:
    """What `torch.save` wrote: tensors and plain values, on the CPU.

    Raises:
        Exception: whatever the reader of pickles or archives raises for a damaged file.
        ValueError: it unpacks to more than its size, which `torch.save` never makes, or a tensor is no plain one; or
            it does not fit the seal that it carries.
    """
    if seal.is_intact(content) is False:
        raise ValueError("it does not fit the digest that it carries")
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > len(content):
            raise ValueError(f"{len(content):,} bytes that unpack to {unpacked:,}")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    for tensor in _tensors(state):
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device.type}")
        # One value with a stride of 0 can stand for a tensor of terabytes.
        if tensor.numel() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor of {tensor.numel():,} values in {tensor.untyped_storage().nbytes():,} bytes")
    return state


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)

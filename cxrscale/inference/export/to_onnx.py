"""A model in float32 as an ONNX file, or as a program of torch.export, for batches of any size."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from cxrscale.inference.export.rewriting import rewritten
from cxrscale.inference.export.runtime import sealed_onnx, sealed_program
from cxrscale.inference.export.session import INPUT, OUTPUT
from cxrscale.types import UserError, one_line

NOISY = ("torch.onnx", "onnxscript", "onnx_ir")
"""Loggers that report their progress as warnings."""


class _OneInput(nn.Module):
    """A model whose signature is one named tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(image_BCHW)
        return logits


def to_onnx(model: nn.Module, size: int) -> bytes:
    """The ONNX file of a model: input `image` (batch, 1, size, size), output `logits`, weights inside.

    Raises:
        UserError: onnx and onnxscript are not installed, or the model cannot be exported.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs both
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("exporting to ONNX needs onnx and onnxscript; install cxrscale[export]") from None
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _OneInput(model).eval(),
                (_example(size),),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:  # an exporter raises whatever an operator that it does not know leads to
            raise UserError(f"torch.onnx cannot export this model ({one_line(error, limit=200)})") from None
    assert program is not None
    return sealed_onnx(rewritten(program.model_proto.SerializeToString()))


def to_program(model: nn.Module, size: int) -> bytes:
    """The file of `torch.export.save`: one program for batches of any size.

    Raises:
        UserError: the model cannot be exported.
    """
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        try:
            shapes = {"image_BCHW": {0: torch.export.Dim("batch")}}
            program = torch.export.export(_OneInput(model).eval(), (_example(size),), dynamic_shapes=shapes)
        except Exception as error:
            raise UserError(f"torch.export cannot export this model ({one_line(error, limit=200)})") from None
        for node in program.graph.nodes:
            # It names files of this machine.
            node.meta.pop("stack_trace", None)
        torch.export.save(program, buffer)
    return sealed_program(buffer.getvalue())


def _example(size: int) -> torch.Tensor:
    # Of 2 images: with 1 the exporter would take the batch for a constant.
    return torch.zeros(2, 1, size, size)


@contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

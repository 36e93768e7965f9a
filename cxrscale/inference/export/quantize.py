"""ONNX models in 8 or 16 bits, by ONNX Runtime's quantizer; which nodes lose most is measured.

Weights are int8 per output channel, activations uint8, both static and dynamic. On a CPU without VNNI the products of
two neighbors are added in 16 bits and saturate where weights use all 8 bits, so weights get 7 (reduced range).
"""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cxrscale.inference.export.runtime import sealed_onnx
from cxrscale.inference.export.session import INPUT
from cxrscale.io import scratch

Method = Literal["minmax", "percentile"]
METHODS: tuple[Method, ...] = ("minmax", "percentile")
PERCENTILE = 99.99
"""Share of an activation's values that its range covers, in percent."""
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators with weights: where quantization pays and where it loses."""
MEASURED = 4
"""Images on which the loss of each node is measured: all activations are in memory."""
Images = Sequence[npt.NDArray[np.float32]]
"""(1, 1, H, W) each, as the model takes them."""


class StaticQuantizer:
    """Static quantization of one model with any of its nodes kept in float; the ranges are calibrated once."""

    def __init__(self, content: bytes, images: Images, folder: Path) -> None:
        """Args:
        content: the float32 ONNX file.
        images: training images.
        folder: for files of this quantizer alone; the caller removes it.
        """
        from onnxruntime.quantization.shape_inference import quant_pre_process

        self._folder, self._images = folder, images
        self._float = folder / "float.onnx"
        original = folder / "original.onnx"
        original.write_bytes(content)
        with _quiet():
            # Symbolic shapes are for transformers with several inputs; ONNX's own inference is enough.
            quant_pre_process(str(original), str(self._float), skip_symbolic_shape=True)

    def quantized(
        self, method: Method, keep: Sequence[str] = (), *, reduce_range: bool = True, out: Path | None = None
    ) -> bytes:
        """The quantized ONNX file.

        Args:
            method: how the ranges of activations are found.
            keep: names of nodes that stay in float.
            reduce_range: False is broken on CPUs without VNNI.
            out: keep the file here too.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        path = out or self._folder / "quantized.onnx"
        methods = {"minmax": CalibrationMethod.MinMax, "percentile": CalibrationMethod.Percentile}
        with _quiet():
            quantize_static(
                str(self._float),
                str(path),
                _Reader(self._images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=None,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(keep),
                calibrate_method=methods[method],
                # One image at a time: the outputs of all nodes are in memory.
                extra_options={"CalibPercentile": PERCENTILE, "CalibStridedMinMax": 1},
                calibration_cache_path=str(self._folder / f"{method}.json"),
            )
        return sealed_onnx(path.read_bytes())

    def nodes_by_loss(self, method: Method) -> list[str]:
        """Names of the nodes with weights, those that lose most first.

        A node's loss is that of its input or of its weights, whichever is worse: the ratio of signal to quantization
        noise, measured on training images with everything quantized.
        """
        from onnxruntime.quantization import qdq_loss_debug as debug

        quantized = self._folder / "all.onnx"
        self.quantized(method, out=quantized)
        with _quiet():
            weights = debug.compute_weight_error(debug.create_weight_matching(str(self._float), str(quantized)))
            found = {}
            for name, path in (("float", self._float), ("quantized", quantized)):
                augmented = self._folder / f"augmented-{name}.onnx"
                debug.modify_model_output_intermediate_tensors(str(path), str(augmented))
                found[name] = debug.collect_activations(str(augmented), _Reader(self._images[:MEASURED]))
                augmented.unlink()
            matched = debug.create_activation_matching(found["quantized"], found["float"])
            noise = {
                name: debug.compute_signal_to_quantization_noice_ratio(one["pre_qdq"], one["post_qdq"])
                for name, one in matched.items()
            }
        loss = {}
        for name, inputs in self._heavy_nodes():
            known = [ratio for one in inputs for ratio in (noise.get(one), weights.get(one)) if ratio is not None]
            loss[name] = min(known, default=float("inf"))
        return sorted(loss, key=lambda name: loss[name])

    def _heavy_nodes(self) -> Iterator[tuple[str, list[str]]]:
        """(name, names of its inputs) of each node with weights."""
        import onnx

        for node in onnx.load(str(self._float)).graph.node:
            if node.op_type in HEAVY:
                yield node.name, list(node.input)


def dynamic(content: bytes) -> bytes:
    """Weights in int8, activations quantized as they come: the float32 ONNX file as a quantized one.

    Weights are uint8 around a zero point: ONNX Runtime has no integer convolution of signed weights on a CPU.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory(dir=scratch.shared()) as name, _quiet():
        original, ready, out = (Path(name, one) for one in ("original.onnx", "ready.onnx", "quantized.onnx"))
        original.write_bytes(content)
        quant_pre_process(str(original), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(out), per_channel=True, reduce_range=True, weight_type=QuantType.QUInt8)
        return sealed_onnx(out.read_bytes())


def half(content: bytes) -> bytes:
    """The float32 ONNX file with weights and arithmetic in fp16; input and output stay float32."""
    import onnx
    from onnxruntime.transformers import float16

    with _quiet():
        converted = float16.convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True)
    return sealed_onnx(converted.SerializeToString())


class _Reader:
    """What ONNX Runtime reads calibration images from, one at a time."""

    def __init__(self, images: Images) -> None:
        self._images, self._next, self._end = images, 0, len(images)

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give the images of this range next."""
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Any] | None:
        """The next image; None after the last."""
        if self._next >= self._end:
            return None
        self._next += 1
        return {INPUT: self._images[self._next - 1]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter({INPUT: image} for image in self._images)


@contextmanager
def _quiet() -> Iterator[None]:
    """ONNX Runtime's quantizer prints, and logs to the root logger, what its user cannot change."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        root.setLevel(level)

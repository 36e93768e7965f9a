"""The same graph with less to compute: what ONNX Runtime's own optimizer leaves of a UNet.

A 3 x 3 convolution of an image that was doubled by its nearest pixels sees each pixel twice or more. Its weights that
meet the same pixel are added up beforehand, for each of the four pixels of the doubled image that one pixel becomes:
four 2 x 2 convolutions of the small image, 16 products instead of 36.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FEWEST = 64
"""Channels of the doubled image below which putting the four pixels side by side costs more than it saves."""


def rewritten(content: bytes) -> bytes:
    """The ONNX file with fixed factors of enlargement, and convolutions of doubled images as described above.

    Its outputs differ by rounding alone.
    """
    import onnx

    graph = _Graph(onnx.shape_inference.infer_shapes(onnx.load_from_string(content)))
    graph.fix_factors()
    graph.fold_doubled()
    return graph.cleaned()


class _Graph:
    """A model of one graph whose nodes are replaced."""

    def __init__(self, model: Any) -> None:
        self._model, self._graph = model, model.graph
        self._weights = {one.name: one for one in self._graph.initializer}
        self._shapes = {
            one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim]
            for one in (*self._graph.value_info, *self._graph.input, *self._graph.output)
        }

    def fix_factors(self) -> None:
        """Enlarge by constant factors, not to a size that is computed: only then the layout of convolutions is kept."""
        for node in self._graph.node:
            if node.op_type != "Resize" or len(node.input) < 4:
                continue
            before, after = (self._shapes.get(name, []) for name in (node.input[0], node.output[0]))
            known = len(before) == len(after) == 4 and all((*before[2:], *after[2:]))
            if known and not any(b % a for a, b in zip(before[2:], after[2:], strict=True)):
                factors = [1, 1, after[2] // before[2], after[3] // before[3]]
                name = self._add(f"{node.output[0]}_factors", np.array(factors, np.float32))
                del node.input[2:]
                node.input.append(name)

    def fold_doubled(self) -> None:
        """Replace convolutions of doubled images, alone or in front of other channels."""
        makers = {name: node for node in self._graph.node for name in node.output}
        for conv in [node for node in self._graph.node if self._is_plain(node)]:
            source, others = makers.get(conv.input[0]), list[str]()
            if source is not None and source.op_type == "Concat" and _attributes(source)["axis"] == 1:
                others = list(source.input[1:])
                source = makers.get(source.input[0])
            if source is not None and self._is_doubled(source):
                self._fold(conv, source, others)

    def cleaned(self) -> bytes:
        """The model's bytes without what nothing uses any more, its nodes in order."""
        outputs = {one.name for one in self._graph.output}
        while True:
            used = outputs | {name for node in self._graph.node for name in node.input}
            idle = [node for node in self._graph.node if used.isdisjoint(node.output)]
            if not idle:
                break
            for node in idle:
                self._graph.node.remove(node)
        for one in [one for one in self._graph.initializer if one.name not in used]:
            self._graph.initializer.remove(one)
        # Shapes are inferred anew by whoever needs them: those of removed nodes are of nothing.
        del self._graph.value_info[:]
        content: bytes = self._model.SerializeToString()
        return content

    def _is_plain(self, node: Any) -> bool:
        """Whether it is a 3 x 3 convolution of all channels that keeps the size."""
        if node.op_type != "Conv" or self._shape(node.input[1])[2:] != [3, 3]:
            return False
        plain = {"group": 1, "strides": [1, 1], "dilations": [1, 1], "pads": [1] * 4, "auto_pad": b"NOTSET"}
        own = plain | {"pads": [0] * 4} | _attributes(node)
        return all(own[name] == value for name, value in plain.items())

    def _is_doubled(self, node: Any) -> bool:
        """Whether it repeats each pixel of at least `FEWEST` channels twice in each direction."""
        if node.op_type != "Resize" or len(node.input) != 3 or node.input[2] not in self._weights:
            return False
        from onnx import numpy_helper

        own, shape = _attributes(node), self._shapes.get(node.input[0], [])
        nearest = (own.get("mode"), own.get("coordinate_transformation_mode"), own.get("nearest_mode"))
        factors = numpy_helper.to_array(self._weights[node.input[2]]).tolist()
        enough = len(shape) == 4 and shape[1] >= FEWEST
        return enough and nearest == (b"nearest", b"asymmetric", b"floor") and factors == [1, 1, 2, 2]

    def _fold(self, conv: Any, doubled: Any, others: list[str]) -> None:
        from onnx import helper, numpy_helper

        out, channels = conv.output[0], self._shapes[doubled.input[0]][1]
        weight_OIKK = numpy_helper.to_array(self._weights[conv.input[1]])
        zero_O = self._add(f"{out}_zero", np.zeros(len(weight_OIKK), np.float32))
        # Where there are other channels, their convolution adds the bias.
        bias, nodes, parts = list(conv.input[2:]), list[Any](), list[str]()
        for row in (0, 1):
            for column in (0, 1):
                part = f"{out}_{row}{column}"
                folded = _folded(_folded(weight_OIKK[:, :channels].astype(np.float64), 2, row), 3, column)
                weight = self._add(f"{part}_weight", folded.astype(np.float32))
                inputs = [doubled.input[0], weight, *([zero_O] if others else bias)]
                pads = [1 - row, 1 - column, row, column]
                nodes.append(helper.make_node("Conv", inputs, [part], name=part, kernel_shape=[2, 2], pads=pads))
                parts.append(part)
        joined, whole = f"{out}_parts", f"{out}_doubled" if others else out
        nodes.append(helper.make_node("Concat", parts, [joined], name=joined, axis=1))
        nodes.append(helper.make_node("DepthToSpace", [joined], [whole], name=whole, blocksize=2, mode="DCR"))
        if others:
            rest = others[0] if len(others) == 1 else f"{out}_rest"
            if len(others) > 1:
                nodes.append(helper.make_node("Concat", others, [rest], name=rest, axis=1))
            weight = self._add(f"{out}_rest_weight", np.ascontiguousarray(weight_OIKK[:, channels:]))
            own, size = f"{out}_own", {"kernel_shape": [3, 3], "pads": [1] * 4}
            nodes.append(helper.make_node("Conv", [rest, weight, *bias], [own], name=own, **size))
            nodes.append(helper.make_node("Add", [own, whole], [out], name=out))
        at = list(self._graph.node).index(conv)
        self._graph.node.remove(conv)
        for node in reversed(nodes):
            self._graph.node.insert(at, node)

    def _shape(self, name: str) -> list[int]:
        return list(self._weights[name].dims) if name in self._weights else []

    def _add(self, name: str, value: npt.NDArray[np.float32]) -> str:
        from onnx import numpy_helper

        self._graph.initializer.append(numpy_helper.from_array(value, name))
        self._weights[name] = self._graph.initializer[-1]
        return name


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _folded(weight: npt.NDArray[np.float64], axis: int, odd: int) -> npt.NDArray[np.float64]:
    """Three weights along an axis as the two that the even or odd pixels of the doubled image need."""
    first, middle, last = np.split(weight, 3, axis)
    pair = (first + middle, last) if odd else (first, middle + last)
    return np.concatenate(pair, axis)

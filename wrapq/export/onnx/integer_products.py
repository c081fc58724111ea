"""Products of integers, written so that onnxruntime knows them.

It multiplies integers where it sees a weight [K, N] and an input that are dequantized for that product alone. In what
torch traces, weights are [N, K] and transposed, and layers that read one tensor share its quantization.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from wrapq.export.onnx.packed_weights import add_initializer, drop_unused, turned_weight

_AXES = (1, 0, 2, -1, -2, -3)
"""An axis means nothing where one scale is for all, but with another one onnxruntime does not merge equal nodes."""


def separate(model: ir.Model) -> None:
    """Turn the weights of products, and give each product of integers an input of its own."""
    graph = model.graph
    taken: dict[Any, int] = {}
    for node in list(graph):
        if node.op_type != "MatMul" or (weight := turned_weight(node.inputs[1])) is None:
            continue
        _turn(graph, node, weight)
        point = _producer(node.inputs[0], "DequantizeLinear")
        if point is not None and _has_one_scale(point) and _producer(point.inputs[0], "QuantizeLinear") is not None:
            taken[point] = taken.get(point, -1) + 1
            if taken[point]:
                _repeat(graph, node, point, taken[point])
    drop_unused(graph)


def _has_one_scale(point: Any) -> bool:
    shape = point.inputs[1].shape
    return shape is not None and len(shape) == 0


def _producer(value: Any, kind: str) -> Any:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _turn(graph: ir.Graph, node: Any, weight: Any) -> None:
    """Let `node`, a product by the transpose of `weight`, read integers that are transposed already."""
    codes, *parts = weight.inputs
    attributes = {name: attribute.as_int() for name, attribute in weight.attributes.items()}

    def turned(each: Any) -> ir.Value:
        values = np.ascontiguousarray(each.const_value.numpy().T)
        return add_initializer(graph, f"{each.name}_turned", values, each.dtype)

    if attributes.get("block_size"):
        parts = [turned(each) for each in parts]
    attributes["axis"] = 1 - attributes.get("axis", 1) % 2
    made = ir.node("DequantizeLinear", [turned(codes), *parts], attributes, name=f"{node.name}_weight")
    _describe(made, weight, reversed(weight.outputs[0].shape))
    graph.insert_before(node, made)
    node.replace_input_with(1, made.outputs[0])


def _repeat(graph: ir.Graph, node: Any, point: Any, number: int) -> None:
    """Let `node` read a quantization of its own of what `point` dequantizes."""
    source, axis = point.inputs[0].producer(), {"axis": _AXES[number % len(_AXES)]}
    quantize = ir.node("QuantizeLinear", source.inputs, axis, name=f"{node.name}_quantize")
    _describe(quantize, source, source.outputs[0].shape)
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *point.inputs[1:]], axis, name=f"{node.name}_input")
    _describe(dequantize, point, point.outputs[0].shape)
    graph.insert_before(node, [quantize, dequantize])
    node.replace_input_with(0, dequantize.outputs[0])


def _describe(made: Any, like: Any, shape: Any) -> None:
    (output,) = made.outputs
    output.name, output.dtype = f"{made.name}_output", like.outputs[0].dtype
    output.shape = None if shape is None else ir.Shape(list(shape))

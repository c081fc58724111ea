"""Products of integers, written so that onnxruntime knows them.

It multiplies integers where it sees a weight [K, N] and an input that are dequantized for that product alone. In what
torch traces, weights are [N, K] and transposed, and layers that read one tensor share its quantization.

Where ranges are found as tokens come, it has to be told: with codes q, zero points z and scales s of each token, and
integers W [K, N] of the weight and their scales t of each output, `(q - z) s W t = (q W - z sum(W)) s t`.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from wrapq.export.onnx.packed_weights import add_initializer, drop_unused, turned_weight
from wrapq.export.onnx.translations import TYPES

_BYTE = ir.DataType.UINT8
_AXES = (1, 0, 2, -1, -2, -3)
"""An axis means nothing where one scale is for all, but with another one onnxruntime does not merge equal nodes."""


def separate(model: ir.Model, outright: bool = True) -> None:
    """Turn the weights of products, and give each product of integers an input of its own; where ranges are found as
    tokens come, say `outright` that integers are multiplied."""
    graph = model.graph
    taken: dict[Any, int] = {}
    products: list[Any] = [node for node in graph if node.op_type == "MatMul"]
    for node in products:
        if (weight := turned_weight(node.inputs[1])) is None:
            continue
        _turn(graph, node, weight)
        found = _codes_of_tokens(node.inputs[0]) if outright and _multiplies_bytes(node.inputs[1].producer()) else None
        if found is not None:
            _multiply(graph, node, *found)
            continue
        point = _producer(node.inputs[0], "DequantizeLinear")
        if point is not None and _has_one_scale(point) and _is_quantized_to_integers(point.inputs[0]):
            taken[point] = taken.get(point, -1) + 1
            if taken[point]:
                _repeat(graph, node, point, taken[point])
    drop_unused(graph)


def _has_one_scale(point: Any) -> bool:
    shape = point.inputs[1].shape
    return shape is not None and len(shape) == 0


def _is_quantized_to_integers(value: Any) -> bool:
    return _producer(value, "QuantizeLinear") is not None and value.dtype in chain(*TYPES.values())


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


def _codes_of_tokens(value: Any) -> tuple[Any, Any, Any] | None:
    """The codes in a byte each of what ranges of its own dequantize, the zero point, None where it is zero for all, and
    the scale, both for each row of `value`."""
    product: Any = _producer(value, "Mul")
    steps: Any = None if product is None else _producer(product.inputs[0], "Sub")
    cast: Any = None if steps is None else _producer(steps.inputs[0], "Cast")
    if cast is None or _producer(cast.inputs[0], "Cast") is None or cast.inputs[0].dtype not in TYPES[8]:
        return None
    zero, scale = steps.inputs[1], product.inputs[1]
    by_row = scale.shape is not None and len(scale.shape) == len(value.shape or ()) and scale.shape[-1] == 1
    return (cast.inputs[0], None if _is_zero(zero) else zero, scale) if by_row else None


def _is_zero(value: Any) -> bool:
    """Whether a zero point was made as nought times a scale."""
    node: Any = value.producer()
    while node is not None and node.op_type in ("Cast", "Unsqueeze"):
        node = node.inputs[0].producer()
    constant = None if node is None or node.op_type != "Mul" else ir.convenience.get_const_tensor(node.inputs[1])
    return constant is not None and not constant.numpy().any()


def _multiplies_bytes(weight: Any) -> bool:
    codes, scale, *zero = weight.inputs
    whole = not weight.attributes["block_size"].as_int() if "block_size" in weight.attributes else True
    outputs = weight.attributes["axis"].as_int() == 1 or scale.const_value.numpy().size == 1
    return whole and outputs and codes.dtype in TYPES[8] and not zero[0].const_value.numpy().any()


def _multiply(graph: ir.Graph, node: Any, codes: Any, zero: Any, scale: Any) -> None:
    """`node` as a product of integers."""
    weight = node.inputs[1].producer()
    integers, by_output = weight.inputs[:2]
    float32, signed = ir.DataType.FLOAT, codes.dtype == ir.DataType.INT8
    add = _Adder(graph, node)
    inputs = [codes, integers]
    if signed:  # onnxruntime's product of two signed ones is several times slower
        middle = [add_initializer(graph, f"middle_{kind.name}", np.array(128), kind) for kind in (float32, _BYTE)]
        inputs = [
            add("Cast", [add("Add", [add("Cast", [codes], float32), middle[0]], float32)], _BYTE),
            integers,
            middle[1],
        ]
    total = add("Cast", [add("MatMulInteger", inputs, ir.DataType.INT32)], float32)
    if zero is not None:
        sums = integers.const_value.numpy().astype(np.float32).sum(0)
        moved = add("Mul", [zero, add_initializer(graph, f"{integers.name}_sums", sums, float32)], float32)
        total = add("Sub", [total, moved], float32)
    result = add("Mul", [add("Mul", [total, scale], float32), by_output], float32)
    result.shape, result.name = node.outputs[0].shape, node.outputs[0].name
    node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Adder:
    """Adds nodes before one of a graph, named after it."""

    def __init__(self, graph: ir.Graph, node: Any) -> None:
        self.graph, self.node, self.count = graph, node, 0

    def __call__(self, kind: str, inputs: list[Any], dtype: ir.DataType) -> Any:
        attributes = {"to": int(dtype)} if kind == "Cast" else {}
        made = ir.node(kind, inputs, attributes, name=f"{self.node.name}_{self.count}")
        made.outputs[0].name, made.outputs[0].dtype = f"{made.name}_output", dtype
        self.graph.insert_before(self.node, made)
        self.count += 1
        return made.outputs[0]


def _describe(made: Any, like: Any, shape: Any) -> None:
    (output,) = made.outputs
    output.name, output.dtype = f"{made.name}_output", like.outputs[0].dtype
    output.shape = None if shape is None else ir.Shape(list(shape))

"""Weights of an ONNX model in as few bits as ONNX has for them.

torch traces the integers of a weight one to a byte, or two, and casts them to their type as the model runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from wrapq.export.onnx.translations import FLOATS, TYPES

DOMAIN = "com.microsoft"
"""Of the operators that onnxruntime has beside ONNX's, and OpenVINO too."""
_LEAST_BLOCK = 16
"""The smallest group that `MatMulNBits` takes; it takes powers of two."""


def pack(model: ir.Model) -> None:
    """Make the integers of weights as small as ONNX has them, and products by weights in groups `MatMulNBits`."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Cast" and _is_integer(node.attributes["to"].as_int()):
            _retype(graph, node)
    for node in list(graph):
        if node.op_type == "MatMul" and (weight := _weight_in_groups(node.inputs[1])) is not None:
            _multiply_packed(model, node, weight)
        elif node.op_type == "Gather" and _is_float(node.inputs[0]):
            _gather_bytes(graph, node)
    drop_unused(graph)
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports[DOMAIN] = 1


def _is_integer(kind: int) -> bool:
    return any(kind in pair for pair in TYPES.values())


def _retype(graph: ir.Graph, node: Any) -> None:
    """Cast the codes of a weight, and zero points, here and now. Codes that are gathered from a table stay in it as
    they are: a Cast to 4 bits is none that runtimes have."""
    source, result, kind = node.inputs[0], node.outputs[0], ir.DataType(node.attributes["to"].as_int())
    if source.const_value is not None:
        made = add_initializer(graph, f"{source.name}_{kind.name.lower()}", source.const_value.numpy(), kind)
        result.replace_all_uses_with(made)
    elif kind in TYPES[4]:
        wide = TYPES[8][TYPES[4].index(kind)]
        node.attributes["to"] = ir.AttrInt64("to", int(wide))
        result.dtype = wide


def _is_float(value: Any) -> bool:
    """Whether `value` is floats of 8 bits."""
    return value.dtype in FLOATS


def _gather_bytes(graph: ir.Graph, node: Any) -> None:
    """Let `node` take rows of a table of floats of 8 bits as bytes, which are looked up: onnxruntime gathers no such
    floats."""
    table, indices = node.inputs
    kind, name = table.dtype, table.name
    codes = table.const_value.numpy().view(np.uint8)
    numbers = np.arange(256, dtype=np.uint8).view(kind.numpy()).astype(np.float32)
    rows = ir.node("Gather", [add_initializer(graph, f"{name}_bytes", codes, TYPES[8][1]), indices], node.attributes)
    places = ir.node("Cast", rows.outputs, {"to": int(ir.DataType.INT32)})
    floats = add_initializer(graph, f"numbers_{kind.name.lower()}", numbers, ir.DataType.FLOAT)
    looked_up = ir.node("Gather", [floats, *places.outputs])
    made = ir.node("Cast", looked_up.outputs, {"to": int(kind)})
    made.outputs[0].shape, made.outputs[0].dtype = node.outputs[0].shape, kind
    graph.insert_before(node, [rows, places, looked_up, made])
    node.outputs[0].replace_all_uses_with(made.outputs[0])
    graph.remove(node, safe=True)


def add_initializer(graph: ir.Graph, name: str, values: np.ndarray, kind: ir.DataType) -> ir.Value:
    """The initializer called `name`, which is made of `values` where there is none."""
    if name not in graph.initializers:
        tensor = ir.tensor(values.astype(kind.numpy()), dtype=kind, name=name)
        shape = ir.Shape(values.shape)
        graph.register_initializer(ir.Value(name=name, type=ir.TensorType(kind), shape=shape, const_value=tensor))
    return graph.initializers[name]


def turned_weight(value: Any) -> Any:
    """The DequantizeLinear of a weight [N, K] whose transpose `value` is."""
    turned = value.producer()
    node = turned.inputs[0].producer() if turned is not None and turned.op_type == "Transpose" else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    return node if all(each is not None and each.const_value is not None for each in node.inputs) else None


def _weight_in_groups(value: Any) -> Any:
    """As `turned_weight`, if the weight is in groups that `MatMulNBits` takes."""
    node = turned_weight(value)
    size = node.attributes["block_size"].as_int() if node is not None and "block_size" in node.attributes else 0
    fits = size >= _LEAST_BLOCK and size & (size - 1) == 0 and node.inputs[0].dtype in (*TYPES[4], *TYPES[8])
    return node if fits else None


def _multiply_packed(model: ir.Model, node: Any, weight: Any) -> None:
    """`node`, a product by the transpose of `weight`, as `MatMulNBits`."""
    graph, size = model.graph, weight.attributes["block_size"].as_int()
    codes, scale, zero = (each.const_value for each in weight.inputs)
    bits = 4 if codes.dtype in TYPES[4] else 8
    middle = 1 << (bits - 1)
    shift = middle if codes.dtype in (ir.DataType.INT4, ir.DataType.INT8) else 0
    integers, zeros = (each.numpy().astype(np.int32) + shift for each in (codes, zero))
    (rows, columns), name = integers.shape, weight.inputs[0].name
    packed = _packed(integers.reshape(rows, columns // size, size), bits)
    inputs = [
        node.inputs[0],
        add_initializer(graph, f"{name}_packed", packed, ir.DataType.UINT8),
        add_initializer(graph, f"{name}_scale", scale.numpy().reshape(-1), ir.DataType.FLOAT),
    ]
    if (zeros != middle).any():
        inputs.append(add_initializer(graph, f"{name}_zero", _packed(zeros, bits).reshape(-1), ir.DataType.UINT8))
    attributes = {"K": columns, "N": rows, "bits": bits, "block_size": size}
    made = ir.node("MatMulNBits", inputs, attributes, domain=DOMAIN, name=f"{node.name}_nbits")
    made.outputs[0].shape, made.outputs[0].dtype = node.outputs[0].shape, node.outputs[0].dtype
    made.outputs[0].name = node.outputs[0].name
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _packed(integers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned `integers` [..., K] in bytes, the first in the low bits."""
    values = integers.astype(np.uint8)
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros((*values.shape[:-1], 1), np.uint8)], -1)
    return values[..., 0::2] | values[..., 1::2] << 4


def drop_unused(graph: ir.Graph) -> None:
    """Remove what no output depends on."""
    for node in reversed(list(graph)):
        if not any(each.uses() or each.is_graph_output() for each in node.outputs):
            graph.remove(node, safe=True)
    unused = (name for name, each in graph.initializers.items() if not each.uses() and not each.is_graph_output())
    for name in list(unused):
        del graph.initializers[name]

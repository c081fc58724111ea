"""What vLLM does not run, or runs otherwise, although compressed-tensors can say it.

The rules were read in vLLM 0.33.0, under `vllm/model_executor`:
- `layers/quantization/compressed_tensors/compressed_tensors.py`: `_get_scheme_from_parts` chooses a scheme by the
  arguments and the format of a layer, `get_quant_method` takes the output layer only where a target names it (its class
  is no `Linear`), and `validate_kv_cache_scheme` says which caches there are;
- its `schemes/`: what each scheme reads of a checkpoint, and what it does with layers fused into one: `_wNa16` (2 to 8
  bits, any group), `_wNa8` and `_wNa4` (packed, inputs symmetric and dynamic), `_w4a8_fp8` (Hopper, groups of 128),
  `_w8a8_int8`, `_w8a8_fp8`, `_w8a16_fp8`, `_w4a4_nvfp4`, `_w4a4_mxfp4`, `_w8a8_mxfp8`;
- its `transform/linear.py`: of a rotated layer it demands that there be no bias, and it looks for linear layers alone;
- its `utils.py`: `should_ignore_layer` and `find_matched_target`, for which fused layers have one scheme or none;
- `layers/quantization/utils/fp8_utils.py`: `validate_fp8_block_shape`, `process_fp8_weight_tensor_strategy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from wrapq.export.scheme import MXFP4, MXFP8, NVFP4, PACK, Args, Scheme
from wrapq.graph.mixtures import EXPERT_NAME
from wrapq.wrappers.fused_layers import FUSED, siblings

_INPUT_BITS = (4, 8)
_FP8_GROUP = 128


def linear_refusal(scheme: Scheme) -> str | None:
    """Why vLLM does not run a linear layer with `scheme`, or None."""
    weights, inputs = scheme.weights, scheme.inputs
    if weights["type"] == "int":
        return None if inputs is None else _integer_refusal(scheme, weights, inputs)
    return _microscaled_refusal(scheme.format, inputs) if scheme.half_only else _float_refusal(weights, inputs)


def linear_note(scheme: Scheme) -> str | None:
    """What vLLM does otherwise with a linear layer, or where it runs it only; None where there is nothing to say."""
    weights, inputs = scheme.weights, scheme.inputs
    if scheme.format == PACK and inputs is not None and inputs["type"] == "float":
        return "vLLM runs 4-bit weights with fp8 inputs on Hopper GPUs only"
    if scheme.format == PACK and (inputs is not None or weights["num_bits"] not in (4, 8)):
        return f"vLLM runs {describe(scheme).removeprefix('is ')} on CUDA only, by its Humming kernel"
    if scheme.format == MXFP4 and inputs is None:
        return "vLLM quantizes the inputs of MXFP4 weights too on Blackwell GPUs"
    if scheme.format == MXFP4 and _is_mx(inputs, 4):
        return "vLLM leaves the inputs of MXFP4 weights float on other GPUs than Blackwell"
    if scheme.format == MXFP8 and inputs is None:
        return "vLLM quantizes the inputs of MXFP8 weights too"
    if weights["type"] == "float" and weights["strategy"] == "tensor":
        return "vLLM rounds fp8 weights of fused layers again, to the largest of their scales"
    return None


def rotation_refusal(name: str, outside: bool, biased: bool) -> str | None:
    """Why vLLM does not rotate the input of a linear layer at each forward, or None; `outside` is one in no block."""
    if outside:
        return "vLLM does not rotate the input of a layer that is in no block, such as the output layer"
    if EXPERT_NAME.fullmatch(name):
        return "vLLM does not rotate the inputs of experts"
    return "vLLM does not rotate the input of a layer that has a bias" if biased else None


def cache_refusal(arguments: Args) -> str | None:
    """Why vLLM does not keep its cache so, or None."""
    known = (arguments["type"], arguments["num_bits"]) == ("float", 8)
    return None if known else "vLLM's quantized cache is fp8_e4m3, with one scale by tensor or head"


def fusion_refusals(schemes: Mapping[str, Scheme | None], rows: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """For each set of layers that vLLM fuses and that differ here: where, and what differs; nor may a block run into
    the next layer. `schemes` has None for the float linear layers, `rows` the outputs of the quantized ones."""
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for parts in FUSED:
            found = {part: schemes[name] for part in parts if (name := f"{parent}.{part}") in schemes}
            if len({scheme.key if scheme else "" for scheme in found.values()}) > 1:
                specs = ", ".join(f"{part} {describe(scheme)}" for part, scheme in found.items())
                yield parent, f"vLLM runs {_listed(list(found))} as one layer, which needs one spec, but {specs}"
            elif ragged := [part for part in [*found][:-1] if _is_ragged(found[part], rows.get(f"{parent}.{part}", 0))]:
                yield parent, f"vLLM runs {_listed(list(found))} as one layer, and a block of {ragged[0]} is not whole"


def unequal_global_scales(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong in a checkpoint of which vLLM reads one NVFP4 global scale for layers that have several."""
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if not kind.endswith("_global_scale"):
            continue
        others = (f"{sibling}.{kind}" for sibling in siblings(layer))
        if different := [other for other in others if other in tensors and not torch.equal(tensors[other], tensor)]:
            yield f"vLLM runs {layer} and {different[0].rpartition('.')[0]} as one layer, but their {kind} differ"


def _is_ragged(scheme: Scheme | None, rows: int) -> bool:
    weights = {} if scheme is None else scheme.weights
    return weights.get("strategy") == "block" and rows % weights["block_structure"][0] != 0


def describe(scheme: Scheme | None) -> str:
    """The scheme in a few words, for messages."""
    if scheme is None:
        return "is float"
    inputs = f" with {words(scheme.inputs)} inputs" if scheme.inputs else ""
    return f"is {words(scheme.weights)}{inputs}"


def words(arguments: Args) -> str:
    """`QuantizationArgs` in a few words."""
    size = f" of {arguments['group_size']}" if "group_size" in arguments else ""
    kind = "" if arguments["symmetric"] else " asymmetric"
    return f"{arguments['num_bits']}-bit{kind} by {arguments['strategy']}{size}"


def _integer_refusal(scheme: Scheme, weights: Args, inputs: Args) -> str | None:
    if inputs["type"] == "float":
        known = (weights["num_bits"], weights.get("group_size")) == (4, _FP8_GROUP) and weights["symmetric"]
        if known and inputs["num_bits"] == 8 and inputs["dynamic"] and inputs["strategy"] == "token":
            return None
        what = f"int4 weights that are symmetric by g{_FP8_GROUP}, by token with dynamic ranges"
        return f"vLLM takes fp8 inputs with {what}"
    if scheme.format == PACK:
        known = inputs["num_bits"] in _INPUT_BITS and inputs["symmetric"] and inputs["dynamic"]
        if known and inputs["strategy"] in ("token", "group"):
            return None
        return "vLLM takes integer inputs of packed weights with 4 or 8 bits, symmetric, by token or group, dynamic"
    strategy = "token" if inputs["dynamic"] else "tensor"
    if inputs["num_bits"] != 8 or inputs["strategy"] != strategy:
        return "vLLM takes integer inputs of 8 bits, by tensor with fixed ranges or by token with dynamic ones"
    if not weights["symmetric"]:
        return "vLLM needs symmetric weights where inputs are integers"
    if weights["num_bits"] != 8 or weights["strategy"] not in ("tensor", "channel"):
        return "vLLM runs integer inputs with weights of 8 bits by tensor or channel, or of fewer with dynamic inputs"
    return None


def _float_refusal(weights: Args, inputs: Args | None) -> str | None:
    if weights["strategy"] not in ("tensor", "channel", "block"):
        return "vLLM takes fp8 weights by tensor, channel or block"
    if inputs is None:
        return None
    if inputs["type"] != "float" or inputs["num_bits"] != 8:
        return "vLLM multiplies fp8 weights with fp8 inputs"
    if not inputs["dynamic"] and (inputs["strategy"] != "tensor" or weights["strategy"] == "block"):
        return "vLLM takes fixed fp8 ranges of inputs by tensor, and none with weights in blocks"
    if weights["strategy"] == "block":
        known = inputs.get("group_size") == weights["block_structure"][0]
        return None if known else "vLLM takes weights in blocks with dynamic inputs in groups as wide as a block"
    if inputs["dynamic"] and inputs["strategy"] != "token":
        return "vLLM scales dynamic fp8 inputs by token"
    return None


def _microscaled_refusal(form: str, inputs: Args | None) -> str | None:
    if inputs is None:
        return None
    if form == NVFP4:
        known = (inputs["strategy"], inputs["dynamic"]) == ("tensor_group", "local")
        return None if known else "vLLM takes NVFP4 weights with float inputs or with nvfp4:local ones"
    if form == MXFP8:
        return None if _is_mx(inputs, 8) else "vLLM takes MXFP8 weights with dynamic MXFP8 inputs"
    fp8 = inputs["type"] == "float" and inputs["num_bits"] == 8 and inputs["dynamic"]
    if _is_mx(inputs, 4) or (fp8 and inputs["strategy"] in ("token", "group")):
        return None
    return "vLLM takes MXFP4 weights with float inputs, dynamic MXFP4 ones or dynamic fp8 ones by token or group"


def _is_mx(inputs: Args | None, bits: int) -> bool:
    return inputs is not None and inputs["num_bits"] == bits and inputs.get("scale_dtype") == "torch.uint8"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

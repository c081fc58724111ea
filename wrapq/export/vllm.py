"""What vLLM does not run although compressed-tensors can say it.

The rules are those of `vllm/model_executor/layers/quantization/compressed_tensors`: the schemes it chooses from for a
layer's arguments, and the layers it fuses, which share one scheme.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from wrapq.export.scheme import FLOAT, PACK, Args, Scheme

FUSED: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PACKED_BITS = (4, 8)


def linear_refusal(scheme: Scheme, in_block: bool) -> str | None:
    """Why vLLM does not run a linear layer with `scheme`, or None; `in_block` is false for the output layer."""
    weights, inputs = scheme.weights, scheme.inputs
    if not in_block:
        return "vLLM keeps the output layer (lm_head) in float"
    if scheme.format == PACK:
        if weights["num_bits"] not in _PACKED_BITS:
            return f"vLLM has kernels for packed weights of 4 and 8 bits, not {weights['num_bits']}"
        return None
    if weights["type"] == "int":
        return _integer_refusal(weights, inputs or {})
    return _float_refusal(weights, inputs) if scheme.format == FLOAT else None


def cache_refusal(arguments: Args) -> str | None:
    """Why vLLM does not keep its cache so, or None."""
    if (arguments["type"], arguments["num_bits"], arguments["strategy"]) != ("float", 8, "tensor"):
        return "vLLM's quantized cache is fp8_e4m3 with one scale by tensor"
    return None


def fusion_refusals(schemes: Mapping[str, Scheme | None]) -> Iterator[tuple[str, str]]:
    """For each set of layers that vLLM fuses and that differ here: where, and what differs.

    Args:
        schemes: every linear layer by name, with None for the float ones.
    """
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes):
        for parts in FUSED:
            found = {part: schemes[name] for part in parts if (name := f"{parent}.{part}") in schemes}
            if len({scheme.key if scheme else "" for scheme in found.values()}) > 1:
                said = ", ".join(f"{part} {describe(scheme)}" for part, scheme in found.items())
                yield parent, f"vLLM runs {_listed(list(found))} as one layer, which needs one spec, but {said}"


def describe(scheme: Scheme | None) -> str:
    """The scheme in a few words, for messages."""
    if scheme is None:
        return "is float"
    inputs = f" with {_words(scheme.inputs)} inputs" if scheme.inputs else ""
    return f"is {_words(scheme.weights)}{inputs}"


def _words(arguments: Args) -> str:
    size = f" of {arguments['group_size']}" if "group_size" in arguments else ""
    kind = "" if arguments["symmetric"] else " asymmetric"
    return f"{arguments['num_bits']}-bit{kind} by {arguments['strategy']}{size}"


def _integer_refusal(weights: Args, inputs: Args) -> str | None:
    strategy = "token" if inputs.get("dynamic") else "tensor"
    if inputs.get("type") != "int" or inputs.get("num_bits") != 8 or inputs.get("strategy") != strategy:
        return "vLLM takes integer inputs of 8 bits, by tensor with fixed ranges or by token with dynamic ones"
    if not weights["symmetric"]:
        return "vLLM needs symmetric weights where inputs are integers"
    if weights["num_bits"] == 4 and inputs["dynamic"] and weights["strategy"] in ("channel", "group"):
        return None
    if weights["num_bits"] != 8 or weights["strategy"] not in ("tensor", "channel"):
        return "vLLM runs integer inputs with weights of 8 bits by tensor or channel, or of 4 bits with dynamic inputs"
    return None


def _float_refusal(weights: Args, inputs: Args | None) -> str | None:
    if inputs is None or inputs["type"] != "float" or inputs["num_bits"] != 8:
        return "vLLM multiplies fp8 weights with fp8 inputs"
    if not inputs["dynamic"] and inputs["strategy"] != "tensor":
        return "vLLM takes fixed fp8 ranges of inputs by tensor"
    if weights["strategy"] == "block" and inputs.get("group_size") != weights["block_structure"][1]:
        return "vLLM takes weights in blocks with dynamic inputs in groups as wide as a block"
    return None


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]

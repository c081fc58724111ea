"""What the quantizers that others have for each runtime make of a float model: `bench_exports` measures it."""

from __future__ import annotations

import copy
import io
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.peers.environment import NNCF, OPENVINO, peer_python, run_oneshots
from wrapq.export import run_circle, run_executorch, run_gguf, run_onnx, run_openvino
from wrapq.export.circle_model import CircleOptions
from wrapq.export.executorch_model import LogitsOfSequence, compiled
from wrapq.export.run_onnx import nothing_before
from wrapq.export.stopwatch import LOGITS

_LONGEST = 256


@dataclass(frozen=True)
class Given:
    """What a peer starts from.

    Attributes:
        model: the float one, which it leaves as it is.
        floating: the folder with the float model as wrapq exports it to the same runtime.
        ours: the folder with what wrapq makes of it.
        data: the calibration data by the names of the model's inputs, [S, ...] each.
        head: the output whose layer stays float; none where that is quantized too.
    """

    model: Any
    floating: Path
    ours: Path
    data: Mapping[str, Tensor]
    head: str = LOGITS


Peer = Callable[[Given, Path], None]
"""Writes into a folder what the runtime reads; raises whatever it meets."""


class _Feeds:
    """The calibration data for onnxruntime, a sample at a time."""

    def __init__(self, path: Path, data: Mapping[str, Tensor]) -> None:
        import onnxruntime

        session, rows = onnxruntime.InferenceSession(path), len(next(iter(data.values())))
        past = nothing_before(session, 1) if "input_ids" in data and LOGITS in _names(session) else {}
        samples = ({name: each[row : row + 1].numpy() for name, each in data.items()} | past for row in range(rows))
        self.samples: Iterator[dict[str, np.ndarray]] = samples

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def _names(session: Any) -> list[str]:
    return [each.name for each in session.get_outputs()]


def _prepared(given: Given, out: Path) -> tuple[Path, list[str]]:
    """The float ONNX model as onnxruntime wants it for its quantizers, and the nodes that stay float."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = out / "ready.onnx"
    quant_pre_process(str(given.floating / run_onnx.MODEL), str(ready), skip_symbolic_shape=True)
    return ready, [node.name for node in onnx.load(ready).graph.node if given.head in node.output]


def matmul_nbits(given: Given, out: Path) -> None:
    """onnxruntime's `MatMulNBitsQuantizer`, 4 bits in symmetric groups of 128."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    ready, heads = _prepared(given, out)
    quantizer = MatMulNBitsQuantizer(onnx.load(ready), block_size=128, is_symmetric=True, nodes_to_exclude=heads)
    quantizer.process()
    ready.unlink()
    quantizer.model.save_model_to_file(str(out / run_onnx.MODEL))


def quantize_static(given: Given, out: Path) -> None:
    """onnxruntime's `quantize_static` at the points that wrapq has: weights and inputs of products, no outputs."""
    from onnxruntime.quantization import QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize

    ready, heads = _prepared(given, out)
    kinds = ["MatMul", "Gemm", "Conv"]
    quantize(
        str(ready), str(out / run_onnx.MODEL), _Feeds(ready, given.data), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=kinds, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        nodes_to_exclude=heads,
        extra_options={"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": kinds},
    )  # fmt: skip
    ready.unlink()


def nncf(**job: Any) -> Peer:
    """NNCF, in an environment of its own; see `tests/peers/openvino_models.py`."""

    def made(given: Given, out: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            data, python = Path(scratch, "data.safetensors"), peer_python(_environment(), NNCF)
            save_file({name: tensor.contiguous() for name, tensor in given.data.items()}, data)
            paths = {"model": given.floating, "out": out}
            asked = {name: str(path / run_openvino.MODEL) for name, path in paths.items()}
            asked |= {"data": str(data), "head": given.head, **job}
            (answer,) = run_oneshots(python, [asked], Path(scratch), OPENVINO)
        if "error" in answer:
            raise RuntimeError(answer["error"])

    return made


def _environment() -> Path:
    return Path(tempfile.gettempdir(), "wrapq-bench-peer")


def pt2e(**config: Any) -> Peer:
    """torchao's PT2E with the quantizer for XNNPACK, on the linear layers but the head."""

    def made(given: Given, out: Path) -> None:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        quantizer = XNNPACKQuantizer().set_filter_function(lambda node: "lm_head" not in str(node.meta))
        quantizer.set_operator_type(
            torch.ops.aten.linear.default, get_symmetric_quantization_config(is_per_channel=True, **config)
        )
        quantizer.transform_for_annotation = lambda model: model  # it makes floats of whole numbers that index
        ids = given.data["input_ids"]
        prepared = prepare_pt2e(_program(LogitsOfSequence(given.model).eval(), ids).module(), quantizer)
        for row in ids.split(1):
            prepared(row)
        (out / run_executorch.MODEL).write_bytes(compiled(_program(convert_pt2e(prepared), ids)))

    return made


def torchao(bits: int, group: int | None = None, algorithm: str = "affine") -> Peer:
    """torchao's `quantize_`, as ExecuTorch's own export of language models calls it: inputs dynamic, token by token;
    weights by channel, or in groups."""

    def made(given: Given, out: Path) -> None:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup
        from torchao.utils import unwrap_tensor_subclass

        model = copy.deepcopy(given.model)
        chosen = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            weight_granularity=PerGroup(group) if group else PerAxis(0),
            intx_choose_qparams_algorithm=algorithm,
        )
        quantize_(model, chosen, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        function = LogitsOfSequence(unwrap_tensor_subclass(model)).eval()
        (out / run_executorch.MODEL).write_bytes(compiled(_program(function, given.data["input_ids"])))

    return made


def _program(function: nn.Module, ids: Tensor) -> Any:
    return torch.export.export(
        function, (ids[:1, :8],), dynamic_shapes=({1: torch.export.Dim("t", min=2, max=_LONGEST)},)
    )


def tico(bits: int, gptq: bool = False) -> Peer:
    """TICO's own way to a whole Llama in Circle: activations int16, embedding and head 8 bits, with or without GPTQ."""

    def made(given: Given, out: Path) -> None:
        with redirect_stdout(io.StringIO()):
            _tico(given, bits, gptq, out)

    return made


def _tico(given: Given, bits: int, gptq: bool, out: Path) -> None:
    import tico as package
    from tico.quantization import convert, prepare
    from tico.quantization.config.builders import build_llm_ptq_config
    from tico.quantization.config.gptq import GPTQConfig
    from tico.quantization.config.specs import affine
    from tico.quantization.recipes.qparams import inject_gptq_qparams
    from tico.quantization.wrapq.dtypes import DType

    rows, model = given.data["input_ids"].split(1), copy.deepcopy(given.model)
    model.config.use_cache = False

    def seen(prepared: Any) -> Any:
        for row in rows:
            prepared(row)
        return convert(prepared)

    if gptq:
        model = seen(prepare(model, GPTQConfig(weight_bits=bits, show_progress=False)))
    rounded, eight = getattr(model, "quantizers", None), affine(DType.uint(8))
    config = build_llm_ptq_config(
        model_type="llama", num_hidden_layers=len(model.model.layers), linear_weight=affine(DType.uint(bits)),
        embedding_weight=eight, lm_head_weight=eight, norm_weight=affine(DType.int(16)),
    )  # fmt: skip
    model = prepare(model, config)
    if rounded:
        inject_gptq_qparams(model, rounded)
    program = seen(model).wrapped.as_export_module("prefill", return_kv=False).eval()
    example = given.data["input_ids"][:1, : CircleOptions().tokens]
    package.convert(program, (example,), strict=False).save(str(out / run_circle.MODEL))


def ggml(importance: bool) -> Peer:
    """ggml's own rounding, of what wrapq quantizes, with or without an importance matrix."""

    def made(given: Given, out: Path) -> None:
        import gguf

        from tests.export.ggml_rounding import rounded_by_ggml

        known = _importances(given.model, given.data["input_ids"]) if importance else {}
        shutil.copy(given.ours / run_gguf.MODEL, out / run_gguf.MODEL)
        floats = {tensor.name: tensor.data for tensor in gguf.GGUFReader(given.floating / run_gguf.MODEL).tensors}
        for tensor in gguf.GGUFReader(out / run_gguf.MODEL, "r+").tensors:
            if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                weight = torch.from_numpy(np.array(floats[tensor.name]))
                tensor.data[:] = rounded_by_ggml(weight, tensor.tensor_type.name, known.get(tensor.name))

    return made


def _importances(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """The mean square of each input of the linear layers over tokens [B, T], by llama.cpp's names of their weights."""
    import gguf

    from wrapq.export.gguf.architectures import ARCHITECTURES

    architecture, sums = ARCHITECTURES[type(model).__name__], dict[str, Tensor]()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], model.config.num_hidden_layers)

    def add(name: str, inputs: tuple[Tensor]) -> None:
        power = inputs[0].float().square().flatten(0, -2).mean(0) / len(ids)
        sums[name] = sums.get(name, 0) + power

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            known = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
            hooks.append(module.register_forward_pre_hook(lambda _, inputs, name=known: add(name, inputs)))
    for sequence in ids:
        model(sequence[None])
    for hook in hooks:
        hook.remove()
    return sums

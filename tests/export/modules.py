"""Modules that are no language models, a convolutional network and an encoder, and what runtimes compute of theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import wrapq
from wrapq.export.run_onnx import MODEL as ONNX
from wrapq.export.run_openvino import MODEL as OPENVINO
from wrapq.export.run_program import COMPILED, PROGRAM

EVERY_KIND = "rules.linear.match.type=[Linear,Conv2d]"
Made = tuple[nn.Module, Any, Any]
"""A converted module, an example of its arguments, and another of other sizes."""


def network() -> nn.Module:
    torch.manual_seed(0)
    first, apart = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    layers = first, nn.BatchNorm2d(16), nn.ReLU6(), apart, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)).eval()


def encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return BertModel(BertConfig(vocab_size=100, max_position_embeddings=64, **sizes)).eval()


def words(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(100, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(rows: int) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))


def quantized_network(recipe: str = "w8a8_static", *more: str) -> Made:
    return wrapq.quantize(network(), recipe, [images(4)], [EVERY_KIND, *more]), images(4), images(7)


def quantized_encoder(recipe: str = "w8a8_static", *more: str) -> Made:
    return wrapq.quantize(encoder(), recipe, [words(4, 12)], more), words(3, 12), words(2, 9)


def by_onnxruntime(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / ONNX)
    names = [each.name for each in session.get_inputs()]
    given = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
    return [torch.from_numpy(each) for each in session.run(None, given)]


def by_openvino(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    import openvino

    model: Any = openvino.Core().compile_model(folder / OPENVINO, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    done = model([each.numpy() for each in inputs])
    return [torch.from_numpy(done[each].copy()) for each in model.outputs]


def by_torch(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [*torch.export.load(folder / PROGRAM).module()(*inputs)]


def by_inductor(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [*torch._inductor.aoti_load_package(str(folder / COMPILED))(*inputs)]


RUNTIMES: dict[str, Callable[[Path, Sequence[Tensor]], list[Tensor]]] = {
    "torch_export": by_torch,
    "onnx": by_onnxruntime,
    "openvino": by_openvino,
    "aot_inductor": by_inductor,
}
"""Those that take inputs of other sizes than the example's."""


def outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.no_grad():
        done = model(**example) if isinstance(example, dict) else model(example)
    return list(done.values()) if isinstance(done, dict) else [done]


MODULES: dict[str, Callable[..., Made]] = {"convolutions": quantized_network, "encoder": quantized_encoder}
RECIPES = {
    ("executorch", "encoder"): ("w4a16_rtn", "rules.linear.weight=int4:g32", "rules.linear.input=int8:token:asym:dyn"),
    ("circle", "convolutions"): ("w8a8_static", "rules.linear.input=int16:tensor:sym"),
    ("circle", "encoder"): ("w8a8_static", "rules.linear.input=int16:tensor:sym"),
}
"""Of the targets that do not take `w8a8_static`."""


def quantized(kind: str, target: str) -> Made:
    """A module as `target` takes it."""
    return MODULES[kind](*RECIPES.get((target, kind), ("w8a8_static",)))


def check_other_sizes(target: str, folder: Path, model: nn.Module, other: Any) -> None:
    """That an export gives for the sizes of `other` what `model` does, if it takes other sizes than the example's."""
    if target not in RUNTIMES:
        return
    inputs = [*other.values()] if isinstance(other, dict) else [other]
    for mine, its in zip(outputs(model, other), RUNTIMES[target](folder, inputs), strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=0.06 * float(mine.abs().max()))

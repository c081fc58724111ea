"""A program that AOTInductor compiled: machine code for the processor it was made on, which torch loads from Python and
C++."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch

from wrapq.errors import ModelError, Problem, first_line
from wrapq.export.base import EXPORTERS, Folder
from wrapq.export.run_program import COMPILED
from wrapq.export.torch_export import TorchExport
from wrapq.resolve.plan import Plan

_LOAD = f"torch._inductor.aoti_load_package('{COMPILED}')(input_ids, attention_mask) gives the logits"
_HERE = "it is machine code for this kind of processor, and for this version of torch"


@EXPORTERS.register("aot_inductor")
class AotInductor(TorchExport):
    """Exporter of what AOTInductor makes of a program of `torch.export`."""

    weights: ClassVar[str] = COMPILED
    runtime: ClassVar[tuple[str, str]] = "AOTInductor", TorchExport.runtime[1]

    def missing_packages(self) -> Iterator[Problem]:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        yield from super().missing_packages()
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            what = "AOTInductor compiles, and there is no C++ compiler here"
            yield Problem("", "export.aot_inductor", what, (), "install g++ or clang, or name one by CXX")

    def save(self, program: Any, folder: Folder) -> None:
        plain = _plain()
        if any(node.target in plain for node in program.graph.nodes):
            program = program.run_decompositions(plain)
        inductor: Any = torch._inductor
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                folder.write_files(
                    lambda path: inductor.aoti_compile_and_package(program, package_path=str(path / COMPILED))
                )
        except Exception as error:  # of what the compiler met in somebody else's code, there is no list
            raise ModelError(f"AOTInductor does not take this model: {first_line(error)}") from error

    def layers(self, plan: Plan) -> Iterable[str]:
        yield f"{COMPILED}: {len(plan.modules) + len(plan.parts)} modules, compiled with what is around them"

    def notes(self, plan: Plan) -> Iterable[str]:
        yield _LOAD
        yield _HERE


def _plain() -> dict[Any, Any]:
    """torchao's operators for floats of 8 bits in plain ones, as AOTInductor does not call these."""
    from torchao.quantization import quant_primitives

    ops: Any = torch.ops.torchao
    return {
        ops.quantize_affine_float8_non_decomposed.default: quant_primitives._quantize_affine_float8,
        ops.dequantize_affine_float8_non_decomposed.default: quant_primitives._dequantize_affine_float8,
    }

"""Runs with an export, each done once for all tests.

One case is read as every export is, in a process of its own; starting it takes longer than the rest of a run, so the
others are read by the same code in this process.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

import wrapq
from tests.peers.environment import beside
from wrapq.engine.record import RunResult
from wrapq.errors import ModelError
from wrapq.export import compressed_tensors as exporter_module
from wrapq.export import reload
from wrapq.export.base import EXPORTERS, Reading
from wrapq.export.compressed_tensors import CompressedTensors
from wrapq.export.scheme import Scheme, linear_scheme
from wrapq.quant.spec import QuantSpec

pytest.importorskip("compressed_tensors")

WEIGHTS = ("recipe=w4a16_rtn",)
STATIC = ("recipe=w8a8_static", "calibration.samples=8", "calibration.seq_len=128")
TRANSFORMERS = "export.compressed_tensors.reader=transformers"
SMALL = ("evaluation.tokens=2048", "evaluation.seq_len=128", "tracking=none", "runtime.kernels=reference")
EXPORT = ("export=compressed_tensors",)
HERE = ("export=none", "+export.read_here={beside_float: false}")


@EXPORTERS.register("read_here")
class ReadHere(CompressedTensors):
    """Reads in this process what others read in one of their own."""

    def read(self, folder: Path, ids: Tensor, device: str) -> Reading:
        with tempfile.TemporaryDirectory() as scratch:
            asked, answered = f"{scratch}/ids.safetensors", f"{scratch}/logits.safetensors"
            save_file({"ids": ids}, asked)
            try:
                reload.main(str(folder), asked, answered, device)
            except SystemExit as end:
                raise ModelError(str(end)) from end
            return exporter_module.reading(reload.read_answer(Path(answered)))


def weights(spec: str, *more: str) -> tuple[str, ...]:
    return (*WEIGHTS, f"rules.linear.weight={spec}", *more)


def layers(weight: str, inputs: str, *more: str) -> tuple[str, ...]:
    base = WEIGHTS if inputs.endswith(":dyn") else STATIC
    return (*base, f"rules.linear.weight={weight}", f"rules.linear.input={inputs}", *more)


def scheme_of(weight: str, inputs: str | None = None) -> Scheme:
    texts = {"weight": weight} | ({"input": inputs} if inputs else {})
    return linear_scheme({point: QuantSpec.parse(text) for point, text in texts.items()})


def cache_of(spec: str, *more: str) -> tuple[str, ...]:
    return (*WEIGHTS, *STATIC[1:], cache_rule(spec), "+algorithm@stack.ranges=ranges", *more)


def cache_rule(spec: str) -> str:
    return "+rules.cache={match: {type: Attention}, points: {key: 'SPEC', value: 'SPEC'}}".replace("SPEC", spec)


TIES = 1e-2
"""Where integers of activations may differ by one, as a tie falls to the other side: on a GPU a division by a number
is a product with its reciprocal."""


@dataclass(frozen=True)
class Case:
    """A run and what its export must be: its format, and how far its logits may be from the run's."""

    overrides: tuple[str, ...]
    format: str
    error: float = TIES if torch.cuda.is_available() else 1e-5


BFLOAT = "model.dtype=bfloat16"
CASES = {
    "w4a16": Case(weights("int4:g128:sym"), "pack-quantized"),
    "w4a16_asym": Case(weights("int4:g128:asym"), "pack-quantized"),
    "w4a16_signed": Case(weights("int4:g128:sym:signed"), "pack-quantized"),
    "w8a16": Case(weights("int8:channel:sym"), "pack-quantized"),
    "w8a8_dynamic": Case(layers("int8:channel:sym", "int8:token:sym:dyn"), "int-quantized"),
    "w8a8_static": Case(layers("int8:channel:sym", "int8:tensor:asym"), "int-quantized", error=TIES),
    "mixed": Case(
        weights(
            "int4:g128:sym",
            "+rules.mlp={match: {name: '*.mlp.*', type: Linear}, weight: 'int8:channel', input: 'int8:token:dyn'}",
        ),
        "mixed-precision",
    ),
    "rotated": Case(
        weights("int4:g128:sym", "+algorithm@stack.turn=rotate", "stack.turn.rotations=[R4]", "stack.turn.block=64"),
        "pack-quantized",
    ),
    "kv8": Case(cache_of("fp8_e4m3:tensor"), "pack-quantized"),
    "static_kv8": Case(
        layers("int8:channel:sym", "int8:tensor:asym", cache_rule("fp8_e4m3:tensor")),
        "int-quantized",
        error=TIES,
    ),
    "fp8_block": Case(layers("fp8_e4m3:b128x128", "fp8_e4m3:g128:dyn"), "float-quantized"),
    "nvfp4a16": Case(weights("nvfp4", BFLOAT), "nvfp4-pack-quantized"),
    "w4a8": Case(layers("int4:g128:sym", "int8:token:sym:dyn", "~rules.head"), "pack-quantized"),
    "w4afp8": Case(layers("int4:g128:sym", "fp8_e4m3:token:sym:dyn"), "pack-quantized"),
    "mxfp4a16": Case(weights("mxfp4", BFLOAT), "mxfp4-pack-quantized"),
    "mxfp4": Case(layers("mxfp4", "mxfp4:dyn", BFLOAT), "mxfp4-pack-quantized"),
    "mxfp8": Case(layers("mxfp8", "mxfp8:dyn", BFLOAT), "mxfp8-quantized"),
    "nvfp4": Case(layers("nvfp4", "nvfp4:local", BFLOAT), "nvfp4-pack-quantized", error=0.1),
    "fp8": Case(layers("fp8_e4m3:tensor:sym", "fp8_e4m3:tensor:sym"), "float-quantized", error=TIES),
    "fp8_dynamic": Case(layers("fp8_e4m3:channel:sym", "fp8_e4m3:token:sym:dyn"), "float-quantized"),
}
SLOW = ("nvfp4a16", "w4a16_signed", "w8a16", "w8a8_dynamic", "w8a8_static", "kv8", "w4a8", "fp8_block", "mxfp4a16")
SLOW += ("mxfp4", "mxfp8", "nvfp4", "fp8", "fp8_dynamic", "w4a16_asym", "w4afp8", "rotated")
"""Said by the others already, and each run takes seconds."""
APART = "w4a16"
"""The case that is read in a process of its own."""
PARAMETERS = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
Runner = Callable[[str], RunResult]


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def exported(outputs: Path) -> Runner:
    """The finished run of a case, by its name."""

    @cache
    def run(name: str) -> RunResult:
        recipe, *overrides = CASES[name].overrides
        chosen = [*SMALL, *(EXPORT if name == APART else HERE), f"paths.outputs={outputs}/{name}"]
        return wrapq.run(recipe.removeprefix("recipe="), [*overrides, *chosen])

    return run


@pytest.fixture(scope="session")
def gptqmodel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the extra `gptq`; one for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "gptqmodel"
    packages = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["gptq"]
    done = folder / "python"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            try:
                made = beside(folder, packages)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"{' '.join(packages)} cannot be installed: {(error.stderr or '').strip()[-300:]}")
            done.write_text(str(made))
    return Path(done.read_text())

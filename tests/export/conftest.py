"""Runs with an export, each done once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import wrapq
from wrapq.engine.run import RunResult

pytest.importorskip("compressed_tensors")

WEIGHTS = ("recipe=w4a16_rtn",)
STATIC = ("recipe=w8a8_static", "calibration.samples=8", "calibration.seq_len=128")
TRANSFORMERS = "export.reader=transformers"
SMALL = ("evaluation.tokens=4096", "evaluation.seq_len=128", "tracking=none", "export=compressed_tensors")


def weights(spec: str, *more: str) -> tuple[str, ...]:
    return (*WEIGHTS, f"rules.linear.weight={spec}", *more)


def layers(weight: str, inputs: str, *more: str) -> tuple[str, ...]:
    base = WEIGHTS if inputs.endswith(":dyn") else STATIC
    return (*base, f"rules.linear.weight={weight}", f"rules.linear.input={inputs}", *more)


def cache_of(spec: str, *more: str) -> tuple[str, ...]:
    rule = "+rules.cache={match: {type: Attention}, points: {key: 'SPEC', value: 'SPEC'}}".replace("SPEC", spec)
    ranges = "+algorithm@stack.ranges=ranges"
    return (*WEIGHTS, *STATIC[1:], rule, ranges, *more)


@dataclass(frozen=True)
class Case:
    """A run and what its export must be: format, weight bits, whether ties between steps may show, bytes of a scale."""

    overrides: tuple[str, ...]
    format: str
    exact: bool = True


BFLOAT = "model.dtype=bfloat16"
CASES = {
    "w4a16": Case(weights("int4:g128:sym"), "pack-quantized"),
    "w4a16_asym": Case(weights("int4:g128:asym"), "pack-quantized"),
    "w8a16": Case(weights("int8:channel:sym"), "pack-quantized"),
    "w8a8_dynamic": Case(layers("int8:channel:sym", "int8:token:sym:dyn"), "int-quantized"),
    "w8a8_static": Case(layers("int8:channel:sym", "int8:tensor:asym"), "int-quantized", exact=False),
    "mixed": Case(
        weights(
            "int4:g128:sym",
            "+rules.mlp={match: {name: '*.mlp.*', type: Linear}, weight: 'int8:channel', input: 'int8:token:dyn'}",
        ),
        "mixed-precision",
    ),
    "kv8": Case(cache_of("fp8_e4m3:tensor"), "pack-quantized"),
    "fp8_block": Case(layers("fp8_e4m3:b128x128", "fp8_e4m3:g128:dyn"), "float-quantized"),
    "nvfp4a16": Case(weights("nvfp4", BFLOAT), "nvfp4-pack-quantized"),
    "mxfp4a16": Case(weights("mxfp4", BFLOAT), "mxfp4-pack-quantized"),
}
SLOW = ("w8a16", "w8a8_dynamic", "fp8_block", "mxfp4a16")
"""Said by the others already, and each run takes seconds."""
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
        return wrapq.run(recipe.removeprefix("recipe="), [*overrides, *SMALL, f"paths.outputs={outputs}/{name}"])

    return run

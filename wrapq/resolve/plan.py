"""The plan: a recipe resolved against one model. It is what runs, what is shown before, and what is kept after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from wrapq.quant.spec import QuantSpec
from wrapq.recipe.provenance import Origin
from wrapq.recipe.schema import Recipe


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PointPlan(_Frozen):
    """One quantization point of one module."""

    name: str
    role: Literal["weight", "activation"]
    spec: str
    """The spec in its short form."""
    sources: tuple[str, ...]
    """The files and overrides that said so, with the names of their rules, in the order of the rules."""

    @property
    def quant_spec(self) -> QuantSpec:
        """The spec itself."""
        return _parsed(self.spec)


_parsed = cache(QuantSpec.parse)


class ModulePlan(_Frozen):
    """One module that gets quantized."""

    name: str
    type: str
    wrapper: str
    block: int | None
    multiplies: bool
    """Whether the weight multiplies a matrix, as a linear layer's does and a norm's does not."""
    groups: int
    """How many groups of the weight's rows multiply inputs of their own, as those of a grouped convolution do."""
    has_bias: bool
    """Whether something is added to what the weight makes."""
    weight_shape: tuple[int, int] | None
    """Of the weight as a matrix [N, K]."""
    points: tuple[PointPlan, ...]


def specs_of(modules: Iterable[ModulePlan]) -> dict[str, dict[str, QuantSpec]]:
    """For each of `modules` the spec of each of its points."""
    return {module.name: {point.name: point.quant_spec for point in module.points} for module in modules}


class PartPlan(_Frozen):
    """One module that PT2E quantizes, with all that lies in it."""

    name: str
    type: str
    parameters: int
    quantizer: str
    """The registered name."""
    options: dict[str, Any]
    source: str

    def __str__(self) -> str:
        listed = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.quantizer}({listed})" if listed else self.quantizer


class Untouched(_Frozen):
    """One module that stays float although it computes something, and why."""

    name: str
    type: str
    parameters: int
    reason: str


class StagePlan(_Frozen):
    """One stage of the stack."""

    name: str
    algorithm: str
    phase: str
    options: dict[str, Any]
    targets: tuple[str, ...]
    """Full names of the points that the stage decides."""
    needs: tuple[str, ...]
    """The statistics that are gathered for it."""
    source: str
    online: tuple[str, ...] = ()
    """The modules that change what comes to them at each forward from then on."""
    hadamard: dict[str, int] = {}
    """Those of them that a Hadamard matrix rotates, with the channels that it rotates at a time."""


class ModelFacts(_Frozen):
    """What the plan knows of the model."""

    path: str
    type: str
    dtype: str = "float32"
    """In which it computes, and in which what is not quantized is saved; plans of before do not say it."""
    parameters: int
    blocks: str
    block_count: int


class Estimate(_Frozen):
    """What the run will cost and what comes out; computed from shapes alone."""

    float_bytes: int
    quantized_bytes: int
    """All tensors of the quantized model: packed codes, their parameters, and what stays float."""
    bits_per_weight: float | None
    """Over the quantized weights, scales and zero points included."""
    calibration_tokens: int
    peak_bytes: int


class Plan(_Frozen):
    """A recipe resolved against one model; immutable, and equal for equal recipes and models."""

    recipe: Recipe
    model: ModelFacts
    modules: tuple[ModulePlan, ...]
    untouched: tuple[Untouched, ...]
    stages: tuple[StagePlan, ...]
    estimate: Estimate
    notes: tuple[str, ...] = ()
    parts: tuple[PartPlan, ...] = ()
    presets: tuple[Origin, ...] = ()
    """The files that set the recipe's keys."""

    def specs(self) -> dict[str, dict[str, QuantSpec]]:
        """For each module the spec of each of its points."""
        return specs_of(self.modules)

    @property
    def needs_calibration(self) -> bool:
        """Whether any stage looks at data."""
        return bool(self.parts) or any(stage.needs for stage in self.stages)

    def digest(self) -> str:
        """SHA-256, in hex, of what will be done: the recipe's digest, every point's spec, every stage.

        Where it was said does not count.
        """
        done: Mapping[str, Any] = {
            "recipe": self.recipe.digest(),
            "specs": [(m.name, m.wrapper, [(p.name, p.spec) for p in m.points]) for m in self.modules],
            "stages": [(s.algorithm, s.options, s.targets) for s in self.stages],
        }
        return hashlib.sha256(json.dumps(done, sort_keys=True, default=str).encode()).hexdigest()

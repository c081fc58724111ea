"""What a recipe may say: the pydantic models behind every key, strict and closed.

Nothing is coerced (`"3"` is no number, `true` is no 1) and unknown keys are refused. The options of a registered thing,
an algorithm or a data source, stand beside its name; they are kept as they are and checked against the `Options` of the
thing itself when the recipe is resolved.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, WrapValidator, model_validator
from pydantic_core import PydanticKnownError

from wrapq.errors import WrapqError
from wrapq.metrics import METRICS, metrics, own_names
from wrapq.paths import expand
from wrapq.recipe.spec_patch import SpecPatch

Positive = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
ORDERED = ("rules", "stack")
"""The sections whose entries have an order."""
_LAYERS = re.compile(r"-?\d+|(-?\d+)?:(-?\d+)?")
_PERCENT = re.compile(r"-?\d+(\.\d+)? ?%")


def _folder_name(text: str) -> str:
    if ".." in text or text.startswith("."):
        raise ValueError("must not start with a dot or contain two dots: it becomes the name of a folder")
    return text


def _path(text: str) -> str:
    try:
        return str(expand(text))
    except WrapqError as error:
        raise ValueError(str(error)) from None


def _texts(value: Any, _: Any) -> str | list[str] | None:
    items = value if isinstance(value, list) else [value]
    if value is not None and not (items and all(isinstance(item, str) and item for item in items)):
        raise ValueError(f"{value!r} should be a text or a list of texts")
    return value


def _layers(value: Any, _: Any) -> int | str | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    if value is None or number or (isinstance(value, str) and _LAYERS.fullmatch(value)):
        return value
    raise ValueError(f"{value!r} should be a block's index such as 3 or -1, or a range such as 0:8")


def _bound(value: Any, _: Any) -> float | str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is None or (number and math.isfinite(value)) or (isinstance(value, str) and _PERCENT.fullmatch(value)):
        return value
    raise ValueError(f"{value!r} should be a number such as 4.5, or a share such as 2%")


Texts = Annotated[str | list[str] | None, WrapValidator(_texts)]
"""One text or several."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", min_length=1, max_length=100), AfterValidator(_folder_name)]
"""The name of a recipe, which becomes the name of a folder."""
EntryName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", min_length=1, max_length=100)]
"""The name of a rule or a stage; no dot, since it is one step of a dotted path."""
Bound = Annotated[float | str | None, WrapValidator(_bound), PlainSerializer(lambda value: value)]
"""A number, or a share such as `2%`; None asks nothing."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beside the name, which belong to the thing it names."""
        return dict(self.model_extra or {})


class ModelConfig(_Closed):
    """Which model is quantized."""

    path: Annotated[str, Field(min_length=1)]
    """A folder in Hugging Face layout, a name on the Hugging Face hub, or `wrapq://demo`; with `dequantize` a GGUF file
    too."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The type in which the model computes, and in which what is not quantized is saved; the checkpoint's own when not
    given."""
    tokenizer: str | None = None
    """Where the tokenizer lies, when not beside the model."""
    revision: str | None = None
    """A commit, tag or branch on the hub."""
    dequantize: bool = False
    """True takes a checkpoint apart that is quantized already, and starts from the float weights that come out."""


class Match(_Closed):
    """Which modules a rule is for; all the keys that are given must fit."""

    name: Texts = None
    """The module's dotted name: a glob (`*.mlp.*`) or a regular expression (`re:.*_proj`), or a list of such."""
    type: Texts = None
    """The name of the module's class or of one it derives from, a glob (`*Norm`) or a list of such. A linear with one
    output, such as the gate of a shared expert, and one that chooses among experts is a `Gate` and no `Linear`."""
    layers: Annotated[int | str | None, WrapValidator(_layers)] = None
    """The index of the repeated block: `3`, `-1` for the last, or a range `0:8` without its end."""

    @model_validator(mode="after")
    def _selects(self) -> Match:
        if self.name is None and self.type is None and self.layers is None:
            raise ValueError("selects nothing: give name, type or layers; name: '*' means every module")
        return self


class Rule(_Closed):
    """What one selection of modules gets. Rules apply in order and a later one changes only the keys it names."""

    match: Match
    """Which modules the rule is for."""
    quantize: bool = True
    """False leaves the modules float."""
    replace: bool = False
    """True forgets what earlier rules said of these modules, instead of patching it."""
    optional: bool = False
    """True allows the rule to match no module."""
    weight: SpecPatch | None = None
    """The spec of the weights."""
    input: SpecPatch | None = None
    """The spec of the module's input."""
    output: SpecPatch | None = None
    """The spec of the module's output."""
    activation: SpecPatch | None = None
    """The spec of what matrix products with weights, and convolutions, read: the inputs of linear layers and those."""
    activations: SpecPatch | None = None
    """The spec of every activation point of the module, the inner ones included."""
    points: dict[str, SpecPatch] = {}
    """The specs of single points by name, such as `mul`, `query`, `probs`."""
    by: Literal["pt2e"] | None = None
    """`pt2e` hands the modules to PyTorch 2's export quantization, as torchao has it, with all that lies in them."""
    quantizer: Annotated[str, Field(min_length=1)] | None = None
    """The quantizer of PT2E by its registered name: xnnpack, x86_inductor, ..."""
    options: dict[str, Any] = {}
    """The options of that quantizer."""

    @model_validator(mode="after")
    def _by_one(self) -> Rule:
        points = ("weight", "input", "output", "activation", "activations")
        own = [key for key in points if getattr(self, key) is not None] + (["points"] if self.points else [])
        if self.by is None and (self.quantizer is not None or self.options):
            raise ValueError("quantizer and options are of PT2E: by: pt2e")
        if self.by is not None and self.quantizer is None:
            raise ValueError("by: pt2e needs a quantizer, such as quantizer: xnnpack")
        if self.by is not None and not self.quantize:
            raise ValueError("quantize: false leaves the modules float, and by: pt2e does not: set quantize: true")
        if self.by is not None and own:
            raise ValueError(f"PT2E's quantizer decides what is quantized in the modules: leave out {own[0]}")
        return self


class Stage(_Open):
    """One algorithm of the stack, with its options beside it."""

    algorithm: Annotated[str, Field(min_length=1)]
    """The algorithm's registered name: rtn, ranges, ..."""
    rules: list[str] | None = None
    """The rules whose modules the stage handles; all of them when not given."""


class Calibration(_Open):
    """The text that activations are observed on, and the order of work; the source's options stand beside it."""

    source: Annotated[str, Field(min_length=1)]
    """The data source's registered name: demo, text, jsonl, parquet, datasets, tokens."""
    samples: Positive = 64
    """How many sequences."""
    seq_len: Positive = 256
    """Tokens per sequence."""
    batch_size: Positive = 8
    """Sequences per forward pass."""
    seed: Seed = 0
    """Which sequences are drawn."""
    schedule: Literal["sequential", "parallel"] = "sequential"
    """`sequential`: each block sees what the quantized blocks before it give; `parallel`: the float model's values."""
    pack: bool = True
    """True joins documents and cuts them into full sequences; False takes one document per sequence, padded."""


class Evaluation(_Open):
    """The text that quality is measured on; the source's options stand beside it."""

    source: Annotated[str, Field(min_length=1)]
    """The data source's registered name: demo, text, jsonl, parquet, datasets, tokens."""
    tokens: Positive = 32768
    """How many tokens."""
    seq_len: Positive = 256
    """Tokens per sequence."""
    batch_size: Positive = 8
    """Sequences per forward pass."""
    score: Literal["all", "assistant"] = "all"
    """`assistant`: only what the assistant writes in conversations, of which each is a sequence of its own then."""
    compare_schedules: bool = False
    """Whether the result of the other calibration schedule is measured too; it is calibrated for that, and not kept."""


class Export(_Open):
    """A copy of the result in another project's format, checked before the run ends, with the format's options."""

    beside_float: bool = True
    """Whether the float model is measured in the same runtime too, so that it is known what the copy gains there."""


def _metric_name(name: str) -> str:
    figure, _, format = name.partition(".")
    if (figure not in own_names() and figure not in set(METRICS)) or (format and not METRICS.get(figure).exported):
        raise PydanticKnownError("extra_forbidden")
    return name


def _describe_goals(schema: dict[str, Any]) -> None:
    one = schema["additionalProperties"]
    one_or_each = {"anyOf": [*one["anyOf"], {"type": "object", "additionalProperties": one}]}
    title = lambda name: name.replace("_", " ").title()  # noqa: E731
    schema["properties"] = {
        m.name: {**(one_or_each if m.exported else one), "title": title(m.name), "default": None, "description": m.goal}
        for m in metrics()
    }
    schema["additionalProperties"] = False


class Goals(BaseModel):
    """What the quantized model should reach; a run says which goals it met, and its exit status follows. What is
    measured of exports has one bound for all of them, or a mapping with one for each format."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, json_schema_extra=_describe_goals)
    __pydantic_extra__: dict[Annotated[str, AfterValidator(_metric_name)], Bound] = Field(init=False)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, goals: Any) -> Any:
        if not isinstance(goals, dict):
            return goals
        each = {name: bounds for name, bounds in goals.items() if isinstance(bounds, dict)}
        alone = {f"{name}.{format}": bound for name in each for format, bound in each[name].items()}
        return dict.fromkeys(own_names()) | {name: goals[name] for name in goals if name not in each} | alone

    def bounds(self) -> dict[str, float]:
        """The goals that are set, by the name of their metric, that of one export alone where it is."""
        given = ((name, value) for name, value in self.__pydantic_extra__.items() if value is not None)
        return {n: float(v.rstrip("% ")) / 100 if isinstance(v, str) else float(v) for n, v in given}


class Recipe(_Closed):
    """Everything that decides the result of a run, and nothing about the machine it runs on."""

    name: Name
    """The recipe's name; the folder under `outputs/` and the runs are called by it."""
    description: str = ""
    """What the recipe is for, in a sentence."""
    model: ModelConfig
    """Which model is quantized."""
    rules: dict[EntryName, Rule] = {}
    """What is quantized and how: named rules in order, later ones win."""
    stack: dict[EntryName, Stage] = {}
    """The algorithms, by name; their phases decide the order unless `stack_order` does."""
    stack_order: list[str] | None = None
    """The names of all stages in the order in which they shall run."""
    calibration: Calibration
    """What activations are observed on."""
    evaluation: Evaluation
    """What quality is measured on."""
    float_prefix: Annotated[int, Field(ge=0, le=2**53)] = 0
    """So many first tokens of each sequence whose activations stay float, as a runtime that computes their keys and
    values once, in float, keeps them."""
    export: dict[EntryName, Export] = {}
    """In which formats of other projects the result is written too: compressed_tensors, onnx, ... or a plug-in's."""
    seed: Seed = 0
    """The seed of everything random outside calibration."""
    goals: Goals = Goals()
    """What the quantized model should reach."""

    @model_validator(mode="before")
    @classmethod
    def _one_export(cls, data: Any) -> Any:
        """Records of earlier versions have one export, which names its format beside its options."""
        export = data.get("export") if isinstance(data, dict) else None
        if not isinstance(export, dict) or not isinstance(export.get("format"), str):
            return data
        options = {key: value for key, value in export.items() if key != "format"}
        return {**data, "export": {} if export["format"] == "none" else {export["format"]: options}}

    def digest(self) -> str:
        """SHA-256, in hex, of what decides the result: all but `name` and `description`, which are labels, and `goals`,
        which judge the result.

        Key order counts only where it has a meaning: among rules and among stages. Keys left out and keys written with
        their default are the same.
        """
        data = self.model_dump(mode="json", exclude={"name", "description", "goals"})
        for key in ORDERED:
            data[key] = list(data[key].items())
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class Register(_Closed):
    """The entry of a finished model in MLflow's model registry."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^/:.]+$")]
    """The registered model, of which the run becomes the next version."""
    alias: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")] | None = None
    """What the version is called from then on, such as `candidate`."""


class Tracking(_Closed):
    """Where the record of runs goes."""

    enabled: bool = True
    """False records nothing in MLflow."""
    uri: str | None = None
    """A tracking server; the local database under the outputs folder when not given."""
    experiment: Annotated[str, Field(min_length=1)] = "wrapq"
    """The MLflow experiment."""
    register_as: Register | None = None
    """Enters the model of every run that finishes in the registry, its files being uploaded; null: none."""


class Runtime(_Closed):
    """How the machine is used."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """`auto` takes a GPU when there is one; else cpu, mps, cuda or cuda:N."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; torch decides when not given."""
    kernels: Annotated[str, Field(min_length=1)] = "auto"
    """`auto` measures, once a model is saved, which kernels are faster; `reference` measures nothing; or a kernel."""
    cache_gb: Annotated[float, Field(ge=0)] = 20
    """How much the statistics that runs share may take on disk, in GB; 0 keeps none."""
    offload_gb: Annotated[float, Field(ge=0)] = 8
    """How much memory waiting calibration batches may take, in GB; the rest goes to files in the run's folder."""
    load: Literal["whole", "streaming"] = "whole"
    """`streaming` brings the model's blocks in one at a time, for models larger than memory; the result is the same."""
    trust_remote_code: bool = False
    """Whether code that comes with a model may run. Only the command line can say so."""


class Paths(_Closed):
    """Where files go."""

    outputs: Annotated[str, Field(min_length=1), AfterValidator(_path)] = "outputs"
    """The folder for what runs leave, relative to the working directory."""
    cache: Annotated[str, AfterValidator(_path)] | None = None
    """The folder for statistics that runs share; `cache` under the outputs folder when not given."""

    def cache_folder(self) -> Path:
        """Where statistics are kept."""
        return Path(self.cache or Path(self.outputs) / "cache")


class Sweep(_Open):
    """Which jobs a sweep consists of and how they are judged; the sampler's options stand beside it."""

    sampler: Annotated[str, Field(min_length=1)] = "grid"
    """The sampler's registered name: grid, optuna."""
    name: Name = "sweep"
    """The folder under `outputs/` and the MLflow run are called by it."""
    minimize: Texts = "kl"
    """The metric that decides the winner, or several of which the first does; the names are those of `goals`."""


class LauncherSettings(_Open):
    """What runs the jobs of a sweep; the launcher's options stand beside it."""

    kind: Annotated[str, Field(min_length=1)] = "local"
    """The launcher's registered name: local, joblib, slurm, ray."""


class Settings(_Closed):
    """The machine: not part of a recipe, nor of its digest."""

    tracking: Tracking = Tracking()
    """Where the record of runs goes."""
    runtime: Runtime = Runtime()
    """How the machine is used."""
    paths: Paths = Paths()
    """Where files go."""
    sweep: Sweep = Sweep()
    """Which jobs `wrapq sweep` runs."""
    launcher: LauncherSettings = LauncherSettings()
    """What runs the jobs of `wrapq sweep`."""

# ruff: noqa: E501 - a table
"""What wrapq exports of weights rounded to nearest is what llm-compressor's `oneshot` saves of the same model.

From a float32 model every tensor of the file is equal to the bit, except

| what                        | llm-compressor 0.14 with compressed-tensors 0.19 | wrapq                                       |
|-----------------------------|--------------------------------------------------|---------------------------------------------|
| codes of W4A16_ASYM         | `round(w / scale + zero_point)`: the sum rounds  | `round(w / scale) + zero_point`: the nearest|
|                             | once more; 1 code in 1000 is another, by 1       | whatever the zero point                     |

From a bfloat16 model the same, and

| what                        | llm-compressor                                   | wrapq                                       |
|-----------------------------|--------------------------------------------------|---------------------------------------------|
| INT and FP8 codes           | `w / scale` in bfloat16, so rounded twice        | in float32, with the scale not yet rounded  |
|                             |                                                  | to the bfloat16 that is stored; less error  |
| W4A16_ASYM scale and zero   | `high - low`, `/ 15` and `low / scale` are each  | in float32, rounded once                    |
| point                       | rounded to bfloat16                              |                                             |
| NVFP4 global scale          | `1 / max` and `* 2688` in bfloat16; the least    | in float32; the least of q, k and v and of  |
|                             | of q, k and v and of gate and up for all         | gate and up for all                         |
| NVFP4 scale                 | `max / 6` in bfloat16, then `* global`           | in float32                                  |

Float32 scales are what wrapq's own files keep. On the shipped model's weights `scale=bfloat16`, for a model in bfloat16,
takes 8 % off the squared error of an exported W8A8 and 0.1 % off that of W4A16.

MXFP4 and MXFP8 are equal to the bit, and with the scales given the NVFP4 codes. Each difference is asserted: both sides
are recomputed here from the weights, in plain torch and in the dtype that the table says.

Static activations agree, but for the last bits, where both calibrate on the float model: schedule `parallel`, and
llm-compressor's pipeline `basic`. It observes the inputs of its preset FP8 as `minmax` does, and a cache without an
observer of its own by a moving average (`averaging_constant` 0.01), which is `ema(momentum=0.99)`.

The peer runs in its own environment: `WRAPQ_PEER_PYTHON` names its interpreter, and without it one is installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

import wrapq
from tests.export.stored import Layer, Tensors, as_bytes, bits, bytes_of, rounded, tiles
from tests.exports import export_of
from tests.models import DEMO
from tests.peers.environment import peer_python, run_oneshots
from wrapq.quant.qparams import QParams
from wrapq.quant.spec import QuantSpec
from wrapq.wrappers.fused_layers import siblings

pytest.importorskip("compressed_tensors")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SAMPLES, LENGTH = 16, 128
HALF = "bfloat16"
CACHE = "fp8_e4m3:tensor:sym:ema(momentum=0.99)"
CACHE_RULE = f"+rules.cache={{match: {{type: Attention}}, points: {{key: '{CACHE}', value: '{CACHE}'}}}}"
CACHE_ARGS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@dataclass(frozen=True)
class Scheme:
    """The spec of its weights, and the dtypes of the models it is tried on."""

    weight: str
    dtypes: tuple[str, ...] = ("float32", HALF)
    data: bool = False


SCHEMES = {
    "W8A8": Scheme("int8:channel:sym"),
    "W8A16": Scheme("int8:g128:sym", ("float32",)),
    "W4A16": Scheme("int4:g128:sym"),
    "W4A8": Scheme("int4:g128:sym", ("float32",)),
    "W4A16_ASYM": Scheme("int4:g128:asym"),
    "FP8_DYNAMIC": Scheme("fp8_e4m3:channel:sym"),
    "FP8_BLOCK": Scheme("fp8_e4m3:b128x128:sym"),
    "FP8": Scheme("fp8_e4m3:tensor:sym", ("float32",), data=True),
    "KV8": Scheme("", ("float32",), data=True),
    "MXFP4": Scheme("mxfp4", (HALF,)),
    "MXFP8": Scheme("mxfp8", (HALF,)),
    "NVFP4A16": Scheme("nvfp4", (HALF,)),
}
Reader = Callable[[str, str], Tensors]


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of token ids, in the order in which a walk with seed 0 takes them."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    ids = torch.randint(3, 2048, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(7))
    save_file({"ids": ids}, path)
    return path


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory, tokens: Path, worker_id: str) -> Reader:
    """What llm-compressor saves for a scheme and a dtype; all of it is made in one process, once for all workers."""
    alone = worker_id == "master"
    folder = tmp_path_factory.mktemp("peer") if alone else tmp_path_factory.getbasetemp().parent / "peer"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))
            save_file({"ids": load_file(tokens)["ids"][order].contiguous()}, folder / "ids.safetensors")
            jobs = [_job(name, dtype, folder) for name, scheme in SCHEMES.items() for dtype in scheme.dtypes]
            answers = list(run_oneshots(peer_python(folder / "env"), jobs, folder))
            assert not [answer for answer in answers if "error" in answer]
            shutil.rmtree(folder / "env", ignore_errors=True)  # gigabytes
            (folder / "done").touch()
    return lambda name, dtype: load_file(folder / dtype / name / "model.safetensors")


def _job(name: str, dtype: str, folder: Path) -> dict[str, Any]:
    scheme = {"kv_cache_scheme": CACHE_ARGS} if name == "KV8" else {"scheme": name}
    modifier = {"targets": ["Linear"], "ignore": ["lm_head"], **scheme}
    recipe = json.dumps({"s_stage": {"m_modifiers": {"QuantizationModifier": modifier}}})
    job = {"model": str(DEMO), "dtype": dtype, "out": str(folder / dtype / name), "recipe": recipe}
    return job | ({"tokens": str(folder / "ids.safetensors"), "pipeline": "basic"} if SCHEMES[name].data else {})


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Reader:
    """What wrapq exports for a scheme and a dtype."""
    folder = tmp_path_factory.mktemp("ours")
    data = ["calibration=tokens", f"calibration.path={tokens}", f"calibration.samples={SAMPLES}"]
    data += [f"calibration.seq_len={LENGTH}", "calibration.schedule=parallel"]
    small = ["evaluation.tokens=512", "evaluation.seq_len=128", "tracking=none"]
    nearest = ["~stack.smooth", "algorithm@stack.round=rtn"]

    @cache
    def export(name: str, dtype: str) -> Tensors:
        if name == "KV8":
            recipe, own = (
                "w8a8_static",
                ["~rules.linear", "~rules.head", "~stack.smooth", "~stack.round", CACHE_RULE, *data],
            )
        else:
            recipe, own = ("w8a8_static", [*nearest, *data]) if SCHEMES[name].data else ("w4a16_rtn", [])
            own = [f"scheme@rules.linear={name.lower()}", *own]
        target = [
            "export=compressed_tensors",
            "export.compressed_tensors={reader: transformers, beside_float: false}",
            f"paths.outputs={folder}/{dtype}/{name}",
        ]
        run = wrapq.run(recipe, [f"model.dtype={dtype}", *own, *small, *target])
        return load_file(export_of(run).path / "model.safetensors")

    return export


@pytest.fixture(scope="session")
def weights() -> Tensors:
    """The float weights of the linear layers by the name of the layer; they are bfloat16."""
    tensors = load_file(DEMO / "model.safetensors")
    return {name.removesuffix(".weight"): tensor for name, tensor in tensors.items() if "_proj.weight" in name}


def names_of(dtype: str, *without: str) -> list[str]:
    return [name for name, scheme in SCHEMES.items() if dtype in scheme.dtypes and name not in without]


def unpacked(tensors: Tensors) -> Tensors:
    """The same with packed four bits as the peer stores them where inputs are integers: one int8 for each weight."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed = [name.removesuffix("_packed") for name in tensors if name.endswith(".weight_packed")]
    codes = {n: unpack_from_int32(tensors[f"{n}_packed"], 4, torch.Size(tensors[f"{n}_shape"])) for n in packed}
    return {n: t for n, t in tensors.items() if not n.endswith(("_packed", "_shape"))} | codes


def differing(ours: Tensors, theirs: Tensors) -> list[str]:
    """The names of the tensors that are not equal to the bit."""
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    return [name for name, tensor in ours.items() if not torch.equal(bits(tensor), bits(theirs[name]))]


@pytest.mark.parametrize("name", names_of("float32", "W4A16_ASYM", "FP8", "KV8"))
def test_a_float32_model(name: str, ours: Reader, theirs: Reader) -> None:
    found = ours(name, "float32")  # wrapq packs W4A8, as vLLM reads it too, in half the bytes
    assert not differing(unpacked(found) if name == "W4A8" else found, theirs(name, "float32"))


@pytest.mark.parametrize(("name", "parts"), [("FP8", {"input_scale"}), ("KV8", {"k_scale", "v_scale"})])
def test_static_activations_of_a_float32_model(name: str, parts: set[str], ours: Reader, theirs: Reader) -> None:
    found, expected = ours(name, "float32"), theirs(name, "float32")
    assert {part.rpartition(".")[2] for part in differing(found, expected)} <= parts
    scales = [part for part in found if part.rpartition(".")[2] in parts]
    assert len(scales) == {"FP8": 28, "KV8": 8}[name]
    for part in scales:  # the forwards may run other kernels: llm-compressor's come with a mask
        torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=0)


def test_zero_points_of_a_float32_model(ours: Reader, theirs: Reader, weights: Tensors) -> None:
    found, expected = ours("W4A16_ASYM", "float32"), theirs("W4A16_ASYM", "float32")
    assert {name.rpartition(".")[2] for name in differing(found, expected)} == {"weight_packed"}
    spec, others = QuantSpec.parse("int4:g128:asym"), 0
    for name, weight in weights.items():
        mine, other = Layer(found, name, spec, weight.shape), Layer(expected, name, spec, weight.shape)
        steps, zero_point = weight.float() / mine.each(mine.scale), mine.each(mine.zero_point)
        assert torch.equal(mine.codes, (steps.round() + zero_point).clamp(-8, 7))
        assert torch.equal(other.codes, (steps + zero_point).round().clamp(-8, 7))
        assert float((mine.codes - other.codes).abs().max()) <= 1
        others += int((mine.codes != other.codes).sum())
    assert 0 < others < 2e-3 * sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize("name", ["W8A8", "W4A16", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_symmetric_grids_of_a_bfloat16_model(name: str, ours: Reader, theirs: Reader, weights: Tensors) -> None:
    found, expected, spec = ours(name, HALF), theirs(name, HALF), QuantSpec.parse(SCHEMES[name].weight)
    assert {part.rpartition(".")[2] for part in differing(found, expected)} <= {"weight", "weight_packed"}
    errors = torch.zeros(2)
    for part, weight in weights.items():
        mine, other = Layer(found, part, spec, weight.shape), Layer(expected, part, spec, weight.shape)
        scale = tiles(weight.float(), spec).abs().amax(-1) / spec.dtype.half_range
        assert torch.equal(mine.scale, scale.bfloat16())
        assert torch.equal(mine.codes, rounded(weight.float() / mine.each(scale), spec))
        assert torch.equal(other.codes, rounded(weight / other.each(other.scale), spec))
        errors += torch.tensor([mine.error(weight), other.error(weight)])
    assert errors[0] < errors[1]


def test_zero_points_of_a_bfloat16_model(ours: Reader, theirs: Reader, weights: Tensors) -> None:
    spec = QuantSpec.parse("int4:g128:asym")
    for name, weight in weights.items():
        groups = tiles(weight, spec)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        mine, other = (Layer(read("W4A16_ASYM", HALF), name, spec, weight.shape) for read in (ours, theirs))
        half = (high - low) / 15
        assert torch.equal(other.scale, half)
        assert torch.equal(other.zero_point, (-8 - low / half).clamp(-8, 7).round().float())
        assert torch.equal(
            other.codes, rounded(weight / other.each(half) + other.each(other.zero_point).bfloat16(), spec)
        )
        scale = (high.float() - low.float()) / 15
        zero_point = (-8 - low.float() / scale).round()
        assert torch.equal(mine.scale, scale.bfloat16())
        assert torch.equal(mine.zero_point, zero_point)
        steps = (weight.float() / mine.each(scale)).round()
        assert torch.equal(mine.codes, (steps + mine.each(zero_point)).clamp(-8, 7))


@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_powers_of_two(name: str, ours: Reader, theirs: Reader) -> None:
    assert not differing(ours(name, HALF), theirs(name, HALF))


def test_global_scales(ours: Reader, theirs: Reader, weights: Tensors) -> None:
    found, expected, spec = ours("NVFP4A16", HALF), theirs("NVFP4A16", HALF), QuantSpec.parse("nvfp4")
    for name, weight in weights.items():
        largest = torch.stack([weights[sibling].abs().amax() for sibling in siblings(name)]).amax()
        bound = tiles(weight, spec).abs().amax(-1)
        for tensors, whole, bounds in (
            (expected, 2688 / largest, bound),
            (found, 2688 / largest.float(), bound.float()),
        ):
            global_scale = whole.float().reshape(1)
            assert torch.equal(tensors[f"{name}.weight_global_scale"], global_scale)
            scale = (bounds / 6 * global_scale).clamp(max=448).to(torch.float8_e4m3fn)
            assert torch.equal(bits(tensors[f"{name}.weight_scale"]), bits(scale))
            qparams = QParams(spec, scale.float(), global_scale=global_scale)
            assert torch.equal(bytes_of(tensors, name), as_bytes(qparams, weight))

"""Blocks brought in one at a time: the bits of a run with the whole model in memory, in a fraction of its memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wrapq
from tests.engine.record import only_run, status
from tests.models import random_model, without_weights
from wrapq.engine.record import RunResult
from wrapq.errors import ModelError, PlanError

SMALL = (
    "model=hf",
    "calibration=demo",
    "calibration.samples=8",
    "calibration.batch_size=4",
    "calibration.seq_len=64",
    "evaluation.tokens=512",
    "tracking=none",
    "runtime.kernels=reference",
)
NO_DATA = "w4a16_rtn"
"""A recipe that looks at no data unless it is given activation ranges."""
GROUPS = "rules.linear.weight=int4:g32:sym"
FLOATS = ("calibration.schedule=parallel", "model.dtype=bfloat16")
RANGES = ("rules.linear.input=int8:tensor:asym", "+algorithm@stack.ranges=ranges")
CONVOLUTIONS = "+rules.conv={match: {type: Conv}, weight: int4:channel:sym}"
CASES = {
    "llama, sequential, activations too": ("llama", "w4a16_gptq", (GROUPS, *RANGES)),
    "llama, parallel, bfloat16": (
        "llama",
        "w4a16_gptq",
        (GROUPS, "calibration.schedule=parallel", "model.dtype=bfloat16"),
    ),
    "opt, biases and tied head": ("opt", "w4a16_gptq", (GROUPS,)),
    "gpt2, nothing calibrated": ("gpt2", NO_DATA, (GROUPS,)),
    "qwen3, cross term": ("qwen3", "w4a16_gptq", (GROUPS, "stack.round.asymmetric=0.5")),
    "llama, every point and norm": ("llama", "int16_activations", ()),
    "depthwise convolutions": ("recurrent_gemma", "w4a16_gptq", (GROUPS, CONVOLUTIONS)),
}


def run(model: Path, outputs: Path, load: str, recipe: str, *more: str) -> RunResult:
    places = (f"model.path={model}", f"paths.outputs={outputs}", f"runtime.load={load}")
    small = [word for word in SMALL if recipe != NO_DATA or not word.startswith("calibration")]
    result = wrapq.run(recipe, [*small, *places, *more])
    assert result is not None
    return result


PLAIN = ("llama, sequential, activations too", "opt, biases and tied head", "gpt2, nothing calibrated")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in PLAIN else pytest.mark.slow) for c in CASES])
def test_the_same_bits_as_the_whole_model(case: str, tmp_path: Path, threads: None) -> None:
    family, recipe, more = CASES[case]
    model = random_model(family, tmp_path / "model", num_hidden_layers=3)
    whole = run(model, tmp_path / "whole", "whole", recipe, *more)
    streamed = run(model, tmp_path / "streamed", "streaming", recipe, *more)
    assert streamed.digests == whole.digests
    assert streamed.metrics == whole.metrics
    for name in ("config.json", "modules.json", "qparams.safetensors"):
        assert (streamed.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    described = [json.loads((result.folder / "manifest.json").read_text()) for result in (whole, streamed)]
    assert all(manifest.pop("files") for manifest in described) and described[0] == described[1]
    ids = torch.randint(3, 2000, (2, 16))
    outputs = [wrapq.load(result.folder)(input_ids=ids).logits for result in (whole, streamed)]
    assert torch.equal(*outputs)
    assert not (streamed.folder / "resume").exists()


@pytest.mark.parametrize(
    ("family", "rules"),
    [("llama", (GROUPS,)), pytest.param("recurrent_gemma", (GROUPS, CONVOLUTIONS), marks=pytest.mark.slow)],
)
def test_what_another_run_gathered_is_read(family: str, rules: tuple[str, ...], tmp_path: Path, threads: None) -> None:
    model = random_model(family, tmp_path / "model", num_hidden_layers=3)
    for schedule in ("sequential", "parallel"):
        more = (*rules, f"paths.cache={tmp_path / schedule}", f"calibration.schedule={schedule}")
        whole = run(model, tmp_path / "whole", "whole", "w4a16_gptq", *more)
        streamed = run(model, tmp_path / "streamed", "streaming", "w4a16_gptq", *more)
        assert streamed.digests == whole.digests
        assert any("statistics of 21 of 21 points read" in note for note in streamed.notes)


def test_activations_on_disk_between_blocks(tmp_path: Path, threads: None) -> None:
    model = random_model("llama", tmp_path / "model")
    whole = run(model, tmp_path / "whole", "whole", "w4a16_gptq", GROUPS)
    streamed = run(model, tmp_path / "streamed", "streaming", "w4a16_gptq", GROUPS, "runtime.offload_gb=0")
    assert streamed.digests == whole.digests and streamed.metrics == whole.metrics
    assert sum("went through the disk" in note for note in streamed.notes) == 2  # calibrating, measuring
    assert not list(streamed.folder.glob(".activations*"))


# --- what is refused


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("export=compressed_tensors",), "the export compressed_tensors is made and compared with the whole model"),
        (("runtime.load=strem",), "streaming"),
        (("stack.round.gradient=true",), "gradients go back through the float model as a whole"),
    ],
    ids=["an export", "a misspelt way", "gradients"],
)
def test_what_cannot_be_streamed_is_refused_before_anything_is_written(
    more: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = random_model("llama", tmp_path / "model")
    with pytest.raises((PlanError, wrapq.WrapqError), match=message):
        run(model, tmp_path / "out", "streaming", "w4a16_gptq", GROUPS, *more)
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = random_model("llama", tmp_path / "model")
    with pytest.raises(PlanError, match="several processes cannot stream one model"):
        run(model, tmp_path / "out", "streaming", "w4a16_gptq", GROUPS)


def test_a_checkpoint_that_transformers_would_convert(tmp_path: Path) -> None:
    model = random_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.fused"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors are not in the weights under the names .*layers\.1\.mlp\.up_proj"):
        run(model, tmp_path / "out", "streaming", "w4a16_gptq", GROUPS)


def test_no_weights_and_damaged_weights(tmp_path: Path) -> None:
    empty = without_weights(tmp_path / "empty")
    with pytest.raises(ModelError, match=r"no safetensors files in it, which runtime\.load=streaming reads from"):
        run(empty, tmp_path / "out", "streaming", NO_DATA, GROUPS)
    model = random_model("llama", tmp_path / "model")
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[:-5000])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        run(model, tmp_path / "out", "streaming", NO_DATA, GROUPS)


def test_a_failure_while_saving_leaves_no_part_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("llama", tmp_path / "model")

    def fail(*_: object) -> None:
        raise ModelError("the check failed")

    monkeypatch.setattr("wrapq.engine.save._check_saved", fail)
    with pytest.raises(ModelError, match="the check failed"):
        run(model, tmp_path / "out", "streaming", NO_DATA, GROUPS)
    folder = only_run(tmp_path / "out")
    assert status(folder)["status"] == "FAILED"
    assert not list(folder.glob("model*")) and not (folder / "manifest.json").exists()


# --- memory


def write_shards(folder: Path, blocks: int, hidden: int, intermediate: int) -> int:
    """A random Llama in float32, a file for each block, without its ever being whole; the bytes of its weights."""
    without_weights(
        folder,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=hidden // 8,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden)}
    shapes |= {"mlp.down_proj": (hidden, intermediate)}
    norms = ("input_layernorm", "post_attention_layernorm")
    size, places = 0, {}
    for block in range(blocks):
        prefix = f"model.layers.{block}."
        weights = {f"{prefix}{name}.weight": _random(shape, generator) for name, shape in shapes.items()}
        weights |= {f"{prefix}{name}.weight": torch.ones(hidden) for name in norms}
        if block == 0:
            weights["model.embed_tokens.weight"] = _random((2048, hidden), generator)
            weights["model.norm.weight"] = torch.ones(hidden)
            if not json.loads((folder / "config.json").read_text()).get("tie_word_embeddings"):
                weights["lm_head.weight"] = _random((2048, hidden), generator)
        file = f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        save_file(weights, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file)
        size += sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _random(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * shape[1] ** -0.5


LEAST = (
    "calibration.samples=1",
    "calibration.batch_size=1",
    "calibration.seq_len=32",
    "evaluation.tokens=32",
    "evaluation.seq_len=32",
)
"""Little data, so that the weights decide how much memory and time a run takes."""


def peak_of_run(model: Path, outputs: Path, load: str, limit: int = 0) -> int:
    """Peak private memory of a calibrated run in a process of its own, which may have no more than `limit` if not 0.

    Pages of mapped files, as the weights and libraries are, do not count: how many of them stay is for the system to
    say, which takes them back at will. Nor are large pages asked for, which another test of this process may have done:
    they leave larger holes between tensors.
    """
    words = [*SMALL, *LEAST, *RANGES, f"model.path={model}", f"paths.outputs={outputs}", f"runtime.load={load}"]
    script = (
        "import resource, sys\n"
        "limit = int(sys.argv[1])\n"
        "limit and resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "import wrapq\n"
        "wrapq.run('w4a16_rtn', sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", script, str(limit), "runtime.threads=1", GROUPS, *words]
    if private_memory(os.getpid()) is None:
        pytest.skip("this system does not say how much private memory a process has")
    peak, errors = 0, outputs.with_suffix(".errors")
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    with (
        errors.open("w") as said,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment) as process,
    ):
        while process.poll() is None:
            peak = max(peak, private_memory(process.pid) or 0)
            time.sleep(0.002)
    if process.returncode:
        raise MemoryError(errors.read_text()[-3000:])
    return peak


def private_memory(pid: int) -> int | None:
    """Bytes of memory that a process has and that no file stands behind."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@pytest.mark.slow
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    """Beside what a run of a model of next to no weights takes, with all that is imported on the way."""
    size = write_shards(tmp_path / "model", blocks=16, hidden=640, intermediate=1792)
    write_shards(tmp_path / "tiny", blocks=2, hidden=64, intermediate=64)
    baseline = peak_of_run(tmp_path / "tiny", tmp_path / "baseline", "streaming")
    above = peak_of_run(tmp_path / "model", tmp_path / "out", "streaming") - baseline
    assert size > 330e6
    assert above < size / 2, f"{above / 1e6:.0f} MB above the imports for a model of {size / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_gigabytes_in_one_point_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under a limit of the data segment (`ulimit -d`), which counts all private memory, touched or not."""
    limit = 1_200_000_000
    size = write_shards(tmp_path / "model", blocks=40, hidden=1024, intermediate=2816)
    assert size > 2e9
    peak = peak_of_run(tmp_path / "model", tmp_path / "out", "streaming", limit)
    facts = status(only_run(tmp_path / "out"))
    assert facts["status"] == "FINISHED" and peak < limit
    with capsys.disabled():
        print(f"model {size / 1e6:.0f} MB, private memory {peak / 1e6:.0f} MB, seconds {facts['seconds']}")
    quantized = wrapq.load(only_run(tmp_path / "out"))
    assert torch.isfinite(quantized(input_ids=torch.arange(3, 40)[None]).logits).all()
    with pytest.raises(MemoryError, match=r"(?i)alloc|memory"):  # otherwise this would prove nothing
        peak_of_run(tmp_path / "model", tmp_path / "whole", "whole", limit)

"""Loading an export as its users will: in a fresh process, by transformers, with nothing of wrapq imported.

As a script, `reload.py FOLDER IDS LOGITS DEVICE` reads the token ids [B, T] in the file IDS and leaves the logits
[B, T, V] in the file LOGITS. Whatever is wrong ends it with a message on the last line of its standard error.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

PLAIN, DEQUANTIZED, FLOAT_CACHE, TRANSFORMED = "plain", "dequantized", "float cache", "transformed"
CONVERTED = "converted"
"""Loaded as it is; or only with every weight dequantized while it is loaded, without the scales of the cache, with the
rotations at each forward put in afterwards, with transformers told how experts are put together, or several of these.
"""
_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_UNWRITTEN = 74  # the exit status, of what errs while it writes
_CACHE_SCALES = (".k_scale", ".v_scale")
_MATRIX = "_input.weight"
MEASURED = "measured/"
"""As in `wrapq.export.stopwatch`."""


class Answer(NamedTuple):
    """What a script found.

    Attributes:
        logits: under `plain`, or what of `dequantized`, `float cache`, `transformed` and `converted` the export had to
            be loaded with, joined by `, `; nothing where it could not be loaded.
        reason: why it could not.
        measured: `first_token_ms`, `token_ms` and `peak_mb`, as `wrapq.export.stopwatch` has them.
        tokens: int64 [1, N], what the model goes on with after the first sequence; None where it is no language model.
    """

    logits: dict[str, torch.Tensor]
    reason: str = ""
    measured: Mapping[str, float] = {}
    tokens: torch.Tensor | None = None


def read(folder: Path, ids: torch.Tensor, device: str, script: str = __file__) -> Answer:
    """What transformers, or another `script` that is started as this one is, computes from `folder` for `ids` [B, T];
    see `ask`."""
    return ask(folder, {"ids": ids}, device, script)


def ask(folder: Path, given: Mapping[str, torch.Tensor], device: str, script: str) -> Answer:
    """What a `script` that is started as this one is computes from `folder` for the tensors that it is `given`.

    Raises:
        OSError: the folder for temporary files cannot be written or is full.
    """
    threads = str(torch.get_num_threads())  # as many as here, since sums depend on how work is divided
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        asked.write_bytes(
            save({name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in given.items()})
        )
        # -P: this file's neighbours are no modules for it to import
        command = [sys.executable, "-P", script, str(folder.resolve()), str(asked), str(answered), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode == 0:
            return read_answer(answered)
    lines = done.stderr.strip().splitlines()
    if done.returncode == _UNWRITTEN:
        raise OSError(lines[-1])
    return Answer({}, lines[-1] if lines else f"exit status {done.returncode}")


def read_answer(path: Path) -> Answer:
    """What a script wrote to `path`."""
    found = load_file(path)
    measured = {name.removeprefix(MEASURED): found.pop(name) for name in list(found) if name.startswith(MEASURED)}
    tokens = measured.pop("tokens", None)
    return Answer(found, "", {name: float(value) for name, value in measured.items()}, tokens)


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    from transformers import CompressedTensorsConfig

    converted = [CONVERTED] if _convert_experts(Path(folder)) else []
    try:
        model, how = _load(folder)
    except (RuntimeError, ValueError) as error:
        first = f"{type(error).__name__}: {' '.join(str(error).split())}"
        try:
            model, how = _load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
            how = [DEQUANTIZED, *how]
        except (RuntimeError, ValueError):
            sys.exit(first)
    tokens = load_file(ids)["ids"]
    model.to(device)

    @torch.no_grad()
    def run(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu().contiguous()

    output = run(tokens)
    stopwatch = runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    prompt = tokens[:1].numpy()
    if model.can_generate():
        measured = stopwatch["measured"](lambda ids, count: greedy(model, ids, count), prompt)
    else:
        measured = stopwatch["measured_anew"](lambda ids: run(torch.from_numpy(ids)).numpy(), prompt)
    written = {
        ", ".join([*how, *converted]) or PLAIN: output,
        **{name: torch.from_numpy(t) for name, t in measured.items()},
    }
    try:
        Path(logits).write_bytes(save(written))
    except OSError as error:
        traceback.print_exception(error)
        sys.exit(_UNWRITTEN)


def greedy(model: Any, prompt: Any, count: int) -> Any:
    """`count` tokens [1, N] that a model of transformers goes on with after `prompt` [1, T], arrays both."""
    from transformers import GenerationConfig

    ids = torch.from_numpy(prompt).to(model.device)
    config = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return found[:, ids.shape[1] :].cpu().numpy()


def _load(folder: str, **options: Any) -> tuple[Any, list[str]]:
    """The model, and what of `float cache` and `transformed` it is."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    kind: Any = AutoModelForCausalLM
    if type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) not in kind._model_mapping:
        kind = AutoModelForMultimodalLM
    loaded: Any = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False, **options)
    model, report = loaded
    unread = {key for key in report["unexpected_keys"] if key.endswith(_CACHE_SCALES)}
    how = []
    if unread and not any(name.endswith(_CACHE_SCALES) for name in model.state_dict()):
        how.append(FLOAT_CACHE)
        report["unexpected_keys"] = set(report["unexpected_keys"]) - unread
    if transformed := _transform(model, Path(folder), set(report["unexpected_keys"])):
        how.append(TRANSFORMED)
        report["unexpected_keys"] = set(report["unexpected_keys"]) - transformed
    faults = [f"{fault}: {', '.join(sorted(map(str, report[fault]))[:5])}" for fault in _FAULTS if report.get(fault)]
    if faults:
        raise ValueError("; ".join(faults))
    return model.eval(), how


def _convert_experts(folder: Path) -> bool:
    """Tell transformers how to make its tensors of experts that the checkpoint has one by one, where it does not know
    itself; whether that was so."""
    from transformers import conversion_mapping

    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name.partition(".experts.0.")[2] for name in file.keys()}  # noqa: SIM118
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    known = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    if found == {""} or any(".experts.*." in str(getattr(step, "source_patterns", "")) for step in known):
        return False
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter, WeightRenaming

    merge, one, steps = MergeModulelist(dim=0), "experts.*.", list[Any]()
    if any(name.startswith("gate_proj.weight") for name in found):
        both = [f"{one}gate_proj.weight", f"{one}up_proj.weight"]
        steps += [
            WeightConverter(both, "experts.gate_up_proj", [merge, Concatenate(dim=1)]),
            WeightConverter(f"{one}down_proj.weight", "experts.down_proj", [merge]),
        ]
    elif "w13_weight_packed" in found or "gate_up_proj.weight_scale" in found:
        for part, name in {"gate_up_proj": "w13", "down_proj": "w2"}.items():
            packed = rf"experts\.(\d+)\.{name}_weight_packed", rf"experts.\1.{part}.weight_packed"
            steps += [
                WeightRenaming(*packed),
                WeightConverter(f"{one}{part}.weight", f"experts.{part}", [merge, Transpose(1, 2)]),
                WeightConverter(f"{one}{part}.bias", f"experts.{part}_bias", [merge]),
            ]
    else:
        return False
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, [*known, *steps], overwrite=True)
    return True


def _transform(model: Any, folder: Path, unread: set[str]) -> set[str]:
    """Put the transforms of the checkpoint into `model` where transformers left their tensors `unread`; which those
    are."""
    section = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("transform_config")
    matrices = {name for name in unread if name.endswith(_MATRIX)} if section else set()
    if matrices:
        from compressed_tensors.transform import TransformConfig, apply_transform_config

        apply_transform_config(model, TransformConfig.model_validate(section))
        tensors = load_file(folder / "model.safetensors")
        for name in matrices:
            model.get_parameter(name).data.copy_(tensors[name])
    return matrices


if __name__ == "__main__":
    main(*sys.argv[1:])

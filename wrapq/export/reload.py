"""Loading an export as its users will: in a fresh process, by transformers, with nothing of wrapq imported.

As a script, `reload.py FOLDER IDS LOGITS DEVICE` reads the token ids [B, T] in the file IDS and leaves the logits
[B, T, V] in the file LOGITS. Whatever is wrong ends it with a message on the last line of its standard error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

PLAIN, DEQUANTIZED, FLOAT_CACHE = "plain", "dequantized", "float cache"
"""Loaded as it is; only with every weight dequantized while it is loaded; without the scales of the cache, or both."""
_FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_UNWRITTEN = 74  # the exit status, of what errs while it writes
_CACHE_SCALES = (".k_scale", ".v_scale")


def read(folder: Path, ids: torch.Tensor, device: str, script: str = __file__) -> tuple[dict[str, torch.Tensor], str]:
    """The logits that transformers, or another `script` that is started as this one is, computes from `folder` for
    `ids` [B, T].

    Returns:
        The logits under `plain`, or what of `dequantized` and `float cache` the export had to be loaded with, joined by
        `, `; or nothing, and why.

    Raises:
        OSError: the folder for temporary files cannot be written or is full.
    """
    threads = str(torch.get_num_threads())  # as many as here, since sums depend on how work is divided
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "ids.safetensors"), Path(scratch, "logits.safetensors")
        asked.write_bytes(save({"ids": ids.cpu().contiguous()}))
        # -P: this file's neighbours are no modules for it to import
        command = [sys.executable, "-P", script, str(folder.resolve()), str(asked), str(answered), device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode == 0:
            return load_file(answered), ""
    lines = done.stderr.strip().splitlines()
    if done.returncode == _UNWRITTEN:
        raise OSError(lines[-1])
    return {}, lines[-1] if lines else f"exit status {done.returncode}"


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    from transformers import CompressedTensorsConfig

    try:
        how, (model, blind) = [], _load(folder)
    except (RuntimeError, ValueError) as error:
        first = f"{type(error).__name__}: {' '.join(str(error).split())}"
        try:
            how = [DEQUANTIZED]
            model, blind = _load(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
        except (RuntimeError, ValueError):
            sys.exit(first)
    with torch.no_grad():
        output = model.to(device)(input_ids=load_file(ids)["ids"].to(device), use_cache=False).logits
    how += [FLOAT_CACHE] if blind else []
    try:
        Path(logits).write_bytes(save({", ".join(how) or PLAIN: output.float().cpu().contiguous()}))
    except OSError as error:
        traceback.print_exception(error)
        sys.exit(_UNWRITTEN)


def _load(folder: str, **options: Any) -> tuple[Any, bool]:
    """The model, and whether it has no place for the scales of the cache."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

    kind: Any = AutoModelForCausalLM
    if type(AutoConfig.from_pretrained(folder, trust_remote_code=False)) not in kind._model_mapping:
        kind = AutoModelForMultimodalLM
    loaded: Any = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False, **options)
    model, report = loaded
    unread = {key for key in report["unexpected_keys"] if key.endswith(_CACHE_SCALES)}
    blind = bool(unread) and not any(name.endswith(_CACHE_SCALES) for name in model.state_dict())
    if blind:
        report["unexpected_keys"] = set(report["unexpected_keys"]) - unread
    faults = [f"{fault}: {', '.join(sorted(map(str, report[fault]))[:5])}" for fault in _FAULTS if report.get(fault)]
    if faults:
        raise ValueError("; ".join(faults))
    return model.eval(), blind


if __name__ == "__main__":
    main(*sys.argv[1:])

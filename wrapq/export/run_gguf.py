"""Running a GGUF file as its users will: by llama.cpp in a fresh process, with nothing of wrapq imported.

As a script, `run_gguf.py FOLDER IDS LOGITS DEVICE`, as `wrapq.export.reload`; it also compares the tokens that
llama.cpp and the tokenizer in FOLDER make of a text.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

MODEL = "model.gguf"
"""The file of a model."""
_TEXT = "I've read 1234 files, it's 9.5 % of them:\n\n\tdef f(x):  return x + 1  # café, 你好 🙂\nDONE"
_ERROR = 4  # of the levels of llama.cpp's log


def main(folder: str, ids: str, logits: str, device: str) -> None:
    """See the module."""
    import llama_cpp

    tokens = load_file(ids)["ids"]
    stopwatch = runpy.run_path(str(Path(__file__).with_name("stopwatch.py")))
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None
    options: dict[str, Any] = {
        "model_path": str(Path(folder, MODEL)),
        "n_ctx": tokens.shape[1] + stopwatch["TOKENS"],
        "n_threads": threads,
        "n_threads_batch": threads,
        "n_gpu_layers": -1 if device.startswith("cuda") else 0,
        "verbose": False,
    }
    with _errors() as messages:
        try:
            model: Any = llama_cpp.Llama(**options)
        except ValueError:
            sys.exit(" ".join("".join(messages).split()))
        with closing(model):
            if reason := other_tokens(model, folder, tokens[0]):
                sys.exit(reason)
            measured = stopwatch["measured"](partial(_generate, model), tokens[:1])
        values = []
        with closing(llama_cpp.Llama(**options, logits_all=True)) as model:
            for sequence in tokens:
                model.reset()
                model.eval(sequence.tolist())
                values.append(model.scores[: len(sequence)].copy())
    Path(logits).write_bytes(save({stopwatch["LOGITS"]: np.stack(values), **measured}))


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What llama.cpp says of errors in the block, after which it must not call what Python frees."""
    import llama_cpp

    messages: list[str] = []
    hears = llama_cpp.llama_log_callback(
        lambda level, text, _: messages.append(text.decode(errors="replace")) if level == _ERROR else None
    )
    llama_cpp.llama_log_set(hears, None)
    try:
        yield messages
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)


def _generate(model: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    """`count` tokens [1, N] that the model goes on with after a `prompt` [1, T], each the likeliest."""
    import llama_cpp

    model.reset()
    found = prompt[0].tolist()
    for last in range(count):
        model.eval(found if not last else found[-1:])
        values = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        found.append(int(np.ctypeslib.as_array(values, (model.n_vocab(),)).argmax()))
    return np.array([found[prompt.shape[1] :]])


def other_tokens(model: Any, folder: str, ids: np.ndarray) -> str | None:
    """Where llama.cpp makes other tokens of the text of `ids` [T], or of another one; None where it makes the same."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    for text in (_TEXT, tokenizer.decode(ids.tolist())):
        ours, theirs = tokenizer.encode(text).ids, model.tokenize(text.encode(), special=True)
        if ours != theirs:
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), 0)
            around = tokenizer.decode(ours[max(0, at - 2) : at + 3])
            return f"it makes other tokens of {around!r} than the tokenizer of the model"
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])

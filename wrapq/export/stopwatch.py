"""How long a language model takes in a runtime, and the tokens that it goes on with.

A script that runs an export loads this file by its path, so that nothing of wrapq is imported there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MEASURED = "measured/"
"""Before the names of what is measured, among what a script writes."""
LOGITS, PAST, PRESENT = "logits", "past_key_values", "present"
"""What models that hand keys and values over call their logits, and those of the tokens before and of all."""
INPUT, OUTPUT = "input.", "output."
"""Before the numbers of the tensors that a module takes and gives that is no language model."""
TOKENS, _TIMES, _ENOUGH, _CALLS = 32, 3, 3.0, 5
Arrays = dict[str, np.ndarray]


def inputs(tokens: np.ndarray, past: Arrays) -> Arrays:
    """What such a model is given: `tokens` [B, T], and what it gave of those before, keys and values [B, H, P, D]."""
    before = next(iter(past.values())).shape[2]
    mask = np.ones((len(tokens), before + tokens.shape[1]), np.int64)
    return {"input_ids": tokens, "attention_mask": mask, **past}


def greedy(run: Callable[[Arrays], Arrays], prompt: np.ndarray, past: Arrays, count: int) -> np.ndarray:
    """`count` tokens [1, N] that such a model, what `run` makes of its inputs, goes on with after a `prompt` [1, T],
    each the likeliest; `past` is that of no tokens."""
    found = [prompt]
    for _ in range(count):
        done = run(inputs(found[-1], past))
        found.append(done.pop(LOGITS)[:, -1:].argmax(-1))
        past = {name.replace(PRESENT, PAST): kept for name, kept in done.items()}
    return np.concatenate(found[1:], 1)


def greedy_anew(run: Callable[[np.ndarray], np.ndarray], prompt: np.ndarray, count: int) -> np.ndarray:
    """As `greedy`, of what keeps nothing of the tokens before: each is found by `run` of all of them, which gives
    logits [1, T, V] of tokens [1, T]."""
    tokens = prompt
    for _ in range(count):
        tokens = np.concatenate([tokens, run(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, prompt.shape[1] :]


def measured(
    generate: Callable[[np.ndarray, int], np.ndarray], prompt: np.ndarray, longest: int | None = None
) -> dict[str, np.ndarray]:
    """The time in ms to the first token after a `prompt` [1, T] and for each of those after it, medians of several; the
    most memory that the process took, in MB of a million bytes, which Linux tells; and the tokens.

    Args:
        generate: so many tokens [1, N] after a prompt, each the likeliest.
        prompt: int64 [1, T].
        longest: the most tokens that the model can be given, at least T; as many as it takes when None.
    """
    count = TOKENS if longest is None else min(TOKENS, longest - prompt.shape[1] + 1)
    generate(prompt, min(2, count))  # what is made once is made
    first: list[float] = []
    whole: list[float] = []
    tokens, began = prompt, time.perf_counter()
    while len(first) < _TIMES and time.perf_counter() - began < _ENOUGH:
        first.append(_seconds(lambda: generate(prompt, 1))[0])
        seconds, tokens = _seconds(lambda: generate(prompt, count))
        whole.append(seconds)
    found = {"first_token_ms": 1000 * statistics.median(first), **_peak()}
    if count > 1:
        found["token_ms"] = 1000 * (statistics.median(whole) - statistics.median(first)) / (count - 1)
    return {f"{MEASURED}tokens": tokens, **_named(found)}


def measured_anew(
    run: Callable[[np.ndarray], np.ndarray], prompt: np.ndarray, longest: int | None = None
) -> dict[str, np.ndarray]:
    """As `measured`, of what keeps nothing of the tokens before; `run` as in `greedy_anew`."""
    return measured(lambda tokens, count: greedy_anew(run, tokens, count), prompt, longest)


def called(run: Callable[[list[Any]], Sequence[np.ndarray]], given: dict[str, Any]) -> Arrays:
    """What a module that is no language model makes of its inputs, by `run` of them in order: the outputs, the time of
    a call in ms, the median of several, and the memory."""
    inputs = [given[f"{INPUT}{i}"] for i in range(len(given))]
    outputs = {f"{OUTPUT}{i}": np.array(each, order="C") for i, each in enumerate(run(inputs))}
    seconds = statistics.median(_seconds(lambda: run(inputs))[0] for _ in range(_CALLS))
    return outputs | _named({"latency_ms": 1000 * seconds, **_peak()})


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _named(figures: dict[str, float]) -> Arrays:
    return {f"{MEASURED}{name}": np.array([value]) for name, value in figures.items()}


def _peak() -> dict[str, float]:
    """What `resource` says on Linux is at least what the process took that started this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return {"peak_mb": kilobytes * 1024 / 1e6}

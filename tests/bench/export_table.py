"""One table of exports: a row for the float model in a runtime, for what wrapq makes of it, and for what peers do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from tests.bench.peer_quantizers import Given, Peer
from wrapq.errors import first_line

_DIGITS = {"KL, nats": 5, "top-1": 4, "cosine": 5, "error": 5, "MB": 2, "first ms": 2, "next ms": 2, "x float": 2,
           "peak MB": 0}  # fmt: skip
_WHAT = ("target", "model", "scheme", "by")
_TIMES = {"first_token_ms": "first ms", "latency_ms": "first ms", "token_ms": "next ms", "peak_mb": "peak MB"}


@dataclass(frozen=True)
class Scheme:
    """What is compared: a recipe of wrapq's, with overrides, and the peers that do the same.

    Attributes:
        calibrated: whether the recipe looks at data.
    """

    recipe: tuple[str, ...]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    calibrated: bool = True


def head() -> None:
    """Print the first lines of the table."""
    columns = [*_WHAT, *_DIGITS]
    _print(columns)
    _print(["---"] * len(columns))


def rows(
    target: str,
    model: str,
    schemes: Mapping[str, Scheme],
    ours: Callable[[Scheme, Path], float],
    judged: Callable[[Path], dict[str, float]],
    given: Given,
) -> None:
    """Measure float, wrapq and the peers, and print a row of each as soon as it is there.

    Args:
        target: the format.
        model: what the model is called.
        schemes: by their names.
        ours: lets wrapq fill a new folder, and says how far the export is off.
        judged: by columns what the export in a folder keeps and costs.
        given: for peers; `ours` is filled in.
    """
    floating, beside = judged(given.floating), given.floating.parent
    _row((target, model, "float", ""), floating)

    def measured(folder: Path) -> dict[str, float]:
        found = judged(folder)
        return found | {"x float": floating["first ms"] / found["first ms"]}

    for name, scheme in schemes.items():
        made = beside / f"{model} {name}"
        error = ours(scheme, made)
        _row((target, model, name, "wrapq"), measured(made) | {"error": error})
        for by, peer in scheme.peers.items():
            with tempfile.TemporaryDirectory(dir=beside) as scratch:
                for file in given.floating.glob("tokenizer*"):
                    Path(scratch, file.name).symlink_to(file)
                try:
                    peer(replace(given, ours=made), Path(scratch))
                    _row((target, model, name, by), measured(Path(scratch)))
                except Exception as failure:  # that a peer fails is a result too
                    _print([target, model, name, by, first_line(failure), *[""] * (len(_DIGITS) - 1)])


def costs(measured: Mapping[str, float]) -> dict[str, float]:
    """What a reading measured, by columns."""
    return {column: measured[name] for name, column in _TIMES.items() if name in measured}


def batches(data: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Inputs by name [S, ...] in batches."""
    for start in range(0, len(next(iter(data.values()))), size):
        yield {name: each[start : start + size] for name, each in data.items()}


def _row(what: tuple[str, ...], figures: Mapping[str, float]) -> None:
    _print([*what, *(f"{figures[name]:.{digits}f}" if name in figures else "" for name, digits in _DIGITS.items())])


def _print(cells: list[str]) -> None:
    print("|", " | ".join(cells), "|", flush=True)

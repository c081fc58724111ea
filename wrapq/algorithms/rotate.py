"""Rotations: outliers are spread over all channels, and the function stays.

R1 turns the residual stream, Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
arXiv:2404.00456, section 4: with norms that only normalize, `n(x Q) = n(x) Q`, so that what writes into the stream is
multiplied by Q and what reads its norms by `Q^T`. A LayerNorm also takes the mean away, which Q must keep. R2, of
Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, turns the heads of the values. Both
are folded into the weights. R3 and R4 of the same paper turn, at each forward, what no weight makes alone: queries and
keys after position encoding, and what products and other functions give linears to read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from wrapq.algorithms.fold_norms import FoldNorms
from wrapq.algorithms.learned_rotation import learn_rotation
from wrapq.calibration.algorithm import ALGORITHMS, RUNS, Found, Placed, Transform, scaled_by
from wrapq.calibration.graph import Feed, Graph, Stream
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon, split_heads
from wrapq.quant.hadamard import Kind, around_ones, rotation
from wrapq.runtime.rotation import OnlineRotation
from wrapq.wrappers.model import Specs


class RotateOptions(BaseModel):
    """Options of `rotate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rotations: tuple[Literal["R1", "R2", "R3", "R4"], ...] = Field(
        ("R1", "R2"),
        min_length=1,
        description="R1 turns the residual stream, R2 the values of each attention head; at each forward, R3 turns "
        "queries and keys, and R4 the other inputs of quantized linears, such as down projections.",
    )
    matrix: Kind = Field(
        "hadamard", description="Hadamard with random signs, where the width has one, or random orthogonal."
    )
    block: int | None = Field(
        None, ge=2, description="R1 and R4 turn so many channels at a time, each block alike; all at once if null."
    )
    learn: int = Field(
        0, ge=0, description="Steps of gradient descent by which R1 is learned on calibration data, from there on."
    )
    seed: int = Field(0, ge=0, description="Of the random signs and matrices.")

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.learn and "R1" not in self.rotations:
            raise ValueError("learn is for R1, which rotations leaves out")
        return self


@ALGORITHMS.register("rotate")
class Rotate(Transform):
    """Turns residual streams, called by their first writers, the heads of values, by the linears that make them, and
    what the points called turn at each forward."""

    Options = RotateOptions
    options: RotateOptions

    @property
    def needs(self) -> tuple[str, ...]:
        """See `Algorithm.needs`."""
        return (RUNS,) if self.options.learn else ()

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        fit: dict[str, str | None] = {}
        if "R2" in self.options.rotations:
            fit |= {feed.producer: _unfit_heads(feed, graph) for feed in _values(graph)}
        if "R3" in self.options.rotations:
            scores = [name for name in specs if {"query", "key"} & set(specs[name])]
            fit |= {f"{name}.key": _unfit_scores(name, graph) for name in scores}
            fit |= {} if scores else {"R3": "no queries or keys are quantized"}
        if "R4" in self.options.rotations:
            folded = [feed for feed in graph.feeds if feed.leaf.kind == "norm"] + _values(graph)
            reached = {reader.module for feed in folded for reader in feed.readers}
            others = [name for name in specs if name in graph.linears and name not in reached]
            fit |= {f"{name}.input": self._unfit_input(name, graph) for name in others}
            fit |= {} if others else {"R4": "no linear is quantized but those that read norms or attention"}
        if "R1" in self.options.rotations:  # last: it may be learned, with the others in place
            fit |= {name: self._unfit_stream(stream, graph) for name, stream in graph.by_stream.items()}
        left = {name: reason for name, reason in fit.items() if reason is not None}
        return Found(tuple(name for name, reason in fit.items() if reason is None), left)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """See `Transform.inputs`."""
        if (turned := _turned(graph, target)) is not None:
            return (turned,)
        norms = graph.by_stream[target].norms if target in graph.by_stream else (target,)
        return tuple(reader.module for norm in norms for reader in graph.by_producer[norm].readers)

    def misplaced(self, graph: Graph, targets: Sequence[str], before: Sequence[Placed]) -> str | None:
        """See `Transform.misplaced`."""
        folded = {name for its in before if isinstance(its.transform, FoldNorms) for name in its.targets}
        streams = [graph.by_stream[target] for target in targets if target in graph.by_stream]
        scaled = scaled_by(before)
        if mixed := [norm for stream in streams for norm in stream.norms if norm in scaled]:
            return f"it needs norms that only normalize, and a stage before it scaled {mixed[0]}; name it first"
        missing = [norm for stream in streams for norm in stream.norms if norm not in folded]
        if not missing:
            return None
        reason = f"it needs norms that only normalize, and no fold_norms before it folds {missing[0]}"
        if missing_tied := [r for norm in missing for r in self._readers(graph, norm) if r in graph.tied]:
            reason += f" ({missing_tied[0]} is tied: fold_norms with untie: true folds it)"
        return reason

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        kind, seed = self.options.matrix, self.options.seed
        if (turned := _turned(surgeon.graph, target)) is not None:
            return self._turn(surgeon, turned)
        stream = surgeon.graph.by_stream.get(target)
        if stream is None:
            feed = surgeon.graph.by_producer[target]
            if feed.heads is not None:
                surgeon.rotate_heads(feed, rotation(feed.heads.shape[1], kind, seed))
            return {"readers": float(len(feed.readers))}
        for name in (*stream.writers, *self.inputs(surgeon.graph, target)):
            surgeon.untie(name)
        size = self.options.block or stream.width
        blocks, centered = torch.arange(stream.width).reshape(-1, size), _centered(stream, surgeon.graph)
        matrix = (around_ones if centered else rotation)(size, kind, seed)
        figures = {"writers": len(stream.writers), "readers": len(self.inputs(surgeon.graph, target))}
        learned: Mapping[str, float] = {}
        if self.options.learn:
            matrix, learned = learn_rotation(surgeon, stream, blocks, matrix, centered, self.options.learn)
        surgeon.rotate_stream(stream, blocks, matrix)
        return {name: float(value) for name, value in figures.items()} | dict(learned)

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        """See `Transform.online`."""
        return tuple(name for target in targets if (name := _turned(graph, target)) is not None)

    def _turn(self, surgeon: Surgeon, name: str) -> Mapping[str, float]:
        scores = surgeon.graph.heads.get(name)
        size = scores or self.options.block or surgeon.graph.linears[name]
        turn = surgeon.turn_inputs if scores is None else surgeon.turn_scores
        turn(name, OnlineRotation.make(size, self.options.matrix, self.options.seed))
        return {"channels": float(size)}

    def _unfit_input(self, name: str, graph: Graph) -> str | None:
        if name in graph.tied:
            return f"{name} is tied to {', '.join(graph.tied[name])}"
        if self.options.block and graph.linears[name] % self.options.block:
            return f"its {graph.linears[name]} channels are no multiple of the block of {self.options.block}"
        return None

    def _readers(self, graph: Graph, norm: str) -> tuple[str, ...]:
        return tuple(reader.module for reader in graph.by_producer[norm].readers)

    def _unfit_stream(self, stream: Stream, graph: Graph) -> str | None:
        if stream.seen_by:
            return f"this stream is also seen by {', '.join(stream.seen_by)}"
        for name, leaf in zip(stream.writers, stream.leaves, strict=True):
            if leaf.kind in ("norm", "batch_norm"):
                return f"the norm {name} writes into this stream, whose channels it scales"
            if leaf.writes is not None and leaf.writes.groups > 1:
                return f"{name} writes into this stream in groups"
        if stream.readers or not stream.norms:
            return f"{', '.join(stream.readers) or 'nobody'} reads this stream, with no norm between"
        for norm in stream.norms:
            feed = graph.by_producer.get(norm)
            if feed is None or not feed.closed or feed.path:
                return f"not all who see the norm {norm} of this stream can be rotated"
            if any(reader.leaf.reads is not None and reader.leaf.reads.groups > 1 for reader in feed.readers):
                return f"what the norm {norm} gives is read in groups"
            if not all(torch.equal(reader.columns, torch.arange(stream.width)) for reader in feed.readers):
                return f"a part of what the norm {norm} gives is read"
        if self.options.block and stream.width % self.options.block:
            return f"its {stream.width} channels are no multiple of the block of {self.options.block}"
        return None


def _values(graph: Graph) -> list[Feed]:
    return [feed for feed in graph.feeds if feed.leaf.kind == "linear" and "attention" in feed.path]


def _turned(graph: Graph, target: str) -> str | None:
    """The module of a point that is turned at each forward; None for targets of another kind."""
    name, _, point = target.rpartition(".")
    return name if (point == "input" and name in graph.linears) or (point == "key" and name in graph.heads) else None


def _unfit_scores(name: str, graph: Graph) -> str | None:
    return None if name in graph.heads else "the width of its heads is not known"


def _unfit_heads(feed: Feed, graph: Graph) -> str | None:
    if more := feed.path - {"attention"}:
        return f"between the values and what reads them there is more than attention: {', '.join(sorted(more))}"
    for name in (feed.producer, *(reader.module for reader in feed.readers)):
        if name in graph.tied:
            return f"{name} is tied to {', '.join(graph.tied[name])}"
    return split_heads(feed)


def _centered(stream: Stream, graph: Graph) -> bool:
    return any(graph.by_producer[norm].leaf.centered for norm in stream.norms)

"""Rotations, which spread outliers over all channels and keep the function.

R1 rotates the residual stream, Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
arXiv:2404.00456, section 4: with norms that only normalize, `n(x Q) = n(x) Q`, so that the writers of the stream are
multiplied by Q and the consumers of its norms by `Q^T`. A LayerNorm also subtracts the mean, which Q must keep. R2, of
Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", arXiv:2405.16406, rotates the heads of the values.
Both are folded into the weights. Where norms write into the stream, as in Gemma 2 and OLMo 2, no Q passes them: what
reads the stream has its input rotated at each forward instead. R3 and R4 of the same paper rotate, at each forward,
what no weight produces alone: queries and keys after position encoding, and the inputs of linears behind products and
other functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.fold_norms import FoldNorms
from wrapq.algorithms.learned_rotation import learn_rotation
from wrapq.algorithms.transform import BATCHES, PlannedTransform, Statistics, Targets, Transform, scaled_targets
from wrapq.graph.dataflow import ChannelEdge, Consumer, Graph, ResidualStream
from wrapq.graph.rewriter import GraphRewriter, split_heads
from wrapq.quant.hadamard import Kind, around_ones, factors, rotation
from wrapq.registry import Options
from wrapq.runtime.rotation import OnlineRotation
from wrapq.wrappers.model import Specs


class RotateOptions(Options):
    """Options of `rotate`."""

    rotations: tuple[Literal["R1", "R2", "R3", "R4"], ...] = Field(
        ("R1", "R2"),
        min_length=1,
        description="R1 rotates the residual stream or, where its writers cannot be, at each forward the inputs of "
        "quantized linears that read it; R2 the values of each attention head; at each forward, R3 rotates queries and "
        "keys, and R4 the other inputs of quantized linears, such as down projections.",
    )
    matrix: Kind = Field(
        "hadamard", description="Hadamard with random signs, where the width has one, or random orthogonal."
    )
    block: int | None = Field(
        None,
        ge=2,
        description="R1 and R4 rotate at most so many channels at a time, each block alike; all at once if null.",
    )
    learn: int = Field(
        0, ge=0, description="Steps of gradient descent by which R1 is learned on calibration data, from there on."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of the random signs and matrices.")

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if self.learn and "R1" not in self.rotations:
            raise ValueError("learn is for R1, which rotations leaves out")
        return self


@ALGORITHMS.register("rotate")
class Rotate(Transform):
    """Rotates residual streams (targets: their first writers), the heads of values (the linears that produce them), and
    inputs and keys at each forward (their points)."""

    Options = RotateOptions
    options: RotateOptions
    offline = "rotations=[R1,R2]"

    def __init__(self, options: RotateOptions | None = None) -> None:
        super().__init__(options)
        self._made: dict[object, OnlineRotation] = {}
        """Rotations at each forward, by their width or, learned, the stream: those alike share their tensors."""

    @property
    def needs(self) -> tuple[str, ...]:
        return (BATCHES,) if self.options.learn else ()

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        reasons: dict[str, str | None] = {}
        if "R2" in self.options.rotations:
            reasons |= {edge.producer: _unfit_heads(edge, graph) for edge in _values(graph)}
        if "R3" in self.options.rotations:
            scores = [name for name in specs if {"query", "key"} & set(specs[name])]
            unknown = "the width of its heads is not known"
            reasons |= {f"{name}.key": None if name in graph.heads else unknown for name in scores}
            reasons |= {} if scores else {"R3": "no queries or keys are quantized"}
        if "R4" in self.options.rotations:
            folded = [edge for edge in graph.edges if edge.layer.kind == "norm"] + _values(graph)
            reached = {consumer.module for edge in folded for consumer in edge.consumers}
            others = [name for name in specs if name in graph.linears and name not in reached]
            reasons |= {f"{name}.input": graph.tied_reason([name]) for name in others}
            reasons |= {} if others else {"R4": "no linear is quantized but those that read norms or attention"}
        if "R1" in self.options.rotations:  # last: it may be learned, with the others in place
            unfit = {name: self._unfit_stream(stream, graph) for name, stream in graph.by_stream.items()}
            norms = [norm for name, reason in unfit.items() if reason for norm in graph.by_stream[name].norms]
            turned = [name for name in _consumers(graph, norms) if name in specs and name in graph.linears]
            reasons |= {f"{name}.input": graph.tied_reason([name]) for name in turned}
            reasons |= {name: reason and f"{reason} (R1 rotates what reads it)" for name, reason in unfit.items()}
        return Targets.where_none(reasons)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        if (module := _rotated_online(graph, target)) is not None:
            return (module,)
        norms = graph.by_stream[target].norms if target in graph.by_stream else (target,)
        return _consumers(graph, norms)

    def folded(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        return tuple(norm for name in targets if name in graph.by_stream for norm in graph.by_stream[name].norms)

    def order_problem(self, graph: Graph, targets: Sequence[str], before: Sequence[PlannedTransform]) -> str | None:
        folded = {name for stage in before if isinstance(stage.transform, FoldNorms) for name in stage.targets}
        norms, scaled = self.folded(graph, targets), scaled_targets(before)
        if mixed := [norm for norm in norms if norm in scaled]:
            return f"it needs norms that only normalize, and a stage before it scaled {mixed[0]}; name it first"
        missing = [norm for norm in norms if norm not in folded]
        if not missing:
            return None
        reason = f"it needs norms that only normalize, and no fold_norms before it folds {missing[0]}"
        if tied := [name for name in _consumers(graph, missing) if name in graph.tied]:
            reason += f" ({tied[0]} is tied: fold_norms with untie: true folds it)"
        return reason

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        if (module := _rotated_online(rewriter.graph, target)) is not None:
            return self._rotate_online(rewriter, module)
        if (stream := rewriter.graph.by_stream.get(target)) is not None:
            return self._rotate_stream(rewriter, stream)
        edge = rewriter.graph.by_producer[target]
        if edge.heads is not None:
            rewriter.rotate_heads(edge, rotation(edge.heads.shape[1], self.options.matrix, self.options.seed))
        return {"readers": float(len(edge.consumers))}

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for target in targets if (name := _rotated_online(graph, target)) is not None)

    def hadamard(self, graph: Graph, targets: Sequence[str]) -> Mapping[str, int]:
        if self.options.matrix != "hadamard":
            return {}
        inputs = [name for name in self.online(graph, targets) if name not in graph.heads]
        known = [name for name in inputs if not (self.options.learn and self._turned_stream(graph, name))]
        sizes = {name: self._size(graph.linears[name]) for name in known}
        return {name: size for name, size in sizes.items() if factors(size)}

    def _rotate_online(self, rewriter: GraphRewriter, module: str) -> Mapping[str, float]:
        graph, figures = rewriter.graph, dict[str, float]()
        head = graph.heads.get(module)
        size = head or self._size(graph.linears[module])
        stream = self._turned_stream(graph, module) if self.options.learn and head is None else None
        key = size if stream is None else stream.name
        if key not in self._made:
            made = OnlineRotation.make(size, self.options.matrix, self.options.seed)
            if stream is not None:
                blocks = torch.arange(stream.width).reshape(-1, size)
                turned = [c for c in _stream_consumers(graph, stream) if self._turns(graph, rewriter.specs, c.module)]
                start = made(torch.eye(size, dtype=torch.double))
                matrix, losses = learn_rotation(rewriter, {}, turned, blocks, start, self.options.learn)
                figures |= losses
                made = OnlineRotation.dense(matrix)
            self._made[key] = made.to(next(rewriter.model.parameters()).device)
        rotate = rewriter.rotate_input_online if head is None else rewriter.rotate_scores_online
        rotate(module, self._made[key].sharing())
        return {"channels": float(size), **figures}

    def _size(self, width: int) -> int:
        """The channels that are rotated at a time: as many as `block` allows that divide `width`, if any, or some less
        for which there is a Hadamard matrix."""
        most = min(self.options.block or width, width)
        sizes = [size for size in range(most, 1, -1) if width % size == 0] or [width]
        near = [size for size in sizes if 4 * size >= sizes[0]]
        return next((size for size in near if self.options.matrix == "orthogonal" or factors(size)), sizes[0])

    def _turned_stream(self, graph: Graph, module: str) -> ResidualStream | None:
        """The stream that a module reads through a norm, where R1 rotates the inputs of what does."""
        for stream in graph.by_stream.values():
            if self._unfit_stream(stream, graph) and module in _consumers(graph, stream.norms):
                return stream
        return None

    def _turns(self, graph: Graph, specs: Specs, name: str) -> bool:
        """Whether R1 may rotate the input of a module."""
        return name in specs and name in graph.linears and graph.tied_reason([name]) is None

    def _rotate_stream(self, rewriter: GraphRewriter, stream: ResidualStream) -> Mapping[str, float]:
        consumers = _consumers(rewriter.graph, stream.norms)
        for name in (*stream.writers, *consumers):
            rewriter.untie(name)
        size = self._size(stream.width)
        blocks = torch.arange(stream.width).reshape(-1, size)
        centered = any(rewriter.graph.by_producer[norm].layer.centered for norm in stream.norms)
        matrix = (around_ones if centered else rotation)(size, self.options.matrix, self.options.seed)
        figures = {"writers": float(len(stream.writers)), "readers": float(len(consumers))}
        if self.options.learn:
            reading = _stream_consumers(rewriter.graph, stream)
            matrix, losses = learn_rotation(
                rewriter, stream.writers, reading, blocks, matrix, self.options.learn, keep_ones=centered
            )
            figures |= losses
        rewriter.rotate_stream(stream, blocks, matrix)
        return figures

    def _unfit_stream(self, stream: ResidualStream, graph: Graph) -> str | None:
        if stream.other_consumers:
            return f"this stream is also seen by {', '.join(stream.other_consumers)}"
        for name, layer in stream.writers.items():
            if layer.kind in ("norm", "batch_norm"):
                return f"the norm {name} writes into this stream, whose channels it scales"
            if layer.produces is not None and layer.produces.groups > 1:
                return f"{name} writes into this stream in groups"
        if stream.direct_consumers or not stream.norms:
            return f"{', '.join(stream.direct_consumers) or 'nobody'} reads this stream, with no norm between"
        for norm in stream.norms:
            edge = graph.by_producer.get(norm)
            if edge is None or not edge.fully_owned or edge.ops_between:
                return f"not all who see the norm {norm} of this stream can be rotated"
            if any(consumer.layout.groups > 1 for consumer in edge.consumers):
                return f"what the norm {norm} gives is read in groups"
            if not all(torch.equal(consumer.columns, torch.arange(stream.width)) for consumer in edge.consumers):
                return f"a part of what the norm {norm} gives is read"
        return None


def _values(graph: Graph) -> list[ChannelEdge]:
    return [edge for edge in graph.edges if edge.layer.kind == "linear" and "attention" in edge.ops_between]


def _consumers(graph: Graph, norms: Iterable[str]) -> tuple[str, ...]:
    edges = (graph.by_producer[norm] for norm in norms if norm in graph.by_producer)
    return tuple(consumer.module for edge in edges for consumer in edge.consumers)


def _stream_consumers(graph: Graph, stream: ResidualStream) -> list[Consumer]:
    edges = (graph.by_producer[norm] for norm in stream.norms if norm in graph.by_producer)
    return [consumer for edge in edges for consumer in edge.consumers]


def _rotated_online(graph: Graph, target: str) -> str | None:
    """The module of a target that is a point; None for targets of another kind."""
    name, _, point = target.rpartition(".")
    return name if (point == "input" and name in graph.linears) or (point == "key" and name in graph.heads) else None


def _unfit_heads(edge: ChannelEdge, graph: Graph) -> str | None:
    if more := edge.ops_between - {"attention"}:
        return f"between the values and what reads them there is more than attention: {', '.join(sorted(more))}"
    return graph.tied_reason(edge.modules) or split_heads(edge)

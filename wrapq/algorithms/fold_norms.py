"""Folding the weights and biases of norms into their consumers, and batch norms into the layer before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.transform import PlannedTransform, Statistics, Targets, Transform, scaled_targets
from wrapq.graph.dataflow import ChannelEdge, Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.registry import Options
from wrapq.wrappers.model import Specs


class FoldOptions(Options):
    """Options of `fold_norms`."""

    untie: bool = Field(
        False, description="Fold into weights tied to others too, such as a head's to the embedding's; unties them."
    )


@ALGORITHMS.register("fold_norms")
class FoldNorms(Transform):
    """`W (g * n(x) + b) + c = (W diag(g)) n(x) + (W b + c)`: the norm is left with weight 1 and no bias.

    Norms whose output has other consumers, such as the residual stream of a post-norm encoder, are skipped. A batch
    norm is the same affine function of every input, so that the linear or convolution before it takes it in.
    """

    Options = FoldOptions
    options: FoldOptions

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        norms = [edge for edge in graph.edges if edge.layer.kind == "norm"]
        reasons = {edge.producer: self._unfit(edge, graph) for edge in norms}
        return Targets.where_none(reasons | {name: self._unfit_batch_norm(name, graph) for name in graph.batch_norms})

    def needless(self, graph: Graph, targets: Sequence[str], after: Sequence[PlannedTransform]) -> Mapping[str, str]:
        """Norms that no rotation needs folded, where there are rotations: they would only widen the range of the
        weights, some of Gemma's by 1,649."""
        found = (each.transform.folded(graph, each.targets) for each in after)
        if not (needed := [norms for norms in found if norms is not None]):
            return {}
        rest = set(targets).difference(graph.batch_norms, *needed)
        return {name: "no rotation needs it folded" for name in targets if name in rest}

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        before = graph.batch_norms.get(target)
        return super().inputs(graph, target) if before is None else (before,)

    def order_problem(self, graph: Graph, targets: Sequence[str], before: Sequence[PlannedTransform]) -> str | None:
        scaled = scaled_targets(before)
        if back := [target for target in targets if target in scaled]:
            return f"it would fold back into the weights what a stage before it scaled out of {back[0]}; name it first"
        return None

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        if (before := rewriter.graph.batch_norms.get(target)) is not None:
            rewriter.untie(target)
            rewriter.untie(before)
            rewriter.fold_batch_norm(target)
            return {"readers": 0.0}
        edge = rewriter.graph.by_producer[target]
        for name in edge.modules:
            rewriter.untie(name)
        rewriter.fold(edge)
        return {"readers": float(len(edge.consumers))}

    def _unfit(self, edge: ChannelEdge, graph: Graph) -> str | None:
        if not edge.fully_owned:
            return f"its output is also seen by {', '.join(edge.other_consumers)}"
        if edge.ops_between:
            return f"between it and what reads it there is more than the norm: {', '.join(sorted(edge.ops_between))}"
        if edge.layer.centered and (pads := [consumer.module for consumer in edge.consumers if consumer.layer.pads]):
            return f"{pads[0]} pads with zeros, which its bias would have to be added to as well"
        return self._tied(edge.modules, graph)

    def _unfit_batch_norm(self, name: str, graph: Graph) -> str | None:
        if (before := graph.batch_norms[name]) is None:
            return "it follows no linear or convolution that it alone reads"
        return self._tied((name, before), graph)

    def _tied(self, names: Sequence[str], graph: Graph) -> str | None:
        if self.options.untie or (reason := graph.tied_reason(names)) is None:
            return None
        return f"{reason} (untie: true folds it and stores both)"

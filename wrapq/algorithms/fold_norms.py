"""Folding the weights and biases of norms into what reads them, and batch norms into what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from wrapq.calibration.algorithm import ALGORITHMS, Found, Placed, Transform, scaled_by
from wrapq.calibration.graph import Feed, Graph
from wrapq.calibration.statistics import InputStatistics
from wrapq.calibration.surgery import Surgeon
from wrapq.wrappers.model import Specs


class FoldOptions(BaseModel):
    """Options of `fold_norms`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    untie: bool = Field(
        False, description="Fold into weights tied to others too, such as a head's to the embedding's; unties them."
    )


@ALGORITHMS.register("fold_norms")
class FoldNorms(Transform):
    """`W (g * n(x) + b) + c = (W diag(g)) n(x) + (W b + c)`: the norm is left with weight 1 and no bias.

    Norms whose output somebody else sees too, such as the residual stream of a post-norm encoder, are left alone. A
    batch norm does the same to every input, so that it becomes a part of the linear or convolution before it.
    """

    Options = FoldOptions
    options: FoldOptions

    def find(self, graph: Graph, specs: Specs) -> Found:
        """See `Transform.find`."""
        norms = [feed for feed in graph.feeds if feed.leaf.kind == "norm"]
        fit = {feed.producer: self._unfit(feed, graph) for feed in norms}
        fit |= {name: self._unfit_batch_norm(name, graph) for name in graph.batch_norms}
        left = {name: reason for name, reason in fit.items() if reason is not None}
        return Found(tuple(name for name in fit if name not in left), left)

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        """See `Transform.inputs`."""
        before = graph.batch_norms.get(target)
        return super().inputs(graph, target) if before is None else (before,)

    def misplaced(self, graph: Graph, targets: Sequence[str], before: Sequence[Placed]) -> str | None:
        """See `Transform.misplaced`."""
        scaled = scaled_by(before)
        if back := [target for target in targets if target in scaled]:
            return f"it would fold back into the weights what a stage before it scaled out of {back[0]}; name it first"
        return None

    def apply(self, surgeon: Surgeon, target: str, statistics: Mapping[str, InputStatistics]) -> Mapping[str, float]:
        """See `Transform.apply`."""
        if (before := surgeon.graph.batch_norms.get(target)) is not None:
            surgeon.untie(target)
            surgeon.untie(before)
            surgeon.fold_batch_norm(target)
            return {"readers": 0.0}
        feed = surgeon.graph.by_producer[target]
        for name in (feed.producer, *(reader.module for reader in feed.readers)):
            surgeon.untie(name)
        surgeon.fold(feed)
        return {"readers": float(len(feed.readers))}

    def _unfit(self, feed: Feed, graph: Graph) -> str | None:
        if not feed.closed:
            return f"its output is also seen by {', '.join(feed.seen_by)}"
        if feed.path:
            return f"between it and what reads it there is more than the norm: {', '.join(sorted(feed.path))}"
        if feed.leaf.centered and (pads := [reader.module for reader in feed.readers if reader.leaf.pads]):
            return f"{pads[0]} pads with zeros, which its bias would have to be added to as well"
        return self._tied((feed.producer, *(reader.module for reader in feed.readers)), graph)

    def _unfit_batch_norm(self, name: str, graph: Graph) -> str | None:
        if (before := graph.batch_norms[name]) is None:
            return "it follows no linear or convolution that it alone reads"
        return self._tied((name, before), graph)

    def _tied(self, names: Sequence[str], graph: Graph) -> str | None:
        for name in names:
            if name in graph.tied and not self.options.untie:
                return f"{name} is tied to {', '.join(graph.tied[name])} (untie: true folds it and stores both)"
        return None

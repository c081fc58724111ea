"""Keys made easier to quantize: their mean taken away, and a scale moved from them into the queries.

All tokens share a large part of their keys. A constant added to all keys moves all scores of a query by one number,
which softmax does not see, so that the mean can be taken away and added nowhere: Zhang et al., "SageAttention: Accurate
8-Bit Attention for Plug-and-play Inference Acceleration", arXiv:2410.02367, section 4.2; here it is the mean of the
calibration data, as keys in a cache need one that stays. Of what is left each channel is divided by a factor with which
queries are multiplied, as SmoothAttention does (Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for
Efficient LLM Serving", arXiv:2405.04532, section 4.2). With steps as wide as the keys are large, the scores lose
`sum_j k_j^2 / s_j^2 sum_j q_j^2 s_j^2` for keys that are spread over all channels, as a rotation R3 does; the least
is at `s_j^4 = E k_j^2 / E q_j^2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wrapq.algorithms.base import ALGORITHMS
from wrapq.algorithms.transform import Statistics, Targets, Transform
from wrapq.graph.dataflow import Graph
from wrapq.graph.rewriter import GraphRewriter
from wrapq.wrappers.model import Specs

_LEAST = 1e-4
"""Of the mean over channels: what a channel has at least, for those that hardly any query uses."""


@ALGORITHMS.register("smooth_attention")
class SmoothAttention(Transform):
    """Smooths the keys of attentions that quantize them (targets: the attentions), at each forward."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("mean", "mean_square")

    def find_targets(self, graph: Graph, specs: Specs) -> Targets:
        keys = [name for name, points in specs.items() if "key" in points]
        unknown = "the width of its heads is not known"
        reasons = {name: None if name in graph.heads else unknown for name in keys}
        return Targets.where_none(reasons or {"keys": "no keys are quantized"})

    def inputs(self, graph: Graph, target: str) -> tuple[str, ...]:
        return f"{target}:query", f"{target}:key"

    def online(self, graph: Graph, targets: Sequence[str]) -> tuple[str, ...]:
        return tuple(targets)

    def apply(self, rewriter: GraphRewriter, target: str, statistics: Statistics) -> Mapping[str, float]:
        width = rewriter.graph.heads[target]

        def by_head(point: str, part: str) -> Tensor:
            return statistics[f"{target}:{point}"].get(part, target).reshape(-1, width)

        mean, power = by_head("key", "mean"), by_head("key", "mean_square")
        factors = (_filled(power - mean.square()) / _filled(by_head("query", "mean_square"))) ** 0.25
        rewriter.smooth_scores_online(target, mean, factors)
        share = mean.square().sum() / power.sum()
        return {"mean_share": float(share), "largest_factor": float(factors.amax())}


def _filled(power: Tensor) -> Tensor:
    """`power` [H, D], at least a small part of the mean of its head, and 1 for a head of zeros."""
    mean = power.mean(-1, keepdim=True)
    return torch.where(mean > 0, torch.maximum(power, _LEAST * mean), 1.0)

"""Function-preserving rewrites of a float model, and one rewrite that may change its function."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.errors import ModelError
from wrapq.graph.batch_norm import affine, is_identity, make_identity
from wrapq.graph.blocks import Batch
from wrapq.graph.dataflow import OWN_INPUT, ChannelEdge, Consumer, Graph, ResidualStream
from wrapq.graph.layers import LayerInfo, WeightLayout, along, layer_info
from wrapq.graph.norms import norm_gain, norm_offset
from wrapq.graph.tied import tied_parameters
from wrapq.graph.undo import UndoLog
from wrapq.quant.affine import row_parts
from wrapq.runtime.rotation import ONLINE, OnlineRotation
from wrapq.runtime.smoothing import SMOOTHING, InputSmoothing, KeySmoothing
from wrapq.statistics.transport import InputChange, Rotated, Scaled, Shifted, rotate_blocks_
from wrapq.wrappers.experts import Expert
from wrapq.wrappers.model import Specs, add_rotation, add_smoothing

_KEPT = 1e-9


class GraphRewriter:
    """Changes the weights of a float model so that its function stays.

    Attributes:
        model: not wrapped.
        graph: its channel edges and residual streams.
        specs: what will be quantized in it, for transforms that weigh the cost of that.
        batches: calibration data, for transforms that run the model themselves.
        input_changes: for each module whose input changed, how, in order.
        notes: side effects that a user should know of, such as weights that are no longer tied.
        undo_log: what was changed since its last `commit`.
    """

    def __init__(self, model: nn.Module, graph: Graph, specs: Specs | None = None) -> None:
        self.model, self.graph, self.specs = model, graph, specs or {}
        self.batches: Sequence[Batch] = ()
        self.input_changes: defaultdict[str, list[InputChange]] = defaultdict(list)
        self.notes: list[str] = []
        self.undo_log = UndoLog(model)
        self._tied = {place: places for places in tied_parameters(model) for place in places}

    def consumer_weight(self, consumer: Consumer) -> Tensor:
        """The weight of a consumer as [R, K], one column for each input channel, also of convolutions and experts."""
        weight = self._parameter(consumer.module, consumer.layout.parameter)
        return consumer.layout.by_input_channel(weight.detach().float())

    def producer_weight(self, edge: ChannelEdge) -> Tensor:
        """The weight of the producer of `edge` as [R, N], one column for each output channel."""
        if (layout := edge.layer.produces) is None:
            raise ModelError(f"{edge.producer} has no weight of its own")
        weight = self._parameter(edge.producer, layout.parameter).detach().float().movedim(layout.out_axis, -1)
        return weight.reshape(-1, weight.shape[-1])

    @torch.no_grad()
    def untie(self, name: str) -> None:
        """Give the module `name` parameters of its own; the model's configuration says so from now on."""
        for parameter, shared in self._module(name)._parameters.items():
            if shared is None or not (others := self._tied_to(name, parameter)):
                continue
            own = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
            self.undo_log.replace(name, parameter, own)
            self.notes.append(f"{name}.{parameter} is no longer tied to {', '.join(others)}, and is stored beside it")
            config: Any = getattr(self.model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
                self.undo_log.append(partial(setattr, config, "tie_word_embeddings", True))

    @torch.no_grad()
    def scale(self, edge: ChannelEdge, factors: Tensor) -> None:
        """Divide the channels of `edge` by `factors` [N] at the producer and multiply the columns of its consumers by
        them. A batch norm between is folded. Where the edge begins at the consumers' own input, they divide that, at
        each forward from then on. Raises `ModelError` for a factor that is zero, not finite, of a channel with other
        consumers, or, where a ReLU lies between, negative; and, as all rewrites do, for a tied weight."""
        _check_factors(edge, factors)
        if edge.layer is OWN_INPUT:
            for consumer in edge.consumers:
                smoothing = InputSmoothing(factors.to(self._device(consumer.module), torch.float32))
                self._add_smoothing(consumer.module, smoothing)
                self._scale_consumer(consumer, factors)
            return
        if (layout := edge.layer.produces) is None:
            raise ModelError(f"{edge.producer} has no weight of its own that could be scaled")
        self.fold_batch_norm(edge.norm)
        producer: Any = self._module(edge.producer)
        outputs = layout.outputs(producer)
        if edge.layer.kind == "norm":  # its gain is not quite its weight
            offset, data = norm_offset(producer, edge.producer), self._writable(edge.producer, outputs.pop(0)[0])
            factors = _divide_gain(data, offset, factors.to(data.device, torch.double))
        for parameter, axis in outputs:
            self._multiply_along(edge.producer, parameter, axis, 1 / factors)
        for consumer in edge.consumers:
            self._scale_consumer(consumer, factors)

    @torch.no_grad()
    def rewrite(self, consumer: Consumer, weight: Tensor) -> None:
        """Give a linear another weight [N, K]: the one rewrite that changes the model's function."""
        data = self._writable(consumer.module, consumer.layout.parameter)
        data.copy_(weight if consumer.layout.in_axis == data.dim() - 1 else weight.t())

    @torch.no_grad()
    def fold(self, edge: ChannelEdge) -> None:
        """Move the weight and bias of a norm into its consumers, after which the norm only normalizes; raises
        `ModelError` where one cannot take a bias."""
        norm: Any = self._module(edge.producer)
        gain = torch.where(edge.owned.to(norm.weight.device), norm_gain(norm, edge.producer), 1.0)
        bias = norm._parameters.get("bias")
        if bias is not None and bool((bias != 0).any()):
            moved = torch.where(edge.owned.to(bias.device), bias, 0)
            for consumer in edge.consumers:
                self._add_bias(consumer, moved)
            self._writable(edge.producer, "bias").sub_(moved)
        for consumer in edge.consumers:
            self._scale_consumer(consumer, gain)
        self._writable(edge.producer, "weight")[edge.owned] = 1 - norm_offset(norm, edge.producer)

    @torch.no_grad()
    def fold_batch_norm(self, name: str | None) -> None:
        """Fold a batch norm into the linear or convolution before it, which gets a bias if it has none; the norm is the
        identity from then on. None, and a norm that is folded already, change nothing. Raises `ModelError` where what
        is before it has other consumers."""
        if name is None or is_identity(self._module(name)):
            return
        if (before := self.graph.batch_norms.get(name)) is None:
            raise ModelError(f"{name} follows no linear or convolution that it alone reads")
        norm: Any = self._module(name)
        module = self._module(before)
        layer = layer_info(module)
        if layer is None or layer.produces is None or layer.produces.bias is None:
            raise ModelError(f"{before} ({type(module).__name__}) cannot take the bias of {name}")
        gain, shift = affine(norm)
        self._multiply_along(before, layer.produces.parameter, layer.produces.out_axis, gain)
        bias = self._writable_bias(before, layer.produces)
        bias.copy_(bias.double() * gain + shift)
        for parameter in norm._parameters:
            self._writable(name, parameter)
        for buffer in (norm.running_mean, norm.running_var):
            self.undo_log.append(partial(buffer.copy_, buffer.clone()))
        make_identity(norm)

    @torch.no_grad()
    def absorb(self, edge: ChannelEdge, amounts: Tensor) -> None:
        """Take `amounts` [N], 0 or more, from the bias of the producer, and add what the consumers make of them to
        their biases. Behind a ReLU it keeps the function where no channel was less than its amount. Raises `ModelError`
        where the edge is `unshiftable`."""
        if (reason := self.unshiftable(edge)) is not None:
            raise ModelError(f"{edge.name}: {reason}")
        self.fold_batch_norm(edge.norm)
        bias = self._writable(edge.producer, str(edge.layer.produces and edge.layer.produces.bias))
        bias.sub_(amounts.to(bias))
        for consumer in edge.consumers:
            self._add_bias(consumer, amounts)

    def unshiftable(self, edge: ChannelEdge) -> str | None:
        """Why a constant cannot be moved from the producer of `edge` into its consumers; None where it can."""
        layout = edge.layer.produces
        if not edge.ops_between <= {"positive"} or not edge.fully_owned:
            return "between it and what reads it there is more than a ReLU, or others see it"
        if layout is None or layout.bias is None or self._module(edge.producer)._parameters.get(layout.bias) is None:
            return f"{edge.producer} has no bias"
        for consumer in edge.consumers:
            if consumer.layer.pads:
                return f"{consumer.module} pads with zeros, which a constant would have to be taken from as well"
            if not self._takes_bias(consumer):
                return f"{consumer.module} cannot take a bias"
        return None

    @torch.no_grad()
    def rotate_stream(self, stream: ResidualStream, blocks: Tensor, matrix: Tensor) -> None:
        """Multiply each of the `blocks` [B, D] of a residual stream's channels by `matrix` [D, D] from the right in the
        writers, and the consumers of its norms by the inverse. Raises `ModelError` where a norm does more than
        normalize, or subtracts a mean that the rotation does not keep."""
        edges = [self.graph.by_producer[norm] for norm in stream.norms]
        for edge in edges:
            norm: Any = self._module(edge.producer)
            bias = norm._parameters.get("bias")
            if bool((norm_gain(norm, edge.producer) != 1).any()) or (bias is not None and bool(bias.any())):
                raise ModelError(f"{edge.producer} does more than normalize: its weight and bias must be folded before")
        if any(edge.layer.centered for edge in edges):
            ones = torch.ones(stream.width, dtype=torch.double)
            rotated = ones.clone()
            rotate_blocks_(rotated, -1, blocks, matrix)
            if not torch.allclose(rotated, ones, rtol=0, atol=_KEPT):
                raise ModelError(f"{stream.name}: the norms of this stream take its mean away, which is not kept")
        for writer, layer in stream.writers.items():
            self._rotate_producer(writer, layer, blocks, matrix)
        for consumer in (consumer for edge in edges for consumer in edge.consumers):
            self._rotate_consumer(consumer, blocks, matrix)

    @torch.no_grad()
    def rotate_heads(self, edge: ChannelEdge, matrix: Tensor) -> None:
        """Multiply each head [T, D] of the values of attention by `matrix` [D, D] from the right at the producer, and
        the consumers by the inverse. Raises `ModelError` where a head has other consumers, or there is none."""
        if edge.heads is None or (reason := split_heads(edge)) is not None:
            raise ModelError(f"{edge.name}: {'it has no heads' if edge.heads is None else reason}")
        self._rotate_producer(edge.producer, edge.layer, edge.heads, matrix)
        for consumer in edge.consumers:
            columns = consumer.columns.reshape(-1, edge.heads.shape[1])
            blocks = torch.arange(columns.numel()).reshape(columns.shape)[columns[:, 0] >= 0]
            self._rotate_consumer(consumer, blocks, matrix)

    @torch.no_grad()
    def rotate_input_online(self, name: str, rotation: OnlineRotation) -> None:
        """Rotate the input of the linear `name` at each forward, and its columns once; raises `ModelError` for one that
        is rotated already."""
        layer = layer_info(self._module(name))
        if layer is None or layer.consumes is None:
            raise ModelError(f"{name} does not multiply its input")
        last = self._writable(name, layer.consumes.parameter).movedim(layer.consumes.in_axis, -1)
        self._add_rotation(name, rotation)
        for part in row_parts(last):
            last[part] = rotation(last[part].double()).to(last.dtype)
        self.input_changes[name].append(rotation)

    def rotate_scores_online(self, name: str, rotation: OnlineRotation) -> None:
        """Rotate queries and keys of the attention `name` before its points see them, so that their products stay;
        raises `ModelError` where they are rotated already."""
        self._add_rotation(name, rotation)

    def smooth_scores_online(self, name: str, mean: Tensor, factors: Tensor) -> None:
        """Take `mean` from the keys of the attention `name`, divide them by `factors`, both [H_kv, D], and multiply its
        queries by those, before its points see them; raises `ModelError` where they are smoothed already."""
        self._add_smoothing(
            name, KeySmoothing(*(part.to(self._device(name), torch.float32) for part in (mean, factors)))
        )

    def _device(self, name: str) -> torch.device:
        return next(self._module(name).parameters()).device

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _parameter(self, name: str, parameter: str) -> nn.Parameter:
        tensor = self._module(name)._parameters[parameter]
        if tensor is None:
            raise ModelError(f"{name} has no {parameter}")
        return tensor

    def _tied_to(self, name: str, parameter: str) -> list[str]:
        """The other modules that hold the very same parameter; ones that were untied hold it no more."""
        tensor, places = self._module(name)._parameters[parameter], self._tied.get((name, parameter), ())
        return [m for m, p in places if m != name and self._module(m)._parameters.get(p) is tensor]

    def _writable(self, name: str, parameter: str) -> Tensor:
        """The data of a parameter, logged, to be changed in place."""
        tensor = self._parameter(name, parameter)
        if others := self._tied_to(name, parameter):
            raise ModelError(f"{name}.{parameter} is tied to {', '.join(others)}, so it cannot be changed alone")
        self.undo_log.save(name, parameter)
        return tensor.data

    def _writable_bias(self, name: str, layout: WeightLayout) -> Tensor:
        """The data of a bias, logged, to be changed in place; zeros where there was none."""
        bias, weight = str(layout.bias), self._parameter(name, layout.parameter)
        if self._module(name)._parameters.get(bias) is None:
            zeros = nn.Parameter(weight.new_zeros(weight.shape[layout.out_axis]), requires_grad=False)
            self.undo_log.replace(name, bias, zeros)
        return self._writable(name, bias)

    def _multiply(self, name: str, parameter: str, factors: Tensor) -> None:
        data = self._writable(name, parameter)
        wide = torch.promote_types(data.dtype, torch.float32)
        factors = factors.to(data.device, wide)
        for part in row_parts(data):  # a copy of a whole table of words in float32 takes as much as a model
            by_row = factors.dim() == data.dim() and len(factors) > 1
            data[part] = data[part].to(wide) * (factors[part] if by_row else factors)

    def _multiply_along(self, name: str, parameter: str, axis: int, factors: Tensor) -> None:
        self._multiply(name, parameter, along(factors, axis, self._parameter(name, parameter).dim()))

    def _add_rotation(self, name: str, rotation: OnlineRotation) -> None:
        if ONLINE in self._module(name)._modules:
            raise ModelError(f"{name} turns what comes to it already")
        self.undo_log.append(add_rotation(self._module(name), rotation))

    def _add_smoothing(self, name: str, smoothing: InputSmoothing | KeySmoothing) -> None:
        if SMOOTHING in self._module(name)._modules:
            raise ModelError(f"{name} divides what comes to it already")
        self.undo_log.append(add_smoothing(self._module(name), smoothing))

    def _rotate_producer(self, name: str, layer: LayerInfo, blocks: Tensor, matrix: Tensor) -> None:
        layout = layer.produces
        if layout is None or layer.kind in ("norm", "batch_norm") or layout.groups > 1:
            raise ModelError(f"{name} has no rows that could be rotated")
        for parameter, axis in layout.outputs(self._module(name)):
            rotate_blocks_(self._writable(name, parameter), axis, blocks, matrix)

    def _rotate_consumer(self, consumer: Consumer, blocks: Tensor, matrix: Tensor) -> None:
        layout = consumer.layout
        if layout.groups > 1:
            raise ModelError(f"{consumer.module} reads its channels in groups, between which nothing can be turned")
        rotate_blocks_(self._writable(consumer.module, layout.parameter), layout.in_axis, blocks, matrix)
        self.input_changes[consumer.module].append(Rotated(matrix, blocks))

    def _scale_consumer(self, consumer: Consumer, factors: Tensor) -> None:
        layout = consumer.layout
        own = consumer.expand(factors.cpu())
        weight = self._parameter(consumer.module, layout.parameter)
        self._multiply(consumer.module, layout.parameter, layout.broadcast_input(own, weight))
        self.input_changes[consumer.module].append(Scaled(own))

    def _add_bias(self, consumer: Consumer, moved: Tensor) -> None:
        """Add to the bias of a consumer what it makes of the constant `moved` [N], which was taken from its input."""
        layout, module = consumer.layout, self._module(consumer.module)
        if layout.bias is None or not self._takes_bias(consumer):
            raise ModelError(f"{consumer.module} ({type(module).__name__}) cannot take the bias of the norm before it")
        weight = self._parameter(consumer.module, layout.parameter)
        owned = (consumer.columns >= 0).to(moved.device)
        constant = torch.where(owned, moved[consumer.columns.clamp(min=0).to(moved.device)], 0).double()
        if consumer.layer.kind == "conv":
            added = (weight.double() * layout.broadcast_input(constant, weight)).flatten(1).sum(1)
        else:
            added = weight.double().movedim(layout.in_axis, 1) @ constant
        data = self._writable_bias(consumer.module, layout)
        data.copy_(data.double() + added)
        self.input_changes[consumer.module].append(Shifted())

    def _takes_bias(self, consumer: Consumer) -> bool:
        """Whether a bias can be added to `consumer`: to an expert only where all have one anyway, as neither the module
        of transformers nor readers of a saved model know of any other."""
        bias = consumer.layout.bias
        if consumer.layer.kind not in ("linear", "conv") or bias is None:
            return False
        expert = isinstance(self._module(consumer.module.rpartition(".")[0]), Expert)
        return not expert or self._module(consumer.module)._parameters.get(bias) is not None


def _divide_gain(weight: Tensor, offset: float, factors: Tensor) -> Tensor:
    """Divide the gain `weight + offset` [N] of a norm by `factors`; returns, in float64, by what it was divided: 16
    bits hold a small gain as `1 + w` badly, and the consumers are to be multiplied by just that."""
    gain = weight.double() + offset
    written = (gain / factors - offset).to(weight.dtype)
    taken = gain / (written.double() + offset)
    good = torch.isfinite(taken) & (taken != 0)
    weight.copy_(torch.where(good, written, weight))
    return torch.where(good, taken, 1.0)


def split_heads(edge: ChannelEdge) -> str | None:
    """Why the heads of `edge` cannot be rotated one by one, or None when they can."""
    if edge.heads is None:
        return "nothing is known of its heads"
    if not torch.equal(edge.heads.flatten().sort().values, edge.owned.nonzero()[:, 0]):
        return f"a part of its heads is also seen by {', '.join(edge.other_consumers) or 'others'}"
    size = edge.heads.shape[1]
    known = {tuple(head) for head in edge.heads.tolist()} | {(-1,) * size}
    for consumer in edge.consumers:
        whole = len(consumer.columns) % size == 0
        if not whole or not {tuple(part) for part in consumer.columns.reshape(-1, size).tolist()} <= known:
            return f"{consumer.module} reads parts of its heads"
    return None


def _check_factors(edge: ChannelEdge, factors: Tensor) -> None:
    if factors.shape != edge.owned.shape:
        raise ModelError(f"{edge.name}: {tuple(factors.shape)} factors for {edge.width} channels")
    if not bool((factors.cpu()[~edge.owned] == 1).all()):
        others = ", ".join(edge.other_consumers)
        raise ModelError(f"{edge.name}: factors other than 1 for channels that others see: {others}")
    if not bool(torch.isfinite(factors).all()) or bool((factors == 0).any()):
        raise ModelError(f"{edge.name}: a factor is zero or not finite")
    if "positive" in edge.ops_between and bool((factors < 0).any()):
        raise ModelError(f"{edge.name}: a negative factor cannot pass the function between")

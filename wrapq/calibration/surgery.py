"""Changes of a float model that leave its function as it is, and one that may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wrapq.calibration.batch_norm import affine, is_identity, make_identity
from wrapq.calibration.edits import Edits
from wrapq.calibration.forward import Batch
from wrapq.calibration.graph import Feed, Graph, Reader, Stream
from wrapq.calibration.norms import norm_gain, norm_offset
from wrapq.calibration.slots import Leaf, Slot, find_leaf
from wrapq.calibration.transport import Rotated, Scaled, Shifted, Transport, Turned, turn
from wrapq.errors import ModelError
from wrapq.runtime.rotation import ONLINE, OnlineRotation
from wrapq.wrappers.experts import Expert
from wrapq.wrappers.model import Specs, add_rotation

_KEPT = 1e-9


class Surgeon(Edits):
    """Changes the weights of a float model so that its function stays.

    Args:
        model: not wrapped.
        graph: who feeds whom in it.
        specs: what will be quantized in it, for transforms that ask what that costs.

    Attributes:
        batches: calibration data, for transforms that run the model themselves.
        transports: for each module whose input changed, how, in order.
    """

    def __init__(self, model: nn.Module, graph: Graph, specs: Specs | None = None) -> None:
        super().__init__(model)
        self.graph, self.specs = graph, specs or {}
        self.batches: Sequence[Batch] = ()
        self.transports: dict[str, list[Transport]] = {}

    def columns(self, reader: Reader) -> Tensor:
        """The weight of a reader as rows that meet its input's channels [R, K], also a convolution's or expert's."""
        slot = _reads(reader)
        return slot.by_column(self._module(reader.module).get_parameter(slot.parameter).detach().float())

    def rows(self, feed: Feed) -> Tensor:
        """The weight that makes a feed's channels, one column for each [R, N]."""
        if feed.leaf.writes is None:
            raise ModelError(f"{feed.producer} has no weight of its own")
        return self._matrix(feed.producer, feed.leaf.writes.parameter, feed.leaf.writes.rows)

    @torch.no_grad()
    def scale(self, feed: Feed, factors: Tensor) -> None:
        """Divide what `feed` carries by `factors` [N] and multiply the columns of its readers by them. A batch norm
        that it passes first is folded.

        Raises:
            ModelError: a factor is zero, not finite, of a channel that others see, or, where a ReLU lies between,
                negative; or a weight is tied to another's.
        """
        self._check(feed, factors)
        if feed.leaf.writes is None:
            raise ModelError(f"{feed.producer} has no weight of its own that could be scaled")
        self.fold_batch_norm(feed.norm)
        if feed.leaf.kind == "norm":
            self._scale_norm(feed, 1 / factors)
        else:
            slot = feed.leaf.writes
            self._multiply(feed.producer, slot.parameter, slot.rows, 1 / factors)
            if slot.bias and self._module(feed.producer)._parameters.get(slot.bias) is not None:
                self._multiply(feed.producer, slot.bias, -1, 1 / factors)
        for reader in feed.readers:
            self._scale_reader(reader, factors)

    @torch.no_grad()
    def rewrite(self, reader: Reader, weight: Tensor) -> None:
        """Give a linear the weight [N, K], which gives another function: the one change that does not keep it."""
        slot = _reads(reader)
        data = self._edit(reader.module, slot.parameter)
        data.copy_(weight if slot.columns == data.dim() - 1 else weight.t())

    @torch.no_grad()
    def fold(self, feed: Feed) -> None:
        """Move the weight and bias of a norm into what reads it, after which the norm only normalizes.

        Raises:
            ModelError: see `scale`; or a reader cannot take a bias.
        """
        norm: Any = self._module(feed.producer)
        gain = torch.where(feed.channels.to(norm.weight.device), norm_gain(norm, feed.producer), 1.0)
        bias = norm._parameters.get("bias")
        if bias is not None and bool((bias != 0).any()):
            moved = torch.where(feed.channels.to(bias.device), bias, 0)
            for reader in feed.readers:
                self._add_bias(reader, moved)
            self._edit(feed.producer, "bias").sub_(moved)
        for reader in feed.readers:
            self._scale_reader(reader, gain)
        self._scale_norm(feed, 1 / gain)
        self._edit(feed.producer, "weight")[feed.channels] = 1 - norm_offset(norm, feed.producer)

    @torch.no_grad()
    def fold_batch_norm(self, name: str | None) -> None:
        """Make a batch norm a part of the linear or convolution before it, which gets a bias if it has none; nothing
        is left to do for the norm itself. None does nothing.

        Raises:
            ModelError: others see what it reads; or a weight is tied to another's.
        """
        if name is None or is_identity(self._module(name)):
            return
        if (before := self.graph.batch_norms.get(name)) is None:
            raise ModelError(f"{name} follows no linear or convolution that it alone reads")
        norm, module = self._module(name), self._module(before)
        leaf = find_leaf(module)
        if leaf is None or leaf.writes is None or leaf.writes.bias is None:
            raise ModelError(f"{before} ({type(module).__name__}) cannot take the bias of {name}")
        gain, shift = affine(norm)
        self._multiply(before, leaf.writes.parameter, leaf.writes.rows, gain)
        bias = self._bias(before, leaf.writes)
        bias.copy_(bias.double() * gain + shift)
        for parameter in norm._parameters:
            self._edit(name, parameter)
        self._undo.append(make_identity(norm))

    @torch.no_grad()
    def absorb(self, feed: Feed, amounts: Tensor) -> None:
        """Take `amounts` [N], 0 or more, from the bias that makes a feed's channels, and add what its readers make of
        them to theirs. Behind a ReLU it keeps the function where no channel was less than its amount.

        Raises:
            ModelError: see `unshiftable`.
        """
        if (reason := self.unshiftable(feed)) is not None:
            raise ModelError(f"{feed.name}: {reason}")
        self.fold_batch_norm(feed.norm)
        bias = self._edit(feed.producer, str(feed.leaf.writes and feed.leaf.writes.bias))
        bias.sub_(amounts.to(bias))
        for reader in feed.readers:
            self._add_bias(reader, amounts)

    def unshiftable(self, feed: Feed) -> str | None:
        """Why a constant cannot be moved from what makes the channels of `feed` into what reads them."""
        slot = feed.leaf.writes
        if not feed.path <= {"positive"} or not feed.closed:
            return "between it and what reads it there is more than a ReLU, or others see it"
        if slot is None or slot.bias is None or self._module(feed.producer)._parameters.get(slot.bias) is None:
            return f"{feed.producer} has no bias"
        for reader in feed.readers:
            if reader.leaf.pads:
                return f"{reader.module} pads with zeros, which a constant would have to be taken from as well"
            if not self._takes_bias(reader):
                return f"{reader.module} cannot take a bias"
        return None

    @torch.no_grad()
    def rotate_stream(self, stream: Stream, blocks: Tensor, matrix: Tensor) -> None:
        """Multiply each of the `blocks` [B, D] of a residual stream's channels by `matrix` [D, D] from the right, where
        modules write into it, and what reads its norms by the inverse.

        Raises:
            ModelError: a norm does more than normalize, or takes away a mean that the rotation does not keep; or a
                weight is tied to another's.
        """
        feeds = [self.graph.by_producer[norm] for norm in stream.norms]
        for feed in feeds:
            self._check_bare(feed)
        if any(feed.leaf.centered for feed in feeds):
            ones = torch.ones(stream.width, dtype=torch.double)
            turned = ones.clone()
            turn(turned, -1, blocks, matrix)
            if not torch.allclose(turned, ones, rtol=0, atol=_KEPT):
                raise ModelError(f"{stream.name}: the norms of this stream take its mean away, which is not kept")
        for writer, leaf in zip(stream.writers, stream.leaves, strict=True):
            self._rotate_writer(writer, leaf, blocks, matrix)
        for reader in (reader for feed in feeds for reader in feed.readers):
            self._rotate_reader(reader, blocks, matrix)

    @torch.no_grad()
    def rotate_heads(self, feed: Feed, matrix: Tensor) -> None:
        """Multiply each head [T, D] of the values that attention passes on by `matrix` [D, D] from the right, and what
        reads them by the inverse.

        Raises:
            ModelError: `feed` has no heads, or not all of a head is its readers' alone; or a weight is tied.
        """
        if feed.heads is None or (reason := split_heads(feed)) is not None:
            raise ModelError(f"{feed.name}: {'it has no heads' if feed.heads is None else reason}")
        self._rotate_writer(feed.producer, feed.leaf, feed.heads, matrix)
        for reader in feed.readers:
            columns = reader.columns.reshape(-1, feed.heads.shape[1])
            blocks = torch.arange(columns.numel()).reshape(columns.shape)[columns[:, 0] >= 0]
            self._rotate_reader(reader, blocks, matrix)

    @torch.no_grad()
    def turn_inputs(self, name: str, rotation: OnlineRotation) -> None:
        """Turn the input of the linear `name` at each forward, and its columns once.

        Raises:
            ModelError: it is turned already, or its weight is tied to another's.
        """
        module, leaf = self._module(name), find_leaf(self._module(name))
        if leaf is None or leaf.reads is None:
            raise ModelError(f"{name} does not multiply its input")
        self._free(name)
        last = self._edit(name, leaf.reads.parameter).movedim(int(leaf.reads.columns or 0), -1)
        last.copy_(rotation.to(last.device)(last.double()))
        self._undo.append(add_rotation(module, rotation))
        self.transports.setdefault(name, []).append(Turned(rotation))

    def turn_scores(self, name: str, rotation: OnlineRotation) -> None:
        """Turn the queries and keys of the attention `name` before its points see them; what they multiply to stays.

        Raises:
            ModelError: they are turned already.
        """
        self._free(name)
        device = next(self.model.parameters()).device
        self._undo.append(add_rotation(self._module(name), rotation.to(device)))

    def _matrix(self, name: str, parameter: str, axis: int) -> Tensor:
        tensor = self._module(name)._parameters[parameter]
        if tensor is None:
            raise ModelError(f"{name} has no {parameter}")
        moved = tensor.detach().float().movedim(axis, -1)
        return moved.reshape(-1, moved.shape[-1])

    def _free(self, name: str) -> None:
        if ONLINE in self._module(name)._modules:
            raise ModelError(f"{name} turns what comes to it already")

    def _rotate_writer(self, name: str, leaf: Leaf, blocks: Tensor, matrix: Tensor) -> None:
        slot = leaf.writes
        if slot is None or leaf.kind in ("norm", "batch_norm") or slot.groups > 1:
            raise ModelError(f"{name} has no rows that could be rotated")
        turn(self._edit(name, slot.parameter), slot.rows, blocks, matrix)
        if slot.bias and self._module(name)._parameters.get(slot.bias) is not None:
            turn(self._edit(name, slot.bias), -1, blocks, matrix)

    def _rotate_reader(self, reader: Reader, blocks: Tensor, matrix: Tensor) -> None:
        slot = _reads(reader)
        if slot.groups > 1:
            raise ModelError(f"{reader.module} reads its channels in groups, between which nothing can be turned")
        turn(self._edit(reader.module, slot.parameter), int(slot.columns or 0), blocks, matrix)
        self.transports.setdefault(reader.module, []).append(Rotated(matrix, blocks))

    def _check_bare(self, feed: Feed) -> None:
        norm: Any = self._module(feed.producer)
        bias = norm._parameters.get("bias")
        if bool((norm_gain(norm, feed.producer) != 1).any()) or (bias is not None and bool(bias.any())):
            raise ModelError(f"{feed.producer} does more than normalize: its weight and bias must be folded before")

    def _scale_reader(self, reader: Reader, factors: Tensor) -> None:
        slot = _reads(reader)
        spread = reader.spread(factors.cpu())
        weight = self._module(reader.module).get_parameter(slot.parameter)
        self._multiply_by(reader.module, slot.parameter, slot.along_columns(spread, weight))
        self.transports.setdefault(reader.module, []).append(Scaled(spread))

    def _scale_norm(self, feed: Feed, factors: Tensor) -> None:
        norm: Any = self._module(feed.producer)
        offset = norm_offset(norm, feed.producer)
        data = self._edit(feed.producer, "weight")
        data.copy_((data.double() + offset) * factors.to(data.device, torch.double) - offset)
        if norm._parameters.get("bias") is not None:
            self._multiply(feed.producer, "bias", -1, factors)

    def _add_bias(self, reader: Reader, moved: Tensor) -> None:
        """Add what the constant `moved` [N] in its input gives to the output of a linear."""
        slot, module = _reads(reader), self._module(reader.module)
        if slot.bias is None or not self._takes_bias(reader):
            raise ModelError(f"{reader.module} ({type(module).__name__}) cannot take the bias of the norm before it")
        weight = module.get_parameter(slot.parameter)
        owned = (reader.columns >= 0).to(moved.device)
        constant = torch.where(owned, moved[reader.columns.clamp(min=0).to(moved.device)], 0).double()
        if reader.leaf.kind == "conv":
            added = (weight.double() * slot.along_columns(constant, weight)).flatten(1).sum(1)
        else:
            added = weight.double().movedim(int(slot.columns or 0), 1) @ constant
        data = self._bias(reader.module, slot)
        data.copy_(data.double() + added)
        self.transports.setdefault(reader.module, []).append(Shifted())

    def _takes_bias(self, reader: Reader) -> bool:
        """Whether something can be added to the output of `reader`: to an expert's only where all have a bias anyway,
        as neither the module of transformers nor those who read what is saved know of any other."""
        slot, module = reader.leaf.reads, self._module(reader.module)
        if reader.leaf.kind not in ("linear", "conv") or slot is None or slot.bias is None:
            return False
        expert = isinstance(self._module(reader.module.rpartition(".")[0]), Expert)
        return not expert or module._parameters.get(slot.bias) is not None

    def _check(self, feed: Feed, factors: Tensor) -> None:
        if factors.shape != feed.channels.shape:
            raise ModelError(f"{feed.name}: {tuple(factors.shape)} factors for {len(feed.channels)} channels")
        if not bool((factors.cpu()[~feed.channels] == 1).all()):
            raise ModelError(
                f"{feed.name}: factors other than 1 for channels that others see: {', '.join(feed.seen_by)}"
            )
        if not bool(torch.isfinite(factors).all()) or bool((factors == 0).any()):
            raise ModelError(f"{feed.name}: a factor is zero or not finite")
        if "positive" in feed.path and bool((factors < 0).any()):
            raise ModelError(f"{feed.name}: a negative factor cannot pass the function between")


def split_heads(feed: Feed) -> str | None:
    """Why the heads of `feed` cannot be rotated one by one, or None when they can."""
    if feed.heads is None:
        return "nothing is known of its heads"
    if not torch.equal(feed.heads.flatten().sort().values, feed.channels.nonzero()[:, 0]):
        return f"a part of its heads is also seen by {', '.join(feed.seen_by) or 'others'}"
    known = {tuple(head) for head in feed.heads.tolist()} | {(-1,) * feed.heads.shape[1]}
    for reader in feed.readers:
        size = feed.heads.shape[1]
        whole = len(reader.columns) % size == 0
        if not whole or not {tuple(part) for part in reader.columns.reshape(-1, size).tolist()} <= known:
            return f"{reader.module} reads parts of its heads"
    return None


def _reads(reader: Reader) -> Slot:
    if reader.leaf.reads is None:
        raise ModelError(f"{reader.module} does not multiply its input")
    return reader.leaf.reads

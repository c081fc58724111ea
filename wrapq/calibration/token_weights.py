"""How much the model's own loss depends on what a weight makes of each token: by that, rows of its input can count.

Kim et al., "GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance", arXiv:2505.07004,
section 3: with the gradient g [M, N] of the loss in a layer's output, `|E (X g)|^2` approximates what an error E of its
weight costs at the end, where the plain Hessian takes every row of X for equally important. The loss is that of words
drawn from what the model itself expects, so that its mean gradient is zero and the square is Fisher's information.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wrapq.calibration.assignments import Assignments
from wrapq.calibration.forwards import Unobserved
from wrapq.errors import CalibrationError
from wrapq.graph.blocks import Batch, find_blocks, output_head, replaced_forward
from wrapq.graph.head import ELEMENTS, Head
from wrapq.large_pages import give_back
from wrapq.observers.forward_context import forward_context, in_context
from wrapq.runtime.stand_in import original_class
from wrapq.wrappers.model import iter_wrapped
from wrapq.wrappers.quantizer import real_tokens

TokenWeights = Mapping[str, Mapping[int, Tensor]]
"""By the full name of a weight and the number of a batch, float32 [M], one for each row of its input."""
_NO_LOGITS = "tokens count by the gradient of a language model's loss, and {} makes no logits of tokens"


def linears_by_gradient(model: nn.Module, assignments: Assignments) -> dict[str, nn.Module]:
    """The linear layers of a wrapped model whose algorithms want tokens to count by gradients, by their weights. Not
    the head, which makes logits of a part of the positions at a time: there all count alike."""
    head = output_head(model)
    wrapped = ((module.weight_quantizer, module) for _, module in iter_wrapped(model))
    return {
        weight.where: module
        for weight, module in wrapped
        if weight is not None
        and module is not head
        and module.wrapper.kind == "Linear"
        and "gradient" in assignments.needs(weight)
    }


def why_no_gradients(model: nn.Module) -> str | None:
    """Why there is no loss of a `model` to count tokens by; None where there is."""
    return None if output_head(model) is not None else _NO_LOGITS.format(original_class(model).__name__)


def gather_token_weights(
    model: nn.Module,
    batches: Iterable[tuple[int, Batch]],
    modules: Mapping[str, nn.Module],
    advance: Callable[[], None] = lambda: None,
) -> TokenWeights:
    """The squared gradient of the loss in each row of what linear `modules` give, summed over the row.

    Blocks are run again on the way back, so that no more than one of them keeps what it computes.

    Args:
        model: a wrapped language model of transformers, no point of which is quantized yet.
        batches: with their numbers, by which words are drawn.
        modules: by the full names of their weights; those that run twice in a forward, or not at all, have none. Where
            there are none nothing is run.
        advance: called after each batch, for progress.

    Raises:
        CalibrationError: the model gives no logits, or gradients that are not finite.
    """
    if not modules:
        return {}
    if (reason := why_no_gradients(model)) is not None:
        raise CalibrationError(reason)
    embedding = cast(Any, model).get_input_embeddings()
    gathered: dict[str, dict[int, Tensor]] = {name: {} for name in modules}
    head, visits, batches = Head(model), dict[str, list[_Visit]](), list(batches)
    blocks = [model.get_submodule(name) for name in find_blocks(model).names()]
    with ExitStack() as stack:
        stack.callback(embedding.register_forward_hook(_begin).remove)
        for name, module in modules.items():
            hook = partial(_watch, visits.setdefault(name, []))
            stack.callback(module.register_forward_hook(hook).remove)
        for number, batch in batches:
            context = {"calibration": Unobserved(quantizes=False), "padding": batch.mask}
            again = {block: partial(_run_again, block.forward, context) for block in blocks}
            with in_context(**context, batch=number), replaced_forward(again):
                _backward(head, batch, number)
            for name, seen in visits.items():
                if len(seen) == 1 and seen[0].weights is not None:
                    gathered[name][number] = seen[0].weights
                seen.clear()
            give_back()  # else what each batch leaves free lies between what the next one makes
            advance()
    for name, weights in gathered.items():
        if not all(bool(each.isfinite().all()) for each in weights.values()):
            raise CalibrationError(f"{name}: the gradient of the loss holds NaN or inf, so tokens cannot count by it")
    return {name: weights for name, weights in gathered.items() if len(weights) == len(batches)}


class _Visit:
    """One call of a module: which rows of its output [..., N] are real, and their weights once the gradient is back."""

    def __init__(self, output: Tensor) -> None:
        numbers = torch.arange(output[..., 0].numel(), device=output.device).reshape(*output.shape[:-1], 1)
        self._rows = real_tokens(numbers, 1).flatten()
        self.weights: Tensor | None = None

    def take(self, gradient: Tensor) -> None:
        self.weights = gradient.float().square().sum(-1).flatten()[self._rows]


def _watch(seen: list[_Visit], module: nn.Module, args: object, output: Tensor) -> None:
    if output.requires_grad and forward_context().batch is not None:
        seen.append(visit := _Visit(output))
        output.register_hook(visit.take)


def _run_again(forward: Callable[..., Any], context: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
    """A block that keeps its input alone; what it runs on the way back belongs to no batch, so that it is not watched
    twice."""
    contexts = lambda: (nullcontext(), in_context(**context, batch=None))  # noqa: E731
    how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    return checkpoint(forward, *args, **how, **kwargs)


def _begin(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output.detach().requires_grad_().clone()  # which may be changed in place, as a leaf may not


@torch.enable_grad()
def _backward(head: Head, batch: Batch, number: int) -> None:
    """Send the gradient of the loss of `batch` back: a part of the positions at a time to the last hidden states, and
    all together from there."""
    if (ids := batch.inputs.get("input_ids")) is None:
        raise CalibrationError("tokens count by the gradient of the loss, and a batch has no input_ids")
    output = head.hidden(ids, batch.inputs.get("attention_mask"))
    field = "logits" if "logits" in output else "last_hidden_state"
    leaf = output[field].detach().requires_grad_()
    generator = torch.Generator(ids.device).manual_seed(number)
    for part in head.parts(ids.shape, elements=ELEMENTS // 4):
        log_p = head.logits(type(output)(**{field: leaf}), part).float().log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
        loss = -log_p.flatten(0, 1).gather(-1, drawn).reshape(log_p.shape[:2])
        (loss if batch.mask is None else loss[batch.mask[:, part].bool()]).sum().backward()
    output[field].backward(leaf.grad)

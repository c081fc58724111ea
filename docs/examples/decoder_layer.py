"""A full decoder layer of the model that ships with wrapq, with every one of its inner points quantized.

    python docs/examples/decoder_layer.py

A layer can be quantized alone: it needs the inputs that it gets inside the model, which a hook collects.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from torch import Tensor, nn

import wrapq
from wrapq.data.samples import build_samples
from wrapq.data.sources.base import make_source
from wrapq.recipe.schema import ModelConfig
from wrapq.resolve.model_source import ModelSource
from wrapq.wrappers.model import iter_quantizers

LAYER = 1
DEMO = ModelSource(ModelConfig(path="wrapq://demo"))


def main() -> None:
    """Quantize one decoder layer at 16 and at 8 bits and print the signal to quantization noise of each."""
    batches = layer_inputs()
    for weight, activations in (("int8:channel:sym", "int16:tensor:sym"), ("int8:channel:sym", "int8:tensor:asym")):
        layer = demo_model().model.layers[LAYER]
        expected = run(layer, batches[0])
        layer = wrapq.prepare(layer, wrapq.PTQConfig(weight=weight, activations=activations))
        points = [quantizer.where.lstrip(".") for quantizer in iter_quantizers(layer)]
        for batch in batches:
            run(layer, batch)
        noise = run(wrapq.convert(layer), batches[0]) - expected
        decibels = 20 * torch.log10(expected.norm() / noise.norm())
        click.echo(f"weight {weight}, activations {activations}: {len(points)} points, {decibels:.1f} dB")
    click.echo("points: " + ", ".join(points))


def demo_model() -> Any:
    """The shipped model; with eager attention its layers are handed their causal mask as a tensor."""
    model: Any = DEMO.load(torch.device("cpu"))
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def layer_inputs() -> list[dict[str, Any]]:
    """The keyword arguments that the layer is called with, for four batches of calibration text."""
    model, seen = demo_model(), []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({"hidden_states": args[0], **kwargs})

    model.model.layers[LAYER].register_forward_pre_hook(keep, with_kwargs=True)
    text = build_samples(make_source("demo", {"split": "calib"}), DEMO.tokenizer(), samples=16, seq_len=64, seed=0)
    for batch, *_ in text.batches(4):
        model(batch, use_cache=False)
    return seen


@torch.no_grad()
def run(layer: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The layer's hidden states [B, T, K]."""
    return layer(**inputs)


if __name__ == "__main__":
    main()

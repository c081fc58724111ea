"""The MLP of a Llama layer, with 8-bit weights and its inner point quantized coarser and coarser.

    python docs/examples/llama_mlp.py

The MLP is a module with children. Its wrapper adds points that no leaf has: `mul`, the gated product
`act(gate(x)) * up(x)`, whose outliers are what makes `down_proj` hard to quantize.
"""

from __future__ import annotations

import click
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import wrapq


def main() -> None:
    """Quantize one MLP with three specs for its gated product and print the error of each."""
    batches = [torch.randn(2, 64, 256, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    click.echo(f"{'mul':<24}relative error")
    for spec in ("int16:tensor:sym", "int8:tensor:asym", "int4:tensor:asym"):
        click.echo(f"{spec:<24}{error_with(spec, batches):.4f}")


def error_with(product: str, batches: list[torch.Tensor]) -> float:
    """The relative error of the quantized MLP's output when the gated product has the spec `product`."""
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=256, intermediate_size=512)).eval()
    expected = mlp(batches[0]).detach()

    # Overrides go by module name, in order. "*" means every module; those without a point called mul keep what they
    # have.
    config = wrapq.PTQConfig(
        weight="int8:channel:sym",
        activations="int16:tensor:sym",
        overrides={"*": {"mul": product}, "down_proj": {"weight": "int8:g128:sym"}},
    )
    model = wrapq.prepare(mlp, config)
    with torch.no_grad():
        for batch in batches:
            model(batch)
        actual = wrapq.convert(model)(batches[0])
    return ((actual - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()

"""One `nn.Linear` through prepare, a loop of one's own, and convert.

    python docs/examples/linear.py

Any `nn.Module` goes the same way; this is the smallest one with a quantization point of each kind.
"""

from __future__ import annotations

import click
import torch
from torch import nn

import wrapq


def main() -> None:
    """Quantize a linear layer to 8 bits and print what it cost."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 128)
    batches = [torch.randn(32, 256) for _ in range(8)]
    expected = layer(batches[0])

    # The weight gets one scale per output row; what it multiplies, the input, gets one, chosen from data.
    config = wrapq.PTQConfig(weight="int8:channel:sym", activation="int8:tensor:asym")
    model = wrapq.prepare(layer, config)

    # The calibration loop is ordinary code: whatever runs through the model is observed.
    with torch.no_grad():
        for batch in batches:
            model(batch)

    model = wrapq.convert(model)
    actual = model(batches[0])

    error = ((actual - expected).norm() / expected.norm()).item()
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    click.echo(f"model: {model}")
    click.echo(
        f"weight: {model.weight_packed.dtype} words, {stored} bytes with scales and bias; float {layer.weight.nbytes}"
    )
    click.echo(f"relative error: {error:.4f}")


if __name__ == "__main__":
    main()

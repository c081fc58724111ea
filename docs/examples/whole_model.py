"""A whole causal language model through the Python API: calibrate, convert, measure, generate.

    python docs/examples/whole_model.py

`wrapq run` does the same from a recipe and keeps a record; this is for programs that own their loop.
"""

from __future__ import annotations

import math
from typing import Any

import click
import torch

import wrapq
from wrapq.data.samples import Samples, build_samples
from wrapq.data.sources.base import make_source
from wrapq.recipe.schema import ModelConfig
from wrapq.resolve.model_source import ModelSource

DEMO = ModelSource(ModelConfig(path="wrapq://demo"))  # or the path of a model in Hugging Face layout
PROMPT = "Return a list of"


def main() -> None:
    """Quantize the shipped model and print perplexity before and after, and what it then writes."""
    model: Any = DEMO.load(torch.device("cpu"))
    heldout = windows("heldout")
    before = perplexity(model, heldout)

    config = wrapq.PTQConfig(
        weight="int4:g128:sym:mse",
        activations="int16:tensor:sym",
        overrides={"lm_head": None, "*.self_attn.*": {"weight": "int8:channel:sym"}},
    )
    model = wrapq.prepare(model, config)
    with torch.no_grad():
        for ids, *_ in windows("calib").batches(4):
            # a padded batch runs inside `with wrapq.padding(mask):`; windows of running text have no padding
            model(ids)
    model = wrapq.convert(model)

    click.echo(f"perplexity: float {before:.2f}, quantized {perplexity(model, heldout):.2f}")
    # The result is still a transformers model.
    tokenizer = DEMO.tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    click.echo(f"generated: {tokenizer.decode(written[0], skip_special_tokens=True)!r}")


def windows(split: str) -> Samples:
    """Sixteen windows of 128 tokens of one of the texts that ship with the model."""
    return build_samples(make_source("demo", {"split": split}), DEMO.tokenizer(), samples=16, seq_len=128, seed=0)


@torch.no_grad()
def perplexity(model: Any, samples: Samples) -> float:
    """Of each token given those before it in its window."""
    losses = [model(ids, labels=ids).loss for ids, *_ in samples.batches(4)]
    return math.exp(torch.stack(losses).mean())


if __name__ == "__main__":
    main()

"""How large the models of every scheme are: on disk, in memory, and as the scheme says.

python -m tests.bench.bench_sizes                              prints the tables
pytest -m bench -n 0 tests/bench/bench_sizes.py                prints them and checks the target
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import wrapq
from tests.runtime.sizes import SCHEMES, bytes_on_kernels, converted, file_bytes, held_bytes, ideal_bytes

WITHIN = 0.02


@dataclass(frozen=True)
class Row:
    """One scheme: bytes of the file without its header, in memory without and on the largest kernel, and ideally."""

    scheme: str
    file: int
    reference: int
    kernels: int
    ideal: float
    names: str

    def over(self) -> tuple[float, float, float]:
        """By which part file, reference and kernels are above the ideal."""
        return self.file / self.ideal - 1, self.reference / self.ideal - 1, self.kernels / self.ideal - 1


def shipped() -> nn.Module:
    path = Path(wrapq.__file__).parent / "assets" / "demo"
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)


def random() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4, "vocab_size": 4096, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)


MODELS: dict[str, Callable[[], nn.Module]] = {"the shipped model": shipped, "a random Llama": random}


@torch.no_grad()
def measure(make: Callable[[], nn.Module]) -> Iterator[Row]:
    floats = make()
    ids = torch.randint(0, floats.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
    for scheme in SCHEMES:
        model = converted(make(), scheme, ids)
        with TemporaryDirectory() as folder:
            file = file_bytes(model, Path(folder))
        model(ids)
        reference = held_bytes(model)
        kernels = bytes_on_kernels(model, ids)
        largest = max(kernels.values(), default=reference)
        yield Row(scheme, file, reference, largest, ideal_bytes(floats, model), ", ".join(kernels))


def table(name: str, rows: list[Row]) -> str:
    floats = MODELS[name]()
    parameters, size = sum(p.numel() for p in floats.parameters()), held_bytes(floats)
    titles = ("file", "memory", "kernels")
    head = f"{'scheme':14}{''.join(f'{title:>9}' for title in (*titles, 'ideal'))} MB"
    head += f"{''.join(f'{title:>8}' for title in titles)} % over"
    lines = [f"{name}: {parameters / 1e6:.1f} million parameters, {size / 1e6:.2f} MB in float32", head]
    for row in rows:
        sizes = "".join(f"{part / 1e6:9.3f}" for part in (row.file, row.reference, row.kernels, row.ideal))
        over = "".join(f"{100 * part:8.2f}" for part in row.over())
        lines.append(f"{row.scheme:14}{sizes}   {over}  {row.names}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.bench
@pytest.mark.parametrize("name", MODELS)
def test_every_scheme_is_within_two_percent(name: str) -> None:
    rows = list(measure(MODELS[name]))
    sys.stdout.write("\n" + table(name, rows))
    assert all(abs(part) <= WITHIN for row in rows for part in row.over())


if __name__ == "__main__":
    for name, make in MODELS.items():
        sys.stdout.write(table(name, list(measure(make))) + "\n")

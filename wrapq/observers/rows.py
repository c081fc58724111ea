"""A sample of rows at random, the same whatever the order in which they come."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_rows(rows: Tensor, count: int) -> Tensor:
    """The `count` rows of [..., M, K + 1] that have the largest numbers in the last column."""
    numbers = rows[..., -1].reshape(-1, rows.shape[-2])[0]
    return rows.index_select(-2, numbers.topk(min(count, len(numbers))).indices)


def numbered(x: Tensor, batch: int) -> Tensor:
    """`x` [..., M, K] with a number between 0 and 1 in one more column, which batch and row decide, and nothing else:
    so the largest choose at random, and the same rows whatever the order of batches and the process they are in."""
    row = torch.arange(1, x.shape[-2] + 1, device=x.device)
    mixed = row * 2654435761 % 2**32 ^ batch * 2246822519 % 2**32
    mixed = (mixed ^ mixed >> 15) * 739982445 % 2**32
    numbers = ((mixed ^ mixed >> 12) % 2**24 + 1) / (2**24 + 1)
    return torch.cat([x, numbers.to(x)[:, None].expand(*x.shape[:-1], 1)], -1)

"""Orthogonal matrices that spread outliers over all channels: Hadamard where a width has one, else random ones.

A Hadamard matrix is made of those of Sylvester (powers of two) and of Paley, "On Orthogonal Matrices", 1933, for the
field of q elements: of q + 1 rows where q = 3 mod 4 (12, 20, 28, 44, ...) and of 2 (q + 1) where q = 1 mod 4 (36, 52,
76, ...), by their Kronecker products. Signs of the rows are random, as in QuaRot (arXiv:2404.00456).
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "orthogonal"]


def rotation(width: int, kind: Kind, seed: int) -> Tensor:
    """An orthogonal matrix [D, D] in float64, the same for the same seed: a Hadamard matrix with random signs, or a
    uniformly random one where `kind` asks for it or no Hadamard matrix of that width is known here."""
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(width) if kind == "hadamard" else None
    if matrix is None:
        q, r = torch.linalg.qr(torch.randn(width, width, dtype=torch.double, generator=generator))
        return q * r.diagonal().sign()  # else the distribution would depend on the signs that QR chooses
    signs = torch.randint(2, (width, 1), generator=generator, dtype=torch.double) * 2 - 1
    return signs * matrix / width**0.5


def around_ones(width: int, kind: Kind, seed: int) -> Tensor:
    """An orthogonal matrix [D, D] that keeps the vector of ones, and with it the mean of what it rotates.

    `P^T diag(1, R) P` with R of D - 1 and the reflection P that takes the ones to the first axis.
    """
    reflected = torch.full((width,), width**-0.5, dtype=torch.double)
    reflected[0] -= 1
    norm = reflected.square().sum()
    mirror = torch.eye(width, dtype=torch.double)
    if norm > 0:
        mirror -= 2 / norm * torch.outer(reflected, reflected)
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.double), rotation(width - 1, kind, seed))
    return mirror.t() @ inner @ mirror


def factors(width: int) -> tuple[Tensor, Tensor] | None:
    """Hadamard matrices L [A, A] and R [B, B], `A B = width`, whose Kronecker product is one of that width, with the
    least `A + B`: what multiplying a row by them takes for each of its elements; None where there are none."""
    for left in range(int(width**0.5), 0, -1):
        pair = (hadamard(left), hadamard(width // left)) if width % left == 0 else (None, None)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def hadamard(width: int) -> Tensor | None:
    """A matrix H [D, D] of 1 and -1 in float64 with `H H^T = D I`; None where Sylvester and Paley give none."""
    if width in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)[:width, :width]
    if width < 1 or width % 4:
        return None
    for factor in (2, *range(4, int(width**0.5) + 1, 4)):
        if width % factor == 0 and (left := hadamard(factor)) is not None:
            right = hadamard(width // factor)
            if right is not None:
                return torch.kron(left, right)
    if (width - 1) % 4 == 3 and (jacobsthal := _jacobsthal(width - 1)) is not None:
        return _bordered(jacobsthal, -1.0) + torch.eye(width, dtype=torch.double)
    if (width // 2 - 1) % 4 == 1 and (jacobsthal := _jacobsthal(width // 2 - 1)) is not None:
        conference = _bordered(jacobsthal, 1.0)
        signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.double)
        alone = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.double)
        return torch.kron(conference, signs) + torch.kron(torch.eye(width // 2, dtype=torch.double), alone)
    return None


def _bordered(matrix: Tensor, sign: float) -> Tensor:
    """`matrix` [q, q] with a row of ones above, a column of `sign` before it and a zero in the corner."""
    bordered = torch.zeros(len(matrix) + 1, len(matrix) + 1, dtype=torch.double)
    bordered[0, 1:], bordered[1:, 0], bordered[1:, 1:] = 1.0, sign, matrix
    return bordered


def _jacobsthal(q: int) -> Tensor | None:
    """For the elements a, b of the field of q: 1 where a - b is a square, -1 where it is not, 0 where a = b; None where
    q is no prime power."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    degree = 0
    while p ** (degree + 1) <= q:
        degree += 1
    if q < 2 or p**degree != q:
        return None
    character = torch.zeros(q, dtype=torch.double)
    powers = torch.tensor(_powers(p, degree))
    character[powers[::2]], character[powers[1::2]] = 1.0, -1.0  # squares are the even powers of a generator
    place = p ** torch.arange(degree)
    digits = torch.arange(q)[:, None] // place % p
    return character[((digits[:, None] - digits) % p * place).sum(-1)]


@cache
def _powers(p: int, degree: int) -> tuple[int, ...]:
    """The powers of a generator of the field of `q = p^degree`, as numbers whose digits in base p are coefficients.

    It is a root of the first monic polynomial of that degree whose powers run through the whole field.
    """
    orbits = (_orbit(p, coefficients) for coefficients in product(range(p), repeat=degree))
    return next(powers for powers in orbits if len(powers) == p**degree - 1)


def _orbit(p: int, coefficients: tuple[int, ...]) -> tuple[int, ...]:
    """1, x, x^2, ... until 1 comes again or there is no way back, where `x^degree = sum_i coefficients_i x^i`."""
    one = (1, *[0] * (len(coefficients) - 1))
    seen: dict[tuple[int, ...], None] = {}
    element = one
    while element not in seen and any(element):
        seen[element] = None
        carry = element[-1]
        element = tuple((low + carry * c) % p for low, c in zip((0, *element[:-1]), coefficients, strict=True))
    return tuple(sum(digit * p**i for i, digit in enumerate(element)) for element in seen)

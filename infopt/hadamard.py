"""Orthogonal matrices that spread every channel over all others: random signs, then a normalized Hadamard matrix.

Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), section 3: Q = D H with D a diagonal of random signs. A Hadamard matrix has
entries +1 and -1 and orthogonal rows; 1/sqrt(n) makes it orthogonal, and no channel weighs more than another in any sum.

    2^k      Sylvester: the k-fold Kronecker product of [[1, 1], [1, -1]]
    q + 1    Paley I, q a prime that leaves 3 when divided by 4: 12, 20, 24, 44, ...
    2q + 2   Paley II, q a prime that leaves 1: 12, 28, 36, 60, ...
    2^k n    the Kronecker product of a matrix of order n with Sylvester's: 576 = 16 x 36, 960 = 16 x 60, 2560 = 128 x 20

A size that none of these reaches (an odd one, 6, 92) has, in place of the Paley matrix, an orthogonal matrix of its odd part
drawn at random from the seed: still a rotation, though its entries are not all of one size; `construction` says so.
Paley's matrices over fields that are not prime (28 = 27 + 1) are left out: what they reach is reached otherwise, or drawn.

A product is never multiplied out: a matrix of order 4096 is applied as two of order 64. Everything is float64.

Legend: N the size, X anything, M the order of one factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.errors import Unsupported

_LARGEST = 4096  # order of one factor that is kept as a matrix
_PIECE = 6  # powers of two that make one factor: matrices of order 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [N, N]: diag(signs) times the Kronecker product of the factors, each [M, M]."""

    signs_N: Tensor
    factors: tuple[Tensor, ...]
    construction: str

    @property
    def size(self) -> int:
        return len(self.signs_N)

    def __call__(self, x_XN: Tensor) -> Tensor:
        """x Q in float64, of the shape of x [..., N]."""
        orders = [len(factor) for factor in self.factors]
        y = (x_XN.double() * self.signs_N).reshape(-1, *orders)
        for at, factor_MM in enumerate(self.factors, 1):
            y = torch.tensordot(y, factor_MM, dims=([at], [0])).movedim(-1, at)
        return y.reshape(x_XN.shape)

    def matrix(self) -> Tensor:
        """Q itself, for small sizes and for tests."""
        return self(torch.eye(self.size, dtype=torch.float64))


def rotation(size: int, seed: int) -> Rotation:
    """The rotation of that size; the same size and seed give the same one. Unsupported for a large size without a
    Hadamard matrix."""
    generator = torch.Generator().manual_seed(seed)
    signs_N = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    for used in range(twos + 1):
        core = paley(odd << used) if odd > 1 else None
        if core is not None:
            powers = _powers(twos - used)
            return Rotation(signs_N, (*powers, core), _said(powers, f"Paley {len(core)}"))
    powers = _powers(twos)
    if odd == 1:
        return Rotation(signs_N, powers, _said(powers, ""))
    return Rotation(signs_N, (*powers, _drawn(odd, size, generator)), _said(powers, f"random orthogonal {odd}"))


def paley(order: int) -> Tensor | None:
    """A normalized Hadamard matrix of that order by one of Paley's constructions over a prime field, None if none fits."""
    if order % 4 or order > _LARGEST:
        return None
    if _is_prime(order - 1):  # 3 mod 4, as the order is a multiple of 4
        core = torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1.0)
    elif (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        half = order // 2
        core = torch.kron(_bordered(half - 1, 1.0), plus) + torch.kron(torch.eye(half, dtype=torch.float64), minus)
    else:
        return None
    return core / order**0.5


def _bordered(q: int, left: float) -> Tensor:
    """Jacobsthal's matrix of the prime q, chi(i - j), with a row of ones above and a column of `left` beside it."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q).square() % q] = 1.0
    chi[0] = 0.0
    at = torch.arange(q)
    out = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    out[0, 1:], out[1:, 0] = 1.0, left
    out[1:, 1:] = chi[(at[:, None] - at) % q]
    return out


def _powers(twos: int) -> tuple[Tensor, ...]:
    """Sylvester's matrix of order 2^twos as factors of order 64 and one of what is left."""
    factors = []
    while twos:
        piece = min(twos, _PIECE)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for _ in range(piece):
            matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        factors.append(matrix / 2 ** (piece / 2))
        twos -= piece
    return tuple(factors)


def _drawn(odd: int, size: int, generator: torch.Generator) -> Tensor:
    if odd > _LARGEST:
        raise Unsupported(
            f"there is no rotation of {size} channels here",
            f"no known Hadamard matrix has that order, and its odd part {odd} is too large to draw one",
            "leave --rotate out",
        )
    q_MM, r_MM = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    return q_MM * r_MM.diagonal().sign()  # so that the matrix does not depend on which signs the routine prefers


def _said(powers: tuple[Tensor, ...], core: str) -> str:
    order = 1
    for factor in powers:
        order *= len(factor)
    sylvester = [f"Sylvester {order}"] if order > 1 or not core else []
    return " x ".join([*sylvester, *([core] if core else [])])


def _is_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, int(n**0.5) + 1))

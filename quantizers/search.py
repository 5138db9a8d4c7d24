"""Mixed precision: give every group of layers the number of bits that makes the sum of errors smallest under a budget.

That is a multiple-choice knapsack, and it is solved exactly: with costs as whole numbers of a common unit,

    best[n][b] = min over choices c of group n of  best[n-1][b - cost(n, c)] + error(n, c)

Layers of a model are multiples of few sizes, so the unit is large and the table small. The last row answers every budget at
once: it is the Pareto front. Errors of different groups are taken to add up, which holds while they are small.

Legend: N groups of layers, B units of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from infopt.errors import UsageError

_MOST_UNITS = 200_000


@dataclass(frozen=True)
class Allocation:
    """choices: for each group the index of its choice. cost, error: their sums. front: (cost, least error) of all budgets,
    only where the error changes."""

    choices: list[int]
    cost: int
    error: float
    front: list[tuple[int, float]]


def allocate(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int) -> Allocation:
    """The choices with the least sum of errors whose costs are at most `budget` in sum; UsageError if none fit.

    Exact while the budget is at most 200,000 times the greatest common divisor of the costs; beyond that costs are rounded
    up to a coarser unit, so the budget still holds.
    """
    unit = math.gcd(*(cost for row in costs for cost in row))
    unit = max(unit, -(-budget // _MOST_UNITS))
    units = [[-(-cost // unit) for cost in row] for row in costs]
    room = min(budget // unit, sum(max(row) for row in units))
    least = sum(min(row) for row in units)
    if least > room:
        raise UsageError(
            f"a budget of {budget / 8e6:.1f} MB of codes", f"the smallest choices need {least * unit / 8e6:.1f} MB",
            "a larger --target-bits or --target-size",
        )  # fmt: skip
    best_B = torch.zeros(room + 1, dtype=torch.float64)
    taken_NB = torch.zeros(len(units), room + 1, dtype=torch.uint8)
    for n, (row, wrong) in enumerate(zip(units, errors, strict=True)):
        new_B = torch.full_like(best_B, math.inf)
        for c, (cost, error) in enumerate(zip(row, wrong, strict=True)):
            shifted_B = torch.full_like(best_B, math.inf)
            if cost <= room:
                shifted_B[cost:] = best_B[: room + 1 - cost] + error
            taken_NB[n] = torch.where(shifted_B < new_B, torch.tensor(c, dtype=torch.uint8), taken_NB[n])
            new_B = torch.minimum(new_B, shifted_B)
        best_B = new_B
    choices, left = [0] * len(units), room
    for n in reversed(range(len(units))):
        choices[n] = int(taken_NB[n, left])
        left -= units[n][choices[n]]
    return Allocation(
        choices=choices,
        cost=sum(row[c] for row, c in zip(costs, choices, strict=True)),
        error=sum(row[c] for row, c in zip(errors, choices, strict=True)),
        front=[(b * unit, float(best_B[b])) for b in range(room + 1) if b == least or _better(best_B, b)],
    )


def _better(best_B: torch.Tensor, b: int) -> bool:
    return b > 0 and bool(torch.isfinite(best_B[b])) and float(best_B[b]) < float(best_B[b - 1])

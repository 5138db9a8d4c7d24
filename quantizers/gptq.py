"""GPTQ: round one column after another, and let the columns not yet rounded make up for the error.

Frantar et al. 2022 (arXiv:2210.17323): with H = X^T X + damping and U the upper Cholesky factor of H^-1 (U^T U = H^-1),

    q_j = Q(w_j),   e_j = (w_j - q_j) / U_jj,   w_k -= e_j U_jk  for every k > j

minimises ||X (W - Q)^T||^2 greedily. Changed here, and why:
- The rows of all ops that read one space are solved together: they share H, and one factorisation serves them.
- U comes from one Cholesky factorisation of the reversed H, U = P L^-1 P, not from inverting H and factorising again: half
  of the work, and no squared condition number.
- Columns are halved recursively, so that nearly all of the compensation is matrix products; the definition's loop over
  single columns remains only for the last few (`_LEAF`). The weights lie transposed, a column contiguous in memory.
- A group's range is chosen when the group is reached, from the compensated weights, by the error that GPTQ itself counts:
  rounding column j by d costs (d / U_jj)^2 once the later columns have made up for it. Weighting by the diagonal of H, as
  if nothing were made up for, leaves up to a fifth more error (SmolLM2's q/k/v with act-order). With act-order
  (columns by falling diagonal of H) ranges come from the original columns instead: *static groups*, a layout that
  every server takes, because the permutation leaves no trace on disk.
- A Hessian that is not positive definite raises the damping tenfold until it is; the step notes it.

Legend: O output channels (of all ops of a space), I input columns, C = I, K columns of a group, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.errors import Unsupported
from infopt.grid import Grid
from infopt.qtensor import QTensor
from infopt.quantizers.rounding import CLIPPING, Round, choose_range, finish, together
from infopt.quantizers.work import BlockWork
from infopt.topology import Space

_LEAF = 8  # columns solved one by one: below this, the cost of a call exceeds that of its arithmetic
_RATIOS = (1.0, 1.04, *CLIPPING[1:10])
_CHUNK = 128  # columns per update of the rest, where a group is a whole channel


def inverse_factor(h_CC: torch.Tensor, damp: float) -> tuple[torch.Tensor, float]:
    """(U [C, C] with U^T U = (H + d I)^-1, the damping used as a fraction of the mean diagonal).

    Channels that no input reached get a diagonal of one: they stay uncoupled and are simply rounded.
    """
    diagonal = h_CC.diagonal()
    base_CC = h_CC + torch.diag(torch.where(diagonal > 0, 0.0, 1.0))
    mean = base_CC.diagonal().mean()
    while damp < 1e3:
        damped_CC = base_CC + damp * mean * torch.eye(len(h_CC))
        lower_CC, info = torch.linalg.cholesky_ex(damped_CC.flip(0, 1))
        if info == 0 and bool(torch.isfinite(lower_CC).all()):
            return _inverse_lower(lower_CC).flip(0, 1).contiguous(), damp
        damp = max(damp * 10, 1e-4)
    raise Unsupported(
        "The calibration inputs of this space are not finite.",
        "No damping makes their Hessian positive definite.",
        "Check the model with `infopt verify MODEL`, or quantize it with --method rtn.",
    )


def _inverse_lower(lower_CC: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangular matrix by halves: a third of the work of solving for the identity.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]
    """
    count = len(lower_CC)
    if count <= 96:
        return torch.linalg.solve_triangular(lower_CC, torch.eye(count), upper=False)
    head, tail = slice(0, count // 2), slice(count // 2, count)
    inverse_CC = torch.zeros_like(lower_CC)
    inverse_CC[head, head] = _inverse_lower(lower_CC[head, head])
    inverse_CC[tail, tail] = _inverse_lower(lower_CC[tail, tail])
    inverse_CC[tail, head] = -(inverse_CC[tail, tail] @ (lower_CC[tail, head] @ inverse_CC[head, head]))
    return inverse_CC


def solve(
    w_OI: torch.Tensor, h_CC: torch.Tensor, grid: Grid, damp: float = 0.01, act_order: bool = False
) -> tuple[QTensor, float]:
    """Quantize weights fp32 [O, I] given the inputs' Gram matrix fp32 [I, I]; (the codes, the damping used)."""
    rows, columns = w_OI.shape
    width = grid.width(columns)
    order = h_CC.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    u_CC, damp = inverse_factor(h_CC[order][:, order], damp)
    cost_C = torch.empty(columns)
    cost_C[order] = u_CC.diagonal() ** -2
    fixed = None
    if act_order or grid.group is None or grid.rows != 1:
        fixed = choose_range(w_OI, grid, cost_C, _RATIOS)
    w_IO = w_OI.T[order].contiguous()
    codes_IO = torch.empty_like(w_IO)
    groups = -(-columns // width)
    scale_GO, zero_GO = torch.empty(groups, rows), torch.empty(groups, rows)
    if fixed:
        height = grid.rows or rows
        scale_GO.copy_(fixed[0].repeat_interleave(height, 0)[:rows].T)
        zero_GO.copy_(fixed[1].repeat_interleave(height, 0)[:rows].T)
    step = width if grid.group is not None else _CHUNK
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        group_I = order[start:stop] // width
        if not fixed:
            scale_O1, zero_O1 = choose_range(w_IO[start:stop].T, grid, cost_C[start:stop], _RATIOS)
            scale_GO[start // width], zero_GO[start // width] = scale_O1[:, 0], zero_O1[:, 0]
        error_KO = _solve_columns(
            w_IO[start:stop],
            codes_IO[start:stop],
            u_CC[start:stop, start:stop],
            grid,
            scale_GO[group_I],
            zero_GO[group_I],
        )
        w_IO[stop:].addmm_(u_CC[start:stop, stop:].T, error_KO, alpha=-1)
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8)
    codes_OI[:, order] = grid.pack(codes_IO).T
    scale_RG, zero_RG = fixed or (scale_GO.T.contiguous(), zero_GO.T.contiguous())
    return QTensor(codes_OI, scale_RG.to(grid.scale_dtype), zero_RG.to(torch.uint8), grid), damp


def _solve_columns(
    w_KO: torch.Tensor,
    codes_KO: torch.Tensor,
    u_KK: torch.Tensor,
    grid: Grid,
    scale_KO: torch.Tensor,
    zero_KO: torch.Tensor,
) -> torch.Tensor:
    """Solve some columns in place: w_KO becomes their errors e [K, O], for whoever comes after them."""
    count = len(w_KO)
    if count > _LEAF:
        half = count // 2
        left, right = slice(0, half), slice(half, count)
        first = _solve_columns(w_KO[left], codes_KO[left], u_KK[left, left], grid, scale_KO[left], zero_KO[left])
        w_KO[right].addmm_(u_KK[left, right].T, first, alpha=-1)
        _solve_columns(w_KO[right], codes_KO[right], u_KK[right, right], grid, scale_KO[right], zero_KO[right])
        return w_KO
    columns = zip(*(part.unbind() for part in (w_KO, codes_KO, scale_KO, zero_KO)), strict=True)
    for j, (w_O, codes_O, scale_O, zero_O) in enumerate(columns):
        codes_O.copy_(grid.encode(w_O, scale_O, zero_O))
        # The row of w turns into the row of e: nothing reads the weight after its own column is done.
        w_O.sub_(grid.decode(codes_O, scale_O, zero_O)).div_(u_KK[j, j])
        if j + 1 < count:
            w_KO[j + 1 :].addr_(u_KK[j, j + 1 :], w_O, alpha=-1)
    return w_KO


@dataclass(frozen=True)
class GPTQ:
    """Step `gptq`. damp: fraction of the mean diagonal added to H. act_order: important columns first, static groups."""

    damp: float = 0.01
    act_order: bool = False
    needs = frozenset({"gram"})
    rewrites = False

    def __call__(self, work: BlockWork, space: Space) -> None:
        if not work.stats[space.name].tokens:  # nothing is known of its inputs
            Round(search=False)(work, space)
        for ops, grid, w_OI in together(work, space):
            q, damp = self._solve(work, w_OI, work.gram(space), grid)
            if damp > self.damp:
                work.notes.append(f"{space.name}: singular Hessian, damping raised from {self.damp:g} to {damp:g}")
            finish(work, ops, q)

    def _solve(self, work: BlockWork, w_OI: torch.Tensor, h_CC: torch.Tensor, grid: Grid) -> tuple[QTensor, float]:
        if grid.rows != 1:  # rows share a scale
            return solve(w_OI, h_CC, grid, self.damp, self.act_order)

        def some(rows_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, damp = solve(rows_OI, h_CC, grid, self.damp, self.act_order)
            return q.codes, q.scale.float(), q.zero, torch.full((len(rows_OI),), damp)

        codes, scale, zero, damp = work.team.by_rows(w_OI, some)
        return QTensor(codes, scale.to(grid.scale_dtype), zero, grid), float(damp[0])

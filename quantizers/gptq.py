"""GPTQ: round one column after another, and let the columns not yet rounded make up for the error.

Frantar et al. 2022 (arXiv:2210.17323) choose the columns one by one and spread each one's error over the columns after it,
by way of the inverse of H = X^T X + damping. The same choice follows from H itself (LDLQ; Chee et al. 2023,
arXiv:2307.13304, theorem 6): with H = U U^T, U upper triangular, and errors E = W - Q, the output error is

    ||E X^T||^2 = ||E U||^2,   (E U)_k = U_kk (e_k + sum_{j<k} e_j U_jk / U_kk)

so column k is best rounded from w_k + sum_{j<k} e_j F_jk, F = U diag(U)^-1. Changed here, and why:
- Nothing is inverted: half of the work, and no squared condition number. U comes from the Cholesky factor L of the
  reversed H, U = P L P.
- The rows of all ops that read one space are solved together: they share H, and one factorisation serves them.
- Columns are halved recursively, so that nearly all of the compensation is matrix products; the definition's loop over
  single columns remains only for the last few (`_LEAF`). The weights lie transposed, a column contiguous in memory.
- A group's range is chosen when the group is reached, from the compensated weights, by the error that GPTQ itself counts:
  rounding column j by d costs (d U_jj)^2 once the later columns have made up for it. Weighting by the diagonal of H, as
  if nothing were made up for, leaves up to a fifth more error (SmolLM2's q/k/v with act-order). With act-order
  (columns by falling diagonal of H) ranges come from the original columns instead: *static groups*, a layout that
  every server takes, because the permutation leaves no trace on disk.
- `passes` of coordinate descent may follow (QuantEase, Behdin et al. 2023, arXiv:2309.01885): a greedy choice is not the best
  one even for its own error, and each pass lowers that further. Scales are coordinates too: once there are codes, the best
  scale is no longer the one that the range was chosen with.
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

_BLOCK = 32  # columns of a pass of descent whose pull on the later ones is applied at once
_LEAF = 8  # columns solved one by one: below this, the cost of a call exceeds that of its arithmetic
_RATIOS = (1.0, 1.04, *CLIPPING[1:10])
_CHUNK = 128  # columns per update of the rest, where a group is a whole channel


def feedback(h_CC: torch.Tensor, damp: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(F, diag(U)^2 [C], the damping used as a fraction of the mean diagonal); F = U diag(U)^-1 [C, C], U U^T = H + d I.

    Channels that no input reached get a diagonal of one: they stay uncoupled and are simply rounded.
    """
    reversed_CC = h_CC.flip(0, 1)
    diagonal_C = reversed_CC.diagonal().clone()
    while damp < 1e3:
        reversed_CC.diagonal().copy_(_damped(diagonal_C, damp))
        lower_CC, info = torch.linalg.cholesky_ex(reversed_CC)
        if info == 0 and bool(torch.isfinite(lower_CC.diagonal()).all()):
            u_CC = lower_CC.flip(0, 1).contiguous()
            return u_CC / u_CC.diagonal(), u_CC.diagonal().square(), damp
        damp = max(damp * 10, 1e-4)
    raise Unsupported(
        "The calibration inputs of this space are not finite.",
        "No damping makes their Hessian positive definite.",
        "Check the model with `infopt verify MODEL`, or quantize it with --method rtn.",
    )


def _damped(diagonal_C: torch.Tensor, damp: float) -> torch.Tensor:
    known_C = torch.where(diagonal_C > 0, diagonal_C, 1.0)
    return known_C + damp * known_C.mean()


def solve(
    w_OI: torch.Tensor, h_CC: torch.Tensor, grid: Grid, damp: float = 0.01, act_order: bool = False, passes: int = 0
) -> tuple[QTensor, float]:
    """Quantize weights fp32 [O, I] given the inputs' Gram matrix fp32 [I, I]; (the codes, the damping used)."""
    rows, columns = w_OI.shape
    width = grid.width(columns)
    order = h_CC.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    if act_order:
        h_CC = h_CC.index_select(0, order).index_select(1, order)
    feed_CC, cost_C, damp = feedback(h_CC, damp)
    cost_C = torch.empty(columns).index_copy_(0, order, cost_C)
    fixed = None
    if act_order or grid.group is None or grid.rows != 1:
        fixed = choose_range(w_OI, grid, cost_C, _RATIOS)
    w_IO = w_OI.T.contiguous()[order]
    left_IO = w_IO.clone()  # w and what the columns before have left to make up for; then the errors
    codes_IO = torch.empty_like(w_IO)
    groups = -(-columns // width)
    scale_GO, zero_GO = torch.empty(groups, rows), torch.empty(groups, rows)
    height = grid.rows or rows
    if fixed:
        scale_GO.copy_(fixed[0].repeat_interleave(height, 0)[:rows].T)
        zero_GO.copy_(fixed[1].repeat_interleave(height, 0)[:rows].T)
    step = width if grid.group is not None else _CHUNK
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        group_I = order[start:stop] // width
        feed_KK = feed_CC[start:stop, start:stop]
        if not fixed:
            w_KO = w_IO[start:stop] + _settled(left_IO[start:stop] - w_IO[start:stop], feed_KK)
            scale_O1, zero_O1 = choose_range(w_KO.T, grid, cost_C[start:stop], _RATIOS)
            scale_GO[start // width], zero_GO[start // width] = scale_O1[:, 0], zero_O1[:, 0]
        error_KO = _solve_columns(
            w_IO[start:stop],
            left_IO[start:stop],
            codes_IO[start:stop],
            feed_KK,
            grid,
            scale_GO[group_I],
            zero_GO[group_I],
        )
        left_IO[stop:].addmm_(feed_CC[start:stop, stop:].T, error_KO)
    if passes:
        h_CC = h_CC.clone()
        h_CC.diagonal().copy_(_damped(h_CC.diagonal(), damp))
    for _ in range(passes):
        descend(w_IO, codes_IO, h_CC, grid, scale_GO, zero_GO, order // width)
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8)
    codes_OI[:, order] = grid.pack(codes_IO).T
    scale_RG, zero_RG = (part_GO.T[::height].contiguous() for part_GO in (scale_GO, zero_GO))
    return QTensor(codes_OI, scale_RG.to(grid.scale_dtype), zero_RG.to(torch.uint8), grid), damp


def _settled(debt_KO: torch.Tensor, feed_KK: torch.Tensor) -> torch.Tensor:
    """What must be added to some columns [K, O] to make up for all errors so far, were they not to be rounded: a column
    that moves is an error of its own to those after it."""
    return torch.linalg.solve_triangular(feed_KK.T, debt_KO, upper=False, unitriangular=True)


def _solve_columns(
    w_KO: torch.Tensor,
    left_KO: torch.Tensor,
    codes_KO: torch.Tensor,
    feed_KK: torch.Tensor,
    grid: Grid,
    scale_KO: torch.Tensor,
    zero_KO: torch.Tensor,
) -> torch.Tensor:
    """Solve some columns: left_KO becomes their errors e [K, O], for whoever comes after them."""
    count = len(w_KO)
    if count > _LEAF:
        for half in (slice(0, count // 2), slice(count // 2, count)):
            if half.start:
                left_KO[half].addmm_(feed_KK[: half.start, half].T, left_KO[: half.start])
            _solve_columns(w_KO[half], left_KO[half], codes_KO[half], feed_KK[half, half], grid, scale_KO[half],
                           zero_KO[half])  # fmt: skip
        return left_KO
    columns = zip(*(part.unbind() for part in (w_KO, left_KO, codes_KO, scale_KO, zero_KO)), strict=True)
    for j, (w_O, left_O, codes_O, scale_O, zero_O) in enumerate(columns):
        codes_O.copy_(grid.encode(left_O, scale_O, zero_O))
        torch.sub(w_O, grid.decode(codes_O, scale_O, zero_O), out=left_O)
        if j + 1 < count:
            left_KO[j + 1 :].addr_(feed_KK[j, j + 1 :], left_O)
    return left_KO


def descend(
    w_IO: torch.Tensor,
    codes_IO: torch.Tensor,
    h_II: torch.Tensor,
    grid: Grid,
    scale_GO: torch.Tensor,
    zero_GO: torch.Tensor,
    group_I: torch.Tensor,
) -> None:
    """A pass over codes_IO: each column in turn takes the codes that make tr(E H E^T), E = W - Q, smallest while all others
    stay; those of column j are nearest to w_j + (sum_{k != j} H_jk e_k) / H_jj. Then each scale of scale_GO, where no rows
    share one. h_II: with its damping, positive definite."""
    error_IO = w_IO - grid.decode(codes_IO, scale_GO[group_I], zero_GO[group_I])
    pull_IO = h_II @ error_IO
    for start in range(0, len(w_IO), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(w_IO)))
        h_KK, pull_KO, before_KO = h_II[block, block], pull_IO[block], error_IO[block].clone()
        for j in range(len(h_KK)):
            i = start + j
            scale_O, zero_O, error_O = scale_GO[group_I[i]], zero_GO[group_I[i]], error_IO[i].clone()
            codes_IO[i] = grid.encode(w_IO[i] + pull_KO[j] / h_KK[j, j] - error_O, scale_O, zero_O)
            error_IO[i] = w_IO[i] - grid.decode(codes_IO[i], scale_O, zero_O)
            pull_KO[j + 1 :].addr_(h_KK[j + 1 :, j], error_IO[i] - error_O)
        pull_IO[block.stop :].addmm_(h_II[block.stop :, block], error_IO[block] - before_KO)
    if grid.rows == 1:
        _refit(error_IO, codes_IO - zero_GO[group_I], h_II, grid, scale_GO, group_I)


def _refit(
    error_IO: torch.Tensor,
    value_IO: torch.Tensor,
    h_II: torch.Tensor,
    grid: Grid,
    scale_GO: torch.Tensor,
    group_I: torch.Tensor,
) -> None:
    """Each scale in turn becomes the number, as it is stored, nearest to the one that makes tr(E H E^T) smallest while all
    else stays: s + v^T (H E)_g / v^T H_gg v, v = codes - zero."""
    for g, scale_O in enumerate(scale_GO):
        members_K = (group_I == g).nonzero()[:, 0]
        value_KO, h_KI = value_IO[members_K], h_II[members_K]
        cost_O = (value_KO * (h_KI[:, members_K] @ value_KO)).sum(0)
        best_O = scale_O + (value_KO * (h_KI @ error_IO)).sum(0) / cost_O
        best_O = torch.where(best_O > 0, grid.stored(best_O), scale_O)  # not where all codes are zero, which is NaN
        error_IO[members_K] += value_KO * (scale_O - best_O)
        scale_O.copy_(best_O)


@dataclass(frozen=True)
class GPTQ:
    """Step `gptq`. damp: fraction of the mean diagonal added to H. act_order: important columns first, static groups.
    passes: of coordinate descent over codes and scales afterwards."""

    damp: float = 0.01
    act_order: bool = False
    passes: int = 0
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
            return solve(w_OI, h_CC, grid, self.damp, self.act_order, self.passes)

        def some(rows_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
            q, damp = solve(rows_OI, h_CC, grid, self.damp, self.act_order, self.passes)
            return q.codes, q.scale.float(), q.zero, torch.full((len(rows_OI),), damp, dtype=torch.float64)

        codes, scale, zero, damp = work.team.by_rows(w_OI, some)
        return QTensor(codes, scale.to(grid.scale_dtype), zero, grid), float(damp[0])

"""SmoothQuant: move the outliers of the activations into the weights, where they do less harm.

Xiao et al. 2022 (arXiv:2211.10438), eq. 4: the inputs of a space are divided by, and its readers' columns multiplied with,

    s_j = max|X_j|^a / max|W_j|^(1-a)

so that both are easy to round to 8 bits. Changed here, and why: s is found for each space by the output error that it leaves
on a sample of the calibration tokens, with the weights and the inputs rounded as they will be (`migration_error`):

    err(s) = sum over readers of || r(X / s) Q(W s)^T - X W^T ||^2

What err is to be expected where rounding is noise (`ExpectedError`) is cheap and can be derived. It chooses the strength `a`,
or no migration, and from there a descent goes on to the best s of all: one number for each channel instead of one exponent
for all. That s is kept where err is smaller too. Grids whose rounding is no such noise choose the strength by err itself.
1/s folds into whatever op the topology *proved* to write the space (norms, and the linears before v -> o and up -> down,
whose own scales per row take it up without loss), not into a table of norms.

Legend: O output channels, C channels of a space, S sampled tokens, G groups of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from infopt.grid import Grid
from infopt.quantizers.rounding import rounded
from infopt.quantizers.work import BlockWork, obstacle, shared
from infopt.topology import Space

Readers = list[tuple[torch.Tensor, Grid]]

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_STEPS, _RATE = 50, 0.1  # of the descent: it can move a scale by a factor of 12, and more steps find nothing more


def scale_for(max_x_C: torch.Tensor, max_w_C: torch.Tensor, strength: float) -> torch.Tensor:
    """s [C]; channels that no input or no weight uses keep 1."""
    alive = (max_x_C > 0) & (max_w_C > 0)
    s_C = max_x_C.pow(strength) / max_w_C.pow(1 - strength)
    return torch.where(alive, s_C.clamp(1e-5, 1e5), torch.ones(()))


def migration_error(weights: Readers, x_SC: torch.Tensor, s_C: torch.Tensor) -> float:
    """The squared error of all readers' outputs on the sample, weights and inputs rounded after the migration."""
    total = 0.0
    for w_OC, grid in weights:
        q_OC = rounded(w_OC * s_C, grid)
        moved_SC = x_SC / s_C
        if grid.inputs is not None:
            static = None if grid.inputs.dynamic else (moved_SC.abs().amax() / grid.inputs.largest).view(1)
            moved_SC = grid.inputs.round(moved_SC, static)
        total += float((moved_SC @ q_OC.T - x_SC @ w_OC.T).square_().sum(dtype=torch.float64))
    return total


class ExpectedError:
    """`migration_error` in the mean, if rounding were noise: a function of s whose logarithm is convex in log s, so that it
    has one minimum.

    Rounding to multiples of d adds d^2 / 12. The inputs' noise, d = max|x / s| / 127, goes through the weights, and that of
    the weights, d = 2 max|W s| / (2^b - 1), is met by the inputs:

        sum over readers of    sum_t d_t^2 / 12 * sum_j s_j^2 |W_j|^2    +    sum_o d_o^2 / 12 * sum_j |X_j|^2 / s_j^2

    with a d and a sum over j for each group of columns. The readers' grids must pass `holds`.
    """

    def __init__(self, weights: Readers, x_SC: torch.Tensor) -> None:
        self._x_SC, self._x2_C = x_SC.abs(), x_SC.square().sum(0)
        self._weights = [(w_OC.abs(), w_OC.square().sum(0), grid) for w_OC, grid in weights]

    @staticmethod
    def holds(grid: Grid, columns: int) -> bool:
        """Whether what is rounded has steps of one size, in whole groups of one row or in one for all rows."""
        if grid.inputs is not None and (grid.inputs.kind != "int" or columns % (grid.inputs.group or columns)):
            return False
        return grid.kind == "int" and grid.strategy != "block"

    def __call__(self, s_C: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for w_OC, w2_C, grid in self._weights:
            by_group_G = _noise(w_OC, s_C, grid.group, grid.rows is None, grid.levels)
            total = total + by_group_G @ _sums(self._x2_C / s_C.square(), grid.group)
            if (inputs := grid.inputs) is not None:
                by_group_G = _noise(self._x_SC, 1 / s_C, inputs.group, not inputs.dynamic, 2 * inputs.largest)
                total = total + by_group_G @ _sums(w2_C * s_C.square(), inputs.group)
        return total


def _sums(x_C: torch.Tensor, group: int | None) -> torch.Tensor:
    return x_C.view(-1, group or len(x_C)).sum(1)


def _noise(x_RC: torch.Tensor, s_C: torch.Tensor, group: int | None, whole: bool, levels: float) -> torch.Tensor:
    """sum over rows of d^2 / 12, by group [G], where x >= 0 with its columns times s is rounded. whole: all rows share d."""
    x_RGK, s_GK = (part.unflatten(-1, (-1, group or len(s_C))) for part in (x_RC, s_C))
    with torch.no_grad():  # the derivative needs no more than the largest of each group
        at_RG1 = (x_RGK * s_GK).argmax(-1, keepdim=True)
    largest_RG = (x_RGK.gather(-1, at_RG1) * s_GK.expand(x_RGK.shape).gather(-1, at_RG1))[..., 0]
    if whole:
        largest_RG = largest_RG.amax().expand(largest_RG.shape)
    return (largest_RG * (2 / levels)).square().sum(0) / 12


def fitted(expected: ExpectedError, s_C: torch.Tensor, space: Space) -> torch.Tensor:
    """The scale [C] of least expected error that a descent from s_C finds, equal where one writer channel feeds columns."""
    log_C = s_C.log().requires_grad_()
    descent = torch.optim.Adam([log_C], lr=_RATE)
    for step in range(_STEPS):
        with torch.enable_grad():
            error = expected(log_C.exp()).clamp_min(1e-30).log()  # a space of zeros has no error, and no derivative
        (gradient_C,) = torch.autograd.grad(error, log_C)
        log_C.grad = shared(gradient_C, space, "mean")
        descent.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        descent.step()
    return log_C.detach().exp()


@dataclass(frozen=True)
class Smooth:
    """Step `smooth`. strength: the exponent of the activations; search: for each space what errs least of several strengths, of
    no migration, and of a scale fitted channel by channel."""

    strength: float = 0.5
    search: bool = True
    needs = frozenset({"max", "sample"})
    rewrites = True

    def __call__(self, work: BlockWork, space: Space) -> None:
        weights = [(work.weight(op), grid) for op, grid in work.targets(space)]
        if not weights:
            return
        if reason := obstacle(work, space, len(weights)):
            work.notes.append(f"{space.name}: not smoothed ({reason})")
            return
        max_x_C = shared(work.max_abs(space), space, "amax")
        max_w_C = shared(torch.stack([w_OC.abs().amax(0) for w_OC, _ in weights]).amax(0), space, "amax")
        best_C = scale_for(max_x_C, max_w_C, self.strength)
        if self.search:
            others = [scale_for(max_x_C, max_w_C, a) for a in _STRENGTHS if a != self.strength]
            best_C = _searched(weights, work.sample(space), [torch.ones_like(max_x_C), best_C, *others], space)
        if bool((best_C != 1).any()):
            work.scale_space(space, best_C)


def _searched(weights: Readers, x_SC: torch.Tensor, candidates: list[torch.Tensor], space: Space) -> torch.Tensor:
    """The best scale [C] of the candidates, the first of equals, or a better one that lies below them."""

    def error(s_C: torch.Tensor) -> float:
        return migration_error(weights, x_SC, s_C)

    if not all(ExpectedError.holds(grid, x_SC.shape[1]) for _, grid in weights):
        return min(candidates, key=error)
    expected = ExpectedError(weights, x_SC)
    best_C = min(candidates, key=lambda s_C: float(expected(s_C)))
    return min((best_C, fitted(expected, best_C, space)), key=error)

"""What calibration remembers of a space: sums over tokens, never the tokens.

Every solver of infopt measures a candidate weight by the same number, the output error of a linear layer on the
calibration inputs, ||X dW^T||^2 = tr(dW H dW^T) with H = X^T X (GPTQ, Frantar et al. 2022, eq. 1). So one Gram matrix per
space serves all readers of the space and every candidate, and no search needs another forward pass. The sums are
mergeable: statistics of two halves of the data add up to those of the whole.

Legend: T tokens, C channels of the space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from infopt.team import Team

_PANEL = 96  # columns of one panel of the Gram matrix: full speed, and near half of the matrix is skipped
_SAMPLE = 1024  # rows of a sample, at most; half of them are dropped when there are more
# Every so many tokens one goes into the sample, at first. It divides usual windows, so all their first tokens are in it, which
# the others attend to and whose inputs are the largest by far.
_STRIDE = 16
EVERYTHING = frozenset({"gram", "mean", "max", "sample"})


class HeadSums:
    """Sums over tokens of one layer's keys, or values, x and of derivatives g of the block's answer by them, float64.

    sum [H, D], gram: of x^T x [H, D, D], felt: of g^T g [H, D, D]. tokens: how many."""

    def __init__(self, heads: int, width: int) -> None:
        self.tokens = 0
        self.sum_HD = torch.zeros(heads, width, dtype=torch.float64)
        self.gram_HDD = torch.zeros(heads, width, width, dtype=torch.float64)
        self.felt_HDD = torch.zeros_like(self.gram_HDD)

    def add(self, x_BHTD: torch.Tensor, g_BHTD: torch.Tensor) -> None:
        x_HND, g_HND = (part.double().transpose(0, 1).flatten(1, 2) for part in (x_BHTD, g_BHTD))
        self.tokens += x_HND.shape[1]
        self.sum_HD += x_HND.sum(1)
        self.gram_HDD += x_HND.mT @ x_HND
        self.felt_HDD += g_HND.mT @ g_HND

    def unite(self, team: Team) -> HeadSums:
        """The sums over all processes."""
        self.tokens = team.total(self.tokens)
        for part in (self.sum_HD, self.gram_HDD, self.felt_HDD):
            team.add(part)
        return self


class InputStats:
    """Sums over the calibration inputs x_TC of one space, all fp32; only what `needs` names is gathered.

    gram: X^T X [C, C]. mean: mean |x| per channel [C]. max: max |x| per channel [C]. sample: some of the rows [S, C],
    evenly spread over the tokens. shift: (Y - X)^T X [C, C], where y_TC are the same tokens' inputs in the original model;
    it is not part of `EVERYTHING`. tokens: rows seen. Asking for what was not gathered is a ValueError.
    routed: for a space inside an expert, the tokens that the router sent there; where these are fewer than `tokens`, the
    expert was shown the whole batch.
    """

    def __init__(self, width: int, needs: frozenset[str] = EVERYTHING) -> None:
        self.needs = needs
        self.tokens = 0
        self._upper_CC = torch.zeros(width, width) if "gram" in needs else torch.zeros(0, 0)
        self._shift_CC = torch.zeros(width, width) if "shift" in needs else torch.zeros(0, 0)
        self._abs_C = torch.zeros(width)
        self._max_C = torch.zeros(width)
        self._rows: list[torch.Tensor] = []
        self._stride, self._phase = _STRIDE, 0
        self.routed: int | None = None

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None, weight_T: torch.Tensor | None = None) -> None:
        """Count activations [..., C]; original: what the original model has in their place; weight: how often each token
        counts in the sums of products, once without."""
        x_TC = x.reshape(-1, x.shape[-1]).float()
        weighted_TC = x_TC if weight_T is None else x_TC * weight_T[:, None]
        self.tokens += x_TC.shape[0]
        if "gram" in self.needs:
            for start, panel in zip(range(0, x_TC.shape[1], _PANEL), _panels(self._upper_CC), strict=True):
                panel.addmm_(weighted_TC[:, start : start + _PANEL].T, x_TC[:, start:])
        if "shift" in self.needs and original is not None:
            self._shift_CC.addmm_((original.reshape(x_TC.shape).float() - x_TC).T, weighted_TC)
        if "mean" in self.needs:
            self._abs_C += x_TC.abs().sum(0)
        if "max" in self.needs and len(x_TC):
            self._max_C = torch.maximum(self._max_C, x_TC.abs().amax(0))
        if "sample" in self.needs:
            self._rows.append(x_TC[(-self._phase) % self._stride :: self._stride].clone())
            self._phase += x_TC.shape[0]
            self._thin()

    def merge(self, other: InputStats) -> None:
        """Add what another part of the data gave."""
        self._upper_CC += other._upper_CC
        self._shift_CC += other._shift_CC
        self._abs_C += other._abs_C
        self._max_C = torch.maximum(self._max_C, other._max_C)
        self._rows += other._rows
        self.tokens += other.tokens
        self._thin()
        if self.routed is not None and other.routed is not None:
            self.routed += other.routed

    def unite(self, team: Team) -> InputStats:
        """Add what the other processes of the team have seen."""
        if team.size > 1:
            for part in (self._upper_CC, self._shift_CC, self._abs_C):
                team.add(part)
            team.largest(self._max_C)
            self.tokens = team.total(self.tokens)
            if "sample" in self.needs:
                self._rows = [team.gather(torch.cat([*self._rows, torch.zeros(0, len(self._max_C))]))]
                self._thin()
        return self

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """All but the shift, to be stored: the half of the Gram matrix that was summed, panel by panel."""
        parts = {"counts": torch.tensor([self.tokens, -1 if self.routed is None else self.routed])}
        if "gram" in self.needs:
            parts["gram"] = torch.cat([panel.flatten() for panel in _panels(self._upper_CC)])
        if "mean" in self.needs:
            parts["mean"] = self._abs_C
        if "max" in self.needs:
            parts["max"] = self._max_C
        if "sample" in self.needs:
            parts["sample"] = self.sample
        return parts

    @classmethod
    def from_tensors(cls, width: int, needs: frozenset[str], parts: Mapping[str, torch.Tensor]) -> InputStats:
        """What `to_tensors` gave; ValueError where a part that is needed is missing or is not what it should be."""
        stats = cls(width, needs)
        targets = {"mean": stats._abs_C, "max": stats._max_C}
        for name in ("counts", *sorted(needs)):
            if name not in parts:
                raise ValueError(f"no {name}")
        stats.tokens, routed = map(int, _checked(parts["counts"], torch.int64, 2))
        stats.routed = None if routed < 0 else routed
        if "gram" in needs:
            panels = list(_panels(stats._upper_CC))
            sizes = [panel.numel() for panel in panels]
            for panel, part in zip(
                panels, _checked(parts["gram"], torch.float32, sum(sizes)).split(sizes), strict=True
            ):
                panel.copy_(part.view(panel.shape))
        for name in needs & targets.keys():
            targets[name].copy_(_checked(parts[name], torch.float32, width))
        if "sample" in needs:
            rows = min(len(parts["sample"]), _SAMPLE) if parts["sample"].dim() else 0
            stats._rows = [_checked(parts["sample"].flatten(), torch.float32, rows * width).view(rows, width)]
        if stats.tokens < 0 or not stats.finite():
            raise ValueError("it holds numbers that are no sums")
        return stats

    def finite(self) -> bool:
        """Whether every input was a number, and small enough to be squared."""
        parts = (self._upper_CC.diagonal(), self._shift_CC, self._abs_C, self._max_C, *self._rows)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    @property
    def gram(self) -> torch.Tensor:
        self._check("gram")
        upper_CC = self._upper_CC.triu()
        gram_CC = upper_CC + upper_CC.T
        gram_CC.diagonal().mul_(0.5)  # exact, and it was counted twice
        return gram_CC

    @property
    def shift(self) -> torch.Tensor:
        self._check("shift")
        return self._shift_CC

    @property
    def mean_abs(self) -> torch.Tensor:
        self._check("mean")
        return self._abs_C / max(self.tokens, 1)

    @property
    def max_abs(self) -> torch.Tensor:
        self._check("max")
        return self._max_C

    @property
    def sample(self) -> torch.Tensor:
        self._check("sample")
        return torch.cat(self._rows) if self._rows else torch.zeros(0, len(self._max_C))

    def _thin(self) -> None:
        while sum(map(len, self._rows)) > _SAMPLE:
            self._rows = [torch.cat(self._rows)[::2]]
            self._stride *= 2

    def _check(self, what: str) -> None:
        if what not in self.needs:
            raise ValueError(f"{what} was not gathered")


def merged(parts: Iterable[dict[str, InputStats]]) -> dict[str, InputStats]:
    """By space, what parts of the data gave, added up in their order; the first part that has a space takes the others in."""
    whole: dict[str, InputStats] = {}
    for part in parts:
        for name, stats in part.items():
            if name in whole:
                whole[name].merge(stats)
            else:
                whole[name] = stats
    return whole


def _panels(gram_CC: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of the panels right of the diagonal, itself included: the matrix is symmetric."""
    return (gram_CC[start : start + _PANEL, start:] for start in range(0, len(gram_CC), _PANEL))


def _checked(x: torch.Tensor, dtype: torch.dtype, count: int) -> torch.Tensor:
    if x.dtype is not dtype or tuple(x.shape) != (count,):
        raise ValueError(f"{x.dtype} {list(x.shape)} where {count} of {dtype} belong")
    return x

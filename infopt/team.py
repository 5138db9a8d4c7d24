"""The processes of one run, as `torchrun` starts them: each calibrates on its share of the data, the first one writes.

What they exchange is sums: of statistics, where each has seen other tokens; and of results, where each has solved other
rows of a weight and left zeros for the rest. A sum of parts in another order differs in its last bits, so the codes of N
processes are those of one up to that: where a weight lies within the rounding of a sum of the middle between two codes, or
a group's two best ranges are that close, the choice may differ. GPTQ hands the error of every such choice on to the columns and
blocks after it: on a real model a tenth of the codes are others, and the result is as good (`benchmarks/ranks.py`).

Everything goes through gloo, in main memory, because that is where calibration works.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infopt.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = datetime.timedelta(days=1)  # the first process verifies alone; torchrun ends the others if one dies


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Team:
        """The team that torchrun's variables describe, connected; of one process where there are none."""
        size = os.environ.get("WORLD_SIZE", "1")
        if size == "1":
            return cls()
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def share(self, windows_NT: Tensor) -> Tensor:
        """This process's part of the windows; UsageError where there are fewer than processes."""
        if len(windows_NT) < self.size:
            raise UsageError(
                f"{len(windows_NT)} calibration windows for {self.size} processes",
                "each needs one",
                "--num-samples, or fewer processes",
            )
        return windows_NT.tensor_split(self.size)[self.rank]

    def add(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        return self._reduce(x, "SUM")

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the processes, element by element, in place."""
        return self._reduce(x, "MAX")

    def total(self, count: int) -> int:
        """The sum of a number of each process."""
        import torch

        return int(self.add(torch.tensor([count])).item())

    def same(self, number: int) -> bool:
        """Whether all processes say the same number."""
        import torch

        return int(self.largest(torch.tensor([number])).item()) == -int(self.largest(torch.tensor([-number])).item())

    def gather(self, x: Tensor) -> Tensor:
        """The processes' tensors one after another along their first axis, whose length may differ."""
        import torch

        if self.size == 1:
            return x
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(x)
        start = int(self.add(lengths)[: self.rank].sum())
        whole = x.new_zeros(int(lengths.sum()), *x.shape[1:])
        whole[start : start + len(x)] = x
        return self.add(whole)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def by_rows(self, w_OI: Tensor, solve: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`solve(w_OI)`, whose results belong to the rows, from every process's solution of its own rows."""
        if self.size == 1 or len(w_OI) < self.size:
            return solve(w_OI)
        return tuple(map(self.gather, solve(w_OI.tensor_split(self.size)[self.rank])))

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(x, getattr(dist.ReduceOp, how))
        return x


ALONE = Team()

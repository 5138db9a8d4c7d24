"""A pass through a block that only looks needs not compute the block's output.

The products that nothing observed comes after are skipped; for a gated MLP they are a quarter of the block's work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from infopt.topology import Topology


@contextmanager
def muted(block: nn.Module, topology: Topology) -> Iterator[None]:
    """Inside the context the readers of the block's last space answer with zeros."""
    last = topology.spaces[-1].readers if topology.spaces and not topology.unhandled else ()
    originals = {name: block.get_submodule(name) for name in last}
    for name in last:
        block.set_submodule(name, _Mute(topology.op(name).out_features))
    try:
        yield
    finally:
        for name, module in originals.items():
            block.set_submodule(name, module)


class _Mute(nn.Module):
    """Stands for a linear op whose output nobody needs; its input is observed like any other's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)  # not an expanded zero: a block may add to it in place

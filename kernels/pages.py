"""Half of a paged cache, the keys or the values of a layer, as bytes: what the kernels and `runtime/paged.py` agree on.

A slot is a token's place, page * PAGE + the place in the page. What is stored is what `infopt.kv_cache.CacheGrid` says:

    codes   [slots, H, D] of a floating type as it is; uint8 [slots, H, D * bits / 8] of anything else: one byte a value
            (a whole number, or the bits of E4M3) or half of one (the lower half is the even channel)
    scale   bf16 [slots, H, 1], one for each token and head; or fp32 [H or 1, D or 1], of a calibration
    zero    uint8 or fp32 beside it where zero points differ; without it zero is the grid's middle

Legend: N tokens in any order, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infopt.kv_cache import CacheGrid

PAGE = 16


@dataclass(frozen=True)
class Pages:
    """See the module. `grid` is None for floats."""

    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    grid: CacheGrid | None = None

    @staticmethod
    def empty(
        slots: int,
        heads: int,
        width: int,
        grid: CacheGrid | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Pages:
        """Zeros, for a cache of floats or one with scales of its own for each token."""
        if grid is None:
            return Pages(torch.zeros(slots, heads, width, dtype=dtype, device=device))
        codes = torch.zeros(slots, heads, width * grid.bits // 8, dtype=torch.uint8, device=device)
        scale = torch.zeros(slots, heads, 1, dtype=torch.bfloat16, device=device)
        return Pages(codes, scale, None if grid.symmetric else torch.zeros_like(scale, dtype=torch.uint8), grid)

    @property
    def kind(self) -> str:
        """ "none" for floats, else "fp8", "int8" or "int4"."""
        return "none" if self.grid is None else f"{'fp' if self.grid.kind == 'float' else 'int'}{self.grid.bits}"

    @property
    def heads(self) -> int:
        return self.codes.shape[1]

    @property
    def own(self) -> bool:
        """Whether each token has its scale."""
        return self.scale is not None and self.scale.dim() == 3

    def write(self, slots_N: Tensor | slice, x_NHD: Tensor) -> None:
        """Store fp32 values."""
        if self.grid is None:
            self.codes[slots_N] = x_NHD.to(self.codes.dtype)
            return
        scale, zero = self._parts(slots_N)
        if self.own:
            scale, zero = (part[0] for part in self.grid.range(x_NHD[None]))
            for kept, part in ((self.scale, scale), (self.zero, zero)):
                if kept is not None:
                    kept[slots_N] = part.to(kept.dtype)
        grid = self.grid.grid
        codes = grid.pack(grid.encode(x_NHD, scale, zero))
        self.codes[slots_N] = codes[..., ::2] | codes[..., 1::2] << 4 if self.grid.bits == 4 else codes

    def read(self, slots_N: Tensor | slice) -> Tensor:
        """fp32 [N, H, D]; a view of fp32 pages for a slice."""
        codes = self.codes[slots_N]
        if self.grid is None:
            return codes.float()
        if self.grid.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        scale, zero = self._parts(slots_N)
        return self.grid.grid.decode(self.grid.grid.unpack(codes), scale, zero)

    def _parts(self, slots_N: Tensor | slice) -> tuple[Tensor, Tensor]:
        """(scale, zero), fp32, to go with [N, H, D]."""
        if self.scale is None or self.grid is None:
            raise ValueError("a cache of floats has no scales")
        scale = (self.scale[slots_N] if self.own else self.scale).float()
        if self.zero is None:
            return scale, torch.full_like(scale, self.grid.grid.middle)
        return scale, (self.zero[slots_N] if self.own else self.zero).float()

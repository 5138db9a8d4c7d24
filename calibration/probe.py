"""Which channel of which op feeds which column of an activation: asked of the running block, one probe after another.

A probe multiplies the output of one op, channel by channel, and looks at the spaces (the inputs of later linear ops).
On sequences of one token attention is linear in its values, whatever the queries and keys are, because a softmax over one
key is 1; so the map from an op to a space is often "column c is channel r times something that does not depend on r".
Then column c grows by exactly the factor of channel r. The factors spell r: each of DIGITS factors, set apart by half a
percent, is a digit of r, and two or three probes name every channel of the widest layer without a collision.

A column that several channels of one op feed (a fused gate and up projection: act(gate) * up) answers only while the others
are left alone, so probes are repeated with some channels masked. Half masks at random tell whether that is worth while;
the bits of the channel number, each set and clear, then separate any two channels.

Every op's output also gets a fixed random offset, small for some samples and large for others, the same in all probes.
It wakes what is silent on random input (dead ReLU units, pruned rows) and keeps curves (GELU) from looking straight.

Legend: B samples, C columns of a space, O output channels of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from infopt.model import BlockCall

OFFSETS = (0.01, 0.05, 0.2, 1.0, 2.0, 2.5, 3.0, 4.0)
SAMPLES = 2 * len(OFFSETS)
DIGITS = 256
RATIO_TOLERANCE = 3e-4  # float32 products err by 1e-6; neighbouring digits differ by 5e-3
RANDOM_MASKS = 2


@dataclass(frozen=True)
class Feed:
    """What one op does to one space. rows [C]: the channel that feeds each column linearly, -1 where that is unknown.

    separable: single columns answer to single channels (or a few), linearly or not; False where everything mixes.
    """

    rows: Tensor
    separable: bool

    @property
    def complete(self) -> bool:
        return bool((self.rows >= 0).all())


@dataclass
class Bench:
    """A block on the test bench: ops by name, the first reader of each space, and one-token input."""

    block: nn.Module
    call: BlockCall
    hidden_B1H: Tensor
    ops: dict[str, nn.Module]
    first_readers: list[str]
    generator: torch.Generator
    offsets: dict[str, Tensor] = field(default_factory=dict)
    base: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        outputs: dict[str, Tensor] = {}
        with _hooks(self.ops, lambda name, out: outputs.setdefault(name, out)):
            self.call.run(self.block, self.hidden_B1H)
        for name, out in outputs.items():
            self.offsets[name] = out.abs().max() * self._offset(out.shape)
        self.base = self.observe(None, None)

    def _offset(self, shape: torch.Size) -> Tensor:
        """Random offsets in units of the op's largest output. Samples come in pairs of opposite sign, some of them larger than
        any output, so that every unit is far on either side of zero in several samples."""
        sizes = torch.tensor(OFFSETS)[torch.arange(shape[0]) // 2 % len(OFFSETS)]
        signs = 1 - 2.0 * (torch.arange(shape[0]) % 2)
        scale = (sizes * signs).view(-1, *[1] * (len(shape) - 1))
        pairs = (shape[0] + 1) // 2
        noise = 0.5 + torch.rand(pairs, *shape[1:], generator=self.generator)
        noise *= 1 - 2.0 * torch.randint(0, 2, noise.shape, generator=self.generator)
        return scale * noise.repeat_interleave(2, 0)[: shape[0]]

    def observe(self, op: str | None, factor_O: Tensor | None) -> list[Tensor]:
        """The spaces [B, C] of a run in which the op's output was multiplied by the factors."""

        def change(name: str, out: Tensor) -> Tensor:
            offset = self.offsets.get(name)
            if offset is not None and offset.shape == out.shape:
                out = out + offset
            if name != op or factor_O is None or out.shape[-1] != len(factor_O):
                return out
            return out * factor_O

        seen: dict[str, Tensor] = {}
        with _hooks(self.ops, change), _watch(self.ops, self.first_readers, seen):
            self.call.run(self.block, self.hidden_B1H)
        return [seen[name] for name in self.first_readers]

    def feeds(self, op: str, channels: int, spaces: list[int]) -> dict[int, Feed]:
        """How the op feeds each of these spaces; spaces that it does not reach are left out."""
        rows = {space: torch.full((self.base[space].shape[-1],), -1) for space in spaces}
        everything = torch.ones(channels, dtype=torch.bool)
        changed = self._decode(op, everything, rows)
        rows = {space: found for space, found in rows.items() if changed[space].any()}
        separable = {space: bool((found >= 0).all()) for space, found in rows.items()}
        for count, mask_O in enumerate(self._masks(channels)):
            pending = {space: found for space, found in rows.items() if (found < 0).any()}
            if count >= RANDOM_MASKS:  # worth while only where a half mask left some columns alone and named others
                pending = {space: found for space, found in pending.items() if separable[space] and (found >= 0).any()}
            if not pending:
                break
            changed = self._decode(op, mask_O, pending)
            for space in pending:
                separable[space] |= bool(changed[space].any() and not changed[space].all())
        return {space: Feed(found, separable[space]) for space, found in rows.items()}

    def _masks(self, channels: int) -> Iterator[Tensor]:
        for _ in range(RANDOM_MASKS):
            yield torch.rand(channels, generator=self.generator) < 0.5
        numbers = torch.arange(channels)
        for bit in reversed(range((channels - 1).bit_length())):
            for value in (1, 0):
                yield (numbers >> bit) & 1 == value

    def _decode(self, op: str, mask_O: Tensor, rows: dict[int, Tensor]) -> dict[int, Tensor]:
        """Fill in, for each space, the columns whose factors spell a masked channel. Returns which columns changed."""
        channels = len(mask_O)
        numbers = torch.arange(channels)
        named = {space: torch.zeros_like(found) for space, found in rows.items()}
        valid = {space: torch.ones_like(found, dtype=torch.bool) for space, found in rows.items()}
        changed = {space: torch.zeros_like(found, dtype=torch.bool) for space, found in rows.items()}
        place = 1
        while place < channels or place == 1:
            factor_O = torch.where(mask_O, _factor((numbers // place) % DIGITS), torch.ones(()))
            seen = self.observe(op, factor_O)
            for space in rows:
                digit, good = _read_digit(self.base[space], seen[space])
                named[space] += digit * place
                valid[space] &= good
                changed[space] |= _differs(self.base[space], seen[space])
            place *= DIGITS
        for space, found in rows.items():
            good = valid[space] & (named[space] < channels)
            good &= mask_O[named[space].clamp(max=channels - 1)]
            found[good & (found < 0)] = named[space][good & (found < 0)]
        return changed


def _factor(digit: Tensor) -> Tensor:
    """Factors between 1/2 and 2, evenly apart on a log scale, none of them 1."""
    return torch.exp2((digit.float() + 0.5) * (2 / DIGITS) - 1)


def _read_digit(before_BC: Tensor, after_BC: Tensor) -> tuple[Tensor, Tensor]:
    """(digit [C], whether column c grew by exactly that digit's factor in every sample [C])."""
    if before_BC.shape != after_BC.shape:
        nothing = torch.zeros(before_BC.shape[-1], dtype=torch.long)
        return nothing, nothing.bool()
    before, after = before_BC.double(), after_BC.double()
    ratio_C = (before * after).sum(0) / (before * before).sum(0).clamp(min=1e-300)
    ratio_C = torch.nan_to_num(ratio_C, nan=1.0)  # values that overflow fail the comparison below
    digit_C = ((ratio_C.clamp(min=1e-3).log2() + 1) * (DIGITS / 2) - 0.5).round().clamp(0, DIGITS - 1).long()
    factor_C = _factor(digit_C).double()
    error_BC = (after - factor_C * before).abs()
    straight_C = (error_BC <= RATIO_TOLERANCE * before.abs() + 1e-6 * before.abs().amax(0)).all(0)
    return digit_C, straight_C & ((before != 0).sum(0) >= 3)


def _differs(before_BC: Tensor, after_BC: Tensor) -> Tensor:
    if before_BC.shape != after_BC.shape:
        return torch.ones(before_BC.shape[-1], dtype=torch.bool)
    return (before_BC != after_BC).any(0)


@contextmanager
def _hooks(ops: dict[str, nn.Module], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """`change(name, output)` is what each op answers instead; answers other than one tensor are left alone."""

    def hook(name: str) -> Callable[..., Tensor | None]:
        return lambda _module, _args, out: change(name, out) if isinstance(out, Tensor) else None

    handles = [module.register_forward_hook(hook(name)) for name, module in ops.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch(ops: dict[str, nn.Module], names: list[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Copy what the named ops read, as [B, C], before anyone can change it in place."""

    def hook(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

        return note

    handles = [ops[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Which output channels a column of an inner space depends on, measured by derivatives of the running block.

The topology (`infopt.calibration.discover`) tells which ops write an inner space and which read it. To cut the block for
tensor parallelism one must know more: which channels of the query, key and value projections make up a head, also where
they are fused into one weight. The derivative of one column with respect to an op's output is zero for exactly the channels
that the column does not depend on, so a single backward pass, whose samples each ask about another column, gives the answer
for all heads at once. Every op's output is made a leaf of its own for it, so that only direct dependence counts.

What is accepted and what is refused:

* A space whose columns depend on other tokens is attention. Its cells are the model's heads. Queries and keys come from
  the derivatives (every channel of a head enters the scores); values from the proven fold, column by column.
* Any other inner space has single columns as cells. The channels are the column's own in each of the op's parts (a fused
  gate and up projection has two), one after another or interleaved; random columns confirm it.
* The readers' outputs are cut off in a second pass. If the block's answer still depends on a writer, that writer serves
  somebody else as well, and cutting it would be wrong.

Legend: B samples, T tokens, O output channels, W columns of a space, H heads, P parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from infopt.cells import Cells
from infopt.errors import Unsupported
from infopt.model import BlockCall, Skeleton
from infopt.topology import Space, Topology

TOKENS = 6
MIN_SAMPLES = 16
SEED = 20250301


def find_cells(skeleton: Skeleton, i: int, topology: Topology) -> tuple[Cells, ...]:
    """The cells of every inner space of block i. Loads the block for the time it needs, unless it is loaded.

    Raises Unsupported, naming the op, where the parts of an op cannot be told apart or do not belong to one space.
    """
    config = skeleton.config.get_text_config()
    heads = int(config.num_attention_heads)
    samples = max(MIN_SAMPLES, 2 * heads)
    with skeleton.outer_loaded():
        call = skeleton.calls(samples, TOKENS)[i]
    block = skeleton.model.get_submodule(skeleton.blocks[i])
    borrowed = any(parameter.is_meta for parameter in block.parameters())
    if borrowed:
        skeleton.load_block(i)
    try:
        generator = torch.Generator().manual_seed(SEED)
        hidden_BTC = torch.randn(samples, TOKENS, config.hidden_size, generator=generator)
        return _find(_Bench(block, call, hidden_BTC, topology), skeleton.blocks[i], heads, generator)
    finally:
        if borrowed:
            skeleton.free_block(i)


@dataclass(frozen=True)
class _Bench:
    block: nn.Module
    call: BlockCall
    hidden_BTC: Tensor
    topology: Topology

    def inner(self) -> list[Space]:
        return [space for space in self.topology.spaces if space.fed_by]

    def writers(self) -> list[str]:
        """Every op that reads no inner space, and so may be cut by its output channels."""
        inside = {name for space in self.inner() for name in space.readers}
        return [op.name for op in self.topology.linears() if op.name not in inside]

    @torch.enable_grad()
    def run(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """(the writers' outputs as leaves [B, T, O], the inner spaces [B, T, W], the answer without their readers)."""
        leaves: dict[str, Tensor] = {}
        spaces: dict[str, Tensor] = {}
        readers = {space.readers[0]: space.name for space in self.inner()}
        cut = [name for space in self.inner() for name in space.readers]
        with _hooks(self.block, self.writers(), readers, cut, leaves, spaces):
            answer = self.call.run(self.block, self.hidden_BTC)
        return leaves, spaces, answer


def _find(bench: _Bench, name: str, heads: int, generator: torch.Generator) -> tuple[Cells, ...]:
    if not bench.inner():
        return ()
    leaves, spaces, answer = bench.run()
    found, owner = [], {}
    for space in bench.inner():
        columns_B = _sampled(space.width, heads, len(bench.hidden_BTC), generator)
        grads = _derivatives(spaces[space.name], columns_B, leaves)
        cells = _cells(bench, space, columns_B, grads, heads, name)
        for op in cells.channels:
            if op in owner or any(op in other.readers for other in bench.inner()):
                raise _refused(f"{name}.{op}", f"it writes more than {space.name}")
            owner[op] = space.name
        found.append(cells)
    _check_served_alone(answer, leaves, owner, name)
    return tuple(found)


def _sampled(width: int, heads: int, samples: int, generator: torch.Generator) -> Tensor:
    """The column that each sample asks about [B]: two of each head, where the space can have heads at all."""
    if width % heads:
        return torch.randint(width, (samples,), generator=generator)
    size = width // heads
    head_B = torch.arange(samples) % heads
    return head_B * size + torch.randint(size, (samples,), generator=generator)


def _derivatives(space_BTW: Tensor, columns_B: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """|d column / d output| [B, T, O] of every op that matters, for the last token of each sample's column."""
    asked = space_BTW.reshape(len(columns_B), TOKENS, -1)[torch.arange(len(columns_B)), -1, columns_B]
    if not asked.requires_grad:
        return {}
    answers = torch.autograd.grad(asked.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
    shaped = {
        op: grad.reshape(len(columns_B), TOKENS, -1).abs()
        for op, grad in zip(leaves, answers, strict=True)
        if grad is not None
    }
    return {op: grad for op, grad in shaped.items() if bool(grad.any())}


def _cells(bench: _Bench, space: Space, columns_B: Tensor, grads: dict[str, Tensor], heads: int, name: str) -> Cells:
    mixes = any(bool(grad[:, :-1].any()) for grad in grads.values())
    ops = [op for op in bench.writers() if op in grads or op in space.fed_by]
    if mixes and space.width % heads:
        raise _refused(f"{name}: {space.name}", f"{space.width} columns are not {heads} heads of one width")
    outputs = {op: bench.topology.op(op).out_features for op in ops}
    if mixes:
        channels = {op: _of_heads(space, op, outputs[op], columns_B, grads, heads, name) for op in ops}
    else:
        channels = {op: _of_columns(space, op, outputs[op], columns_B, grads, name) for op in ops}
    count = heads if mixes else space.width
    return Cells(count, space.width // count, space.readers, channels, mixes)


def _of_heads(
    space: Space, op: str, outputs: int, columns_B: Tensor, grads: dict[str, Tensor], heads: int, name: str
) -> np.ndarray:
    """[H, K]: what each head needs of an op that writes an attention space."""
    needs_HO = torch.zeros(heads, outputs, dtype=torch.bool)
    head_W = torch.arange(space.width) // (space.width // heads)
    if op in grads:
        for head, support_O in zip(head_W[columns_B].tolist(), grads[op].amax(1) > 0, strict=True):
            needs_HO[head] |= support_O
    if space.fold is not None and space.fold.writer == op:
        rows_W = torch.arange(space.width) if space.fold.rows is None else torch.tensor(space.fold.rows)
        needs_HO[head_W, rows_W] = True
    counts = needs_HO.sum(1)
    if not bool(needs_HO.any(0).all()) or int(counts.min()) != int(counts.max()):
        raise _refused(f"{name}.{op}", f"its channels cannot be told apart by the {heads} heads of {space.name}")
    return needs_HO.nonzero()[:, 1].view(heads, -1).numpy()


def _of_columns(
    space: Space, op: str, outputs: int, columns_B: Tensor, grads: dict[str, Tensor], name: str
) -> np.ndarray:
    """[W, P]: what each column needs of an op whose channels answer to single columns."""
    parts, rest = divmod(outputs, space.width)
    column_W1, part_P = np.arange(space.width)[:, None], np.arange(max(parts, 1))
    for guess_WP in (column_W1 + part_P * space.width, column_W1 * parts + part_P):
        if rest == 0 and _explains(guess_WP, columns_B, grads.get(op), outputs):
            return guess_WP
    raise _refused(f"{name}.{op}", f"it is not known which of its {outputs} channels make which column of {space.name}")


def _explains(guess_WP: np.ndarray, columns_B: Tensor, grad_BTO: Tensor | None, outputs: int) -> bool:
    """Whether no sampled column depends on a channel outside the guess. No derivative at all proves nothing."""
    if grad_BTO is None:
        return False
    allowed_BO = torch.zeros(len(columns_B), outputs, dtype=torch.bool)
    allowed_BO.scatter_(1, torch.from_numpy(guess_WP)[columns_B], True)
    return not bool((grad_BTO.amax(1) > 0)[~allowed_BO].any())


def _check_served_alone(answer: Tensor, leaves: dict[str, Tensor], owner: dict[str, str], name: str) -> None:
    if not answer.requires_grad:
        return
    ops = list(owner)
    grads = torch.autograd.grad(answer.sum(), [leaves[op] for op in ops], allow_unused=True)
    for op, grad in zip(ops, grads, strict=True):
        if grad is not None and bool(grad.any()):
            raise _refused(f"{name}.{op}", f"the block's answer depends on it in another way than through {owner[op]}")


@contextmanager
def _hooks(
    block: nn.Module,
    writers: list[str],
    readers: dict[str, str],
    cut: list[str],
    leaves: dict[str, Tensor],
    spaces: dict[str, Tensor],
) -> Iterator[None]:
    """Writers answer with leaves, the first reader of a space shows it, and readers' answers end the graph."""

    def as_leaf(name: str):
        def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
            leaves[name] = out.detach().requires_grad_()
            # A view of the leaf: some blocks write into what a projection answers, which a leaf itself forbids.
            return leaves[name] * 1.0

        return hook

    def show(name: str):
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            spaces[name] = args[0]

        return hook

    handles = [block.get_submodule(name).register_forward_hook(as_leaf(name)) for name in writers]
    handles += [block.get_submodule(name).register_forward_pre_hook(show(space)) for name, space in readers.items()]
    handles += [block.get_submodule(name).register_forward_hook(lambda _m, _a, out: out.detach()) for name in cut]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refused(what: str, why: str) -> Unsupported:
    return Unsupported(f"{what} cannot be cut for tensor parallelism", why, "shard by layers alone: --tp 1 --pp N")

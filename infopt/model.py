"""A model as a stream of decoder blocks: the definition from transformers, the weights one block at a time.

The skeleton is the model definition on the meta device (buffers such as rotary tables are real, parameters take no
memory). Every checkpoint key is mapped once to a parameter with transformers' own renaming, so per-expert files, fused
projections and legacy names need no table of ours. A block is loaded, used and put back on meta; nothing retains it.

The arguments that a block receives besides the hidden states (masks, rotary angles, positions) are not re-derived here.
They are *captured*: the blocks in the ModuleList are replaced by stubs for one forward of the model, and each stub
writes down its call. The same stubs give the head: a forward whose blocks hand over ready hidden states ends in the model's
own final norm, head, scaling and soft cap. Two refused ways: raising an exception out of the first block (hides the calls
of later blocks, which differ in models with sliding windows), and patching forward methods of other people's classes.

Legend: B batch, T time, C hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infopt.definition import (
    KeyMap,
    Weights,
    build_config,
    build_model,
    find_blocks,
    load_keys,
    load_split,
    missing,
    tie,
)
from infopt.errors import Unsupported
from infopt.splitting import split_experts

__all__ = ["BlockCall", "Skeleton", "Weights"]


@dataclass(frozen=True)
class BlockCall:
    """What a block receives besides the hidden states, for one (batch, length)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden_BTC: Tensor) -> Tensor:
        """The block's hidden states [B, T, C], taken out of a tuple answer where the block gives one."""
        answer = block(hidden_BTC, *self.args, **self.kwargs)
        return answer[0] if isinstance(answer, tuple) else answer


class Skeleton:
    """The model on meta, and the loading and freeing of its parts.

    config: the dict of config.json without its quantization_config. weights: see `Weights`. dtype: what floating
    parameters become when loaded. device: where parameters and buffers
    go. `model` is the transformers model; `blocks` its blocks' module paths in order. Experts
    are split into linear layers (`infopt.experts`); `stacked` tells which are not, {module path: reason}.
    Raises BadInput (sizes, shapes or tensors that contradict the config), Unsupported (unknown type, no blocks).
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: Weights,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.weights = weights
        self.dtype, self.device = dtype, device
        self.config = build_config(config, weights)
        self.model = build_model(self.config, dtype)
        self._list_name = find_blocks(self.model, self.config)
        self.blocks = [f"{self._list_name}.{i}" for i in range(len(self._block_list()))]
        self._keys = KeyMap(self.model, self._list_name, len(self.blocks), weights)
        self.stacked = split_experts(self.model, self.blocks, self._keys, weights)
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}
        self._calls_checked = False
        self._answer_known = False
        self._unused = torch.full((1,), float("nan"), device=device)
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
        self._answer_tail: tuple[Any, ...] | None = None  # what follows the hidden states in a block's tuple answer

    # The checkpoint's keys

    def block_keys(self, i: int) -> list[str]:
        """Checkpoint keys whose tensors belong to block i."""
        return list(self._keys.of_block[i])

    def outer_keys(self) -> list[str]:
        """Checkpoint keys of everything else that the model uses: embeddings, final norm, head."""
        return list(self._keys.outer)

    def extra_keys(self) -> list[str]:
        """Checkpoint keys that the model has no use for (multi-token prediction layers, old buffers)."""
        return list(self._keys.extra)

    def tensor_key(self, i: int, name: str) -> str:
        """The checkpoint key of block i's parameter `name`, "mlp.up_proj.bias"; Unsupported if it is not one to one."""
        keys = self._keys.one_to_one.get(f"{self.blocks[i]}.{name}", [])
        if len(keys) != 1:
            raise Unsupported(
                f"{self.blocks[i]}.{name} is not stored as one tensor of its own.",
                f"{len(keys)} checkpoint tensors are that parameter; the rest is stacked, fused or split on loading.",
                f"Leave it as it is with `--ignore {name.rpartition('.')[0] or name}`.",
            )
        return keys[0]

    def weight_key(self, i: int, op_name: str) -> str:
        """The checkpoint key of an op's weight, "model.layers.3.self_attn.q_proj.weight"."""
        return self.tensor_key(i, f"{op_name}.weight")

    def stored_path(self, i: int, module: str) -> str:
        """How the checkpoint calls block i's module: "model.layers.3.self_attn", by the key of one of its tensors."""
        prefix = f"{self.blocks[i]}.{module}."
        for name, keys in self._keys.one_to_one.items():
            tail = "." + name.removeprefix(prefix)
            if name.startswith(prefix) and len(keys) == 1 and keys[0].endswith(tail):
                return keys[0].removesuffix(tail)
        raise Unsupported(
            f"{self.blocks[i]}.{module} has another layout in the checkpoint.",
            "The scales of its cache could not be named.",
            "Leave --kv-cache out.",
        )

    @property
    def width(self) -> int:
        """Channels of the hidden states."""
        return int(self.config.get_text_config().hidden_size)

    def outer_sources(self) -> dict[str, list[str]]:
        """{parameter outside the blocks: the checkpoint keys that become it without conversion}."""
        inside = self._list_name + "."
        return {name: list(keys) for name, keys in self._keys.one_to_one.items() if not name.startswith(inside)}

    # Loading and freeing

    def load_block(self, i: int) -> nn.Module:
        """Block i with its parameters read from the checkpoint; whatever was there before is replaced."""
        split = self._keys.split[i]
        load_keys(self.model, [key for key in self._keys.of_block[i] if key not in split], self.weights, self.dtype)
        load_split(self.model, split, self.weights, self.dtype)
        block = self._block_list()[i]
        for name, parameter in block.named_parameters():
            if parameter.is_meta:
                raise missing(f"{self.blocks[i]}.{name}")
        self._move(block.modules())
        return block

    def free_block(self, i: int) -> None:
        """Put block i's parameters back on meta."""
        _to_meta(self._block_list()[i].modules())

    def load_outer(self) -> None:
        """Read the embeddings, the final norm and the head; tied parameters are tied as transformers would."""
        load_keys(self.model, self._keys.outer, self.weights, self.dtype)
        tie(self.model, set(self._outer_on_meta()))
        for name in self._outer_on_meta():
            raise missing(name)
        self._move(module for _, module in self._outer_modules())

    def _move(self, modules: Iterable[nn.Module]) -> None:
        """Parameters to the device; tied ones stay tied."""
        if torch.device(self.device).type == "cpu":
            return
        moved: dict[int, nn.Parameter] = {}
        for module in modules:
            for name, one in list(module.named_parameters(recurse=False)):
                if id(one) not in moved:
                    moved[id(one)] = nn.Parameter(one.detach().to(self.device), requires_grad=False)
                setattr(module, name, moved[id(one)])

    def free_outer(self) -> None:
        """Put everything but the blocks back on meta."""
        _to_meta(module for _, module in self._outer_modules())

    def _outer_modules(self) -> Iterator[tuple[str, nn.Module]]:
        inside = self._list_name + "."
        return ((name, module) for name, module in self.model.named_modules() if not name.startswith(inside))

    def _outer_on_meta(self) -> list[str]:
        return [
            f"{path}.{name}".removeprefix(".")
            for path, module in self._outer_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_meta
        ]

    def _block_list(self) -> nn.ModuleList:
        blocks = self.model.get_submodule(self._list_name)
        if not isinstance(blocks, nn.ModuleList):  # find_blocks found one; this only tells the type checker
            raise TypeError(f"{self._list_name} is no ModuleList")
        return blocks

    # Running the outer parts

    @torch.no_grad()
    def capture(self, ids_BT: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """(the hidden states [B, T, C] that enter block 0, each block's call). The outer parts must be loaded.

        Raises Unsupported for a model that runs its blocks in another way than each once and in order.
        """
        order: list[nn.Module] = []
        seen: list[tuple[Tensor, BlockCall]] = []

        def note(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
            order.append(block)
            seen.append((hidden, call))
            return hidden

        with self._stubs(note):
            self.model.base_model(input_ids=ids_BT, use_cache=False)
        if [id(block) for block in order] != [id(block) for block in self._block_list()]:
            raise _not_a_stream("The model does not run each of its blocks once and in order.")
        calls = [call for _, call in seen]
        if any(_holds((call.args, call.kwargs), self._unused) for call in calls):
            raise _not_a_stream(f"{type(order[0]).__name__} hands more than hidden states to the next block.")
        return seen[0][0], calls

    def calls(self, batch: int, length: int) -> list[BlockCall]:
        """Each block's call for any tokens of shape [batch, length], cached. Loads the outer parts where they are not.

        Raises Unsupported if a call depends on which tokens they are: a block's output would depend on them too.
        """
        if (batch, length) not in self._calls:
            ids_BT = self._any_ids(batch, length)
            with self.outer_loaded():
                calls = self.capture(ids_BT)[1]
                if not self._calls_checked:
                    self._check_calls(calls, ids_BT)
            self._calls[batch, length] = calls
        return self._calls[batch, length]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The hidden states [B, T, C] that enter block 0. The outer parts must be loaded."""
        return self.capture(ids_BT)[0]

    @property
    def logits_at_once(self) -> int:
        """For how many tokens the head is worth being read: their logits take an eighth of its memory."""
        return max(1, self.width // 8)

    @torch.no_grad()
    def logits(self, hidden_BTC: Tensor) -> Tensor:
        """The model's own tail (final norm, head, scaling, soft cap) on the last block's hidden states: [B, T, V].

        The outer parts must be loaded.
        """
        return self.tail(hidden_BTC)

    def tail(self, hidden_BTC: Tensor) -> Tensor:
        """`logits`, for derivatives too."""
        first = self._block_list()[0]

        def hand_over(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
            return hidden_BTC if block is first else hidden

        ids_BT = self._any_ids(*hidden_BTC.shape[:2])
        with self._stubs(hand_over):
            return self.model(input_ids=ids_BT, use_cache=False).logits

    @contextmanager
    def _stubs(self, forward: Callable[[nn.Module, Tensor, BlockCall], Tensor]) -> Iterator[None]:
        """For the time of the context, `forward(block, hidden, call)` runs in place of each block."""
        blocks = self._block_list()
        originals = list(blocks)
        borrowed = not self._answer_known and any(parameter.is_meta for parameter in originals[0].parameters())
        if borrowed:
            self.load_block(0)

        def answer(block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
            if not self._answer_known:
                self._learn_answer(block, hidden, call)
            hidden = forward(block, hidden, call)
            return hidden if self._answer_tail is None else (hidden, *self._answer_tail)

        try:
            for i, block in enumerate(originals):
                blocks[i] = _Stub(block, answer)
            yield
        finally:
            for i, block in enumerate(originals):
                blocks[i] = block
            if borrowed:
                self.free_block(0)

    def _learn_answer(self, block: nn.Module, hidden: Tensor, call: BlockCall) -> None:
        """Run block 0 once for real: is its answer a tensor or a tuple, and what else is in it?

        Tensors beside the hidden states (attention weights) are replaced by a token that `capture` would recognise.
        """
        answer = block(hidden, *call.args, **call.kwargs)
        if isinstance(answer, tuple):
            self._answer_tail = tuple(self._unused if isinstance(part, Tensor) else part for part in answer[1:])
        self._answer_known = True

    @contextmanager
    def outer_loaded(self) -> Iterator[None]:
        """The outer parts are loaded inside the context; afterwards they are as they were before."""
        borrowed = bool(self._outer_on_meta())
        if borrowed:
            self.load_outer()
        try:
            yield
        finally:
            if borrowed:
                self.free_outer()

    def _any_ids(self, batch: int, length: int) -> Tensor:
        """Tokens of this shape where it does not matter which; not the padding, about which transformers would warn."""
        text = self.config.get_text_config()
        some = 1 if getattr(text, "pad_token_id", None) == 0 and text.vocab_size > 1 else 0
        return torch.full((batch, length), some, device=self.device)

    def _check_calls(self, calls: list[BlockCall], ids_BT: Tensor) -> None:
        """The same shape with other tokens must give the same calls."""
        vocab = self.config.get_text_config().vocab_size
        other_BT = ((torch.arange(ids_BT.numel(), device=self.device) * 7 + 1) % vocab).view_as(ids_BT)
        for name, one, two in zip(self.blocks, calls, self.capture(other_BT)[1], strict=True):
            if not _same((one.args, one.kwargs), (two.args, two.kwargs)):
                raise _not_a_stream(f"{name} receives arguments that depend on the tokens.")
        self._calls_checked = True


class _Stub(nn.Module):
    """Stands in a ModuleList for a block. It answers for itself, and gives the block's attributes to whoever looks."""

    def __init__(self, block: nn.Module, answer: Callable[[nn.Module, Tensor, BlockCall], Any]) -> None:
        super().__init__()
        self.wrapped = (block,)  # in a tuple, so that the block is not registered as a child
        self.answer = answer
        self.first_name = next(iter(inspect.signature(block.forward).parameters))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.pop(self.first_name)
        return self.answer(self.wrapped[0], hidden, BlockCall(tuple(args[1:]), kwargs))


def _to_meta(modules: Iterable[nn.Module]) -> None:
    """Replace parameters by meta ones; buffers stay, they are not all in the checkpoint."""
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _same(one: Any, two: Any) -> bool:
    """Equality of nested arguments; tensors by value, objects that are neither data nor containers by their type."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    if isinstance(one, list | tuple) and type(one) is type(two):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(value, two[key]) for key, value in one.items())
    if one is None or isinstance(one, int | float | str):
        return one == two
    return type(one) is type(two)


def _holds(arguments: Any, wanted: Tensor) -> bool:
    if isinstance(arguments, dict):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return any(_holds(argument, wanted) for argument in arguments)
    return arguments is wanted


def _not_a_stream(what: str) -> Unsupported:
    return Unsupported(what, "infopt streams hidden states alone from block to block.", "Use another model.")

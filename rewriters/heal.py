"""Healing a rewritten block: gradient steps that bring its answers back to the original block's.

The block reads the hidden states that the rewritten blocks before it give, and is to answer what the original block answered
on the original hidden states: it also makes up for errors that came before it. One block is in memory (the original is not
needed any more: its answers lie in the stream's file), so the cost does not grow with the model's depth.

    loss   the squared error in units of each channel's mean deviation from its mean; tokens larger than the median count
           less. Refused: the error relative to |y|^2. A few channels of the residual stream are huge and nearly constant, and
           so are all channels of a window's first token: on SmolLM2 that error fell while the KL divergence rose
    step   Adam (Kingma and Ba 2015) on one batch; the rate rises over a tenth of the steps and falls along a cosine

Some windows are held out. Where their error is not lower after the steps than before, the block is put back as it was.

Gradient checkpointing (Chen et al. 2016) runs each child of the block (norms, attention, MLP) again on the way back instead
of keeping what it computed; what treats every token alone, which is tried, for a quarter of the tokens at a time. Pieces give
their part of a weight's gradient at once (a reentrant checkpoint): otherwise all parts of all weights wait for the last one.
The answer of attention is kept. `costs` counts the bytes that the operations of one step allocate, while they live, and `infopt
rewrite --checkpointing` tells them: for SmolLM2 on two threads, --seqlen 2048: 48 MB instead of 114, a quarter more time;
--seqlen 512: 15 instead of 29, half more.

Legend: B windows, T tokens, C hidden width.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from infopt.model import BlockCall

#: What one step needs: the hidden states [B, T, C], the call that goes with them, and the answer that is wanted.
Batch = tuple[Tensor, BlockCall, Tensor]
Batches = Callable[[], Iterable[Batch]]
_WARM_UP = 0.1
_PIECES, _PIECE = 4, 128  # tokens are run again in so many pieces, each of at least so many
_ATTENTION = [  # what computes attention whole, on each kind of device
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Healed:
    """The held-out error before and after, and the tokens of all steps; `kept` is False where the block was put back."""

    before: float
    after: float
    tokens: int
    kept: bool


@dataclass(frozen=True)
class StepCost:
    """Of one gradient step: the most bytes of memory that were allocated for it at one time, and its seconds."""

    bytes: int
    seconds: float


@torch.no_grad()
def block_error(block: nn.Module, batches: Batches) -> float:
    """The loss of the block's answers, its mean over tokens."""
    total, tokens = 0.0, 0
    for hidden_BTC, call, wanted_BTC in batches():
        total += float(_loss(call.run(block, hidden_BTC), wanted_BTC)) * hidden_BTC.shape[:2].numel()
        tokens += hidden_BTC.shape[:2].numel()
    return total / max(tokens, 1)


def heal(
    block: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    train: Batches,
    held: Batches,
    steps: int,
    lr: float,
    checkpointing: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> Healed:
    """Train `parameters` of the block in place. on_step(step, tokens so far) is called after each step, from 1 on."""
    before = block_error(block, held)
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam(list(parameters.values()), lr=lr, betas=BETAS, fused=True)
    tokens = 0
    with trainable(parameters.values()), checkpointed(block) if checkpointing else nullcontext():
        for step, batch in enumerate(_repeated(train, steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step, steps)
            _backward(block, batch)
            nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += batch[0].shape[:2].numel()
            if on_step:
                on_step(step + 1, tokens)
    after = block_error(block, held)
    kept = after < before  # False also for NaN
    if not kept:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(copies[name])
    return Healed(before, after if kept else before, tokens, kept)


def costs(block: nn.Module, parameters: Mapping[str, nn.Parameter], batch: Batch) -> list[StepCost]:
    """What forward and backward of one step cost without and with checkpointing; nothing is changed."""
    with trainable(parameters.values()):
        return compared(lambda: _backward(block, batch), lambda: checkpointed(block))


def compared(
    step: Callable[[], object], checkpointed: Callable[[], AbstractContextManager[None]], turns: int = 7
) -> list[StepCost]:
    """The cost of a step without and with checkpointing: taken in turns, so that whatever else the machine does falls on both,
    and the shortest time of each. The step leaves gradients behind."""
    ways: tuple[Callable[[], AbstractContextManager[None]], ...] = (nullcontext, checkpointed)
    seconds, most = [math.inf, math.inf], [0, 0]
    for turn in range(turns):
        for i, way in enumerate(ways):
            with way():
                step()  # the gradients are there from now on, and everything is warm
                began = time.perf_counter()
                step()
                seconds[i] = min(seconds[i], time.perf_counter() - began)
                if turn == 0:
                    with _Allocations() as seen:
                        step()
                    most[i] = seen.peak
    return [StepCost(*pair) for pair in zip(most, seconds, strict=True)]


@contextmanager
def checkpointed(block: nn.Module) -> Iterator[None]:
    """Each child of a block (or of a list of blocks) forgets what it computed until the backward pass needs it, where it
    has parameters."""
    children = {name: child for name, child in block.named_children() if any(True for _ in child.parameters())}
    for name, child in children.items():
        block.set_submodule(name, _Checkpointed(child))
    try:
        yield
    finally:
        for name, child in children.items():
            block.set_submodule(name, child)


class _Checkpointed(nn.Module):
    """Stands for a child of a block, and gives its attributes to whoever looks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.wrapped = (module,)  # in a tuple, so that its parameters keep their names
        self._by_token: bool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["wrapped"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.wrapped[0]
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not self._splits(args[0]):
            return checkpoint(
                module,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=_attention_kept,
                **kwargs,
            )
        # What treats every token alone (a norm, an MLP) is run again for a few at a time.
        again = args[0].requires_grad  # a reentrant checkpoint of what needs no gradient would give the weights none
        parts = [checkpoint(module, part, use_reentrant=again, preserve_rng_state=False) for part in _pieces(args[0])]
        return torch.cat(parts, 1).view(args[0].shape)

    @torch.no_grad()
    def _splits(self, x_BTC: Tensor) -> bool:
        """Whether the child answers to pieces what it answers to the whole; tried once."""
        if self._by_token is None:
            whole = self.wrapped[0](x_BTC)
            pieces = [self.wrapped[0](part) for part in _pieces(x_BTC)] if isinstance(whole, Tensor) else []
            self._by_token = bool(pieces) and _close(torch.cat(pieces, 1), whole)
        return self._by_token


def _pieces(x_BTC: Tensor) -> tuple[Tensor, ...]:
    x_1XC = x_BTC.reshape(1, -1, x_BTC.shape[-1])
    return x_1XC.split(max(_PIECE, -(-x_1XC.shape[1] // _PIECES)), 1)


def _attention_kept() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The answer of attention is small, and its time grows with the square of the tokens: it is not computed again."""
    return create_selective_checkpoint_contexts(_ATTENTION)


def _close(one: Tensor, two: Tensor) -> bool:
    return one.numel() == two.numel() and bool((one.view(two.shape) - two).norm() <= 1e-5 * two.norm())


@torch.enable_grad()
def _backward(block: nn.Module, batch: Batch) -> None:
    hidden_BTC, call, wanted_BTC = batch
    _loss(call.run(block, hidden_BTC), wanted_BTC).backward()


def _loss(answer_BTC: Tensor, wanted_BTC: Tensor) -> Tensor:
    """The squared error in units of each channel's mean deviation over the batch; tokens that are larger than the median
    count less, by as much as they are larger."""
    answer_XC, wanted_XC = answer_BTC.flatten(0, 1), wanted_BTC.flatten(0, 1)
    centred_XC = wanted_XC - wanted_XC.mean(0)
    deviation_C = centred_XC.abs().mean(0).clamp(min=1e-10)
    size_X = (centred_XC / deviation_C).square().mean(-1).clamp(min=1e-20)
    weight_X = (size_X.median() / size_X).clamp(max=1)
    return (((answer_XC - wanted_XC) / deviation_C).square().mean(-1) * weight_X).mean()


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, relative to the highest."""
    warm = max(1, round(_WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _repeated(batches: Batches, count: int) -> Iterator[Batch]:
    """The first `count` batches of the data, over and over."""
    given = 0
    while given < count:
        for batch in batches():
            if given == count:
                return
            given += 1
            yield batch


@contextmanager
def trainable(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Inside, gradients reach the parameters; afterwards they have none."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


class _Allocations(TorchDispatchMode):
    """Counts the bytes of what operations allocate, as long as it lives; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in given | self._alive.keys():
                self._watch(tensor.untyped_storage())
        return answer

    def _watch(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: object) -> None:
            self._now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)

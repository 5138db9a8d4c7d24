"""One block of a rewrite: regrouped, refitted, healed, rounded; and the two streams of activations that it needs.

What is wanted of a rewritten block in the end is what the original block answered on the original hidden states. What it is
given are the hidden states of the rewritten model, so that each block also answers for the errors of those before it.

Legend: B windows, T tokens, C hidden width, X what the output projection reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infopt.calibration.stream import Stream
from infopt.errors import BadInput, Unsupported
from infopt.heads import Attention, put, take
from infopt.model import BlockCall, Skeleton
from infopt.recipes.rewrite_plan import RewritePlan
from infopt.rewriters import gqa
from infopt.rewriters.heal import Batch, StepCost, block_error, costs, heal
from infopt.rewriters.options import RewriteOptions

_HELD_OUT = 8  # every so many batches one is not trained on
#: The points at which blocks are kept for the curve: regrouped, refitted, after a quarter and half of the steps.
CURVE = ("merged", "refitted", "quarter", "half")
_TRAINED = (torch.bfloat16, torch.float16, torch.float32)


class Streams:
    """The hidden states of the original and of the rewritten model, block by block, on the same windows."""

    def __init__(self, source: Skeleton, target: Skeleton, windows_NT: Tensor, folder: Path) -> None:
        self.old = Stream(source, windows_NT, folder / "hidden")
        self.new = Stream(target, windows_NT, folder / "hidden-new")

    def start(self) -> str:
        return f"{self.old.start()}:{self.new.start()}"

    def holds(self, i: int, digests: str) -> bool:
        old, _, new = digests.partition(":")
        return self.old.holds(i, old) and self.new.holds(i, new)

    def forget(self, i: int) -> None:
        self.old.forget(i)
        self.new.forget(i)

    def batches(self, i: int, held: bool) -> Iterator[Batch]:
        """What rewritten block i reads and should answer: the held-out batches, or the others. A single batch is both."""
        count = len(self.new.batches)
        pairs = zip(self.new.inputs(i), self.old.inputs(i + 1), strict=True)
        for number, ((hidden_BTC, call), (wanted_BTC, _)) in enumerate(pairs):
            is_held = number % _HELD_OUT == _HELD_OUT - 1 or (count < _HELD_OUT and number == count - 1)
            if call is not None and (is_held == held or count == 1):
                yield hidden_BTC, call, wanted_BTC

    def both(self, i: int) -> Iterator[tuple[Tensor, BlockCall, BlockCall]]:
        """What rewritten block i reads, with the calls of the original and of the rewritten block."""
        for (_, old_call), (hidden_BTC, new_call) in zip(self.old.inputs(i), self.new.inputs(i), strict=True):
            if old_call is not None and new_call is not None:
                yield hidden_BTC, old_call, new_call


def trained(skeleton: Skeleton, i: int, block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of block i that are one floating tensor each of the checkpoint; others (stacked experts) stay."""
    found = {}
    for path, parameter in block.named_parameters():
        try:
            key = skeleton.tensor_key(i, path)
        except Unsupported:
            continue
        if skeleton.weights.tensors[key].dtype in _TRAINED:
            found[path] = parameter
    return found


class BlockRewrite:
    """Block `index` on its way. changed: paths of the parameters that the rewrite changed. report: numbers for infopt.json."""

    def __init__(
        self,
        source: Skeleton,
        target: Skeleton,
        plan: RewritePlan,
        options: RewriteOptions,
        streams: Streams | None,
        index: int,
    ) -> None:
        self.source, self.target, self.plan, self.options = source, target, plan, options
        self.streams, self.index = streams, index
        self.name = source.blocks[index]
        self.changed: set[str] = set()
        self.report: dict[str, Any] = {"error": None}
        self.notes: list[str] = []
        self.costs: list[StepCost] = []  # of a gradient step, without and with checkpointing
        self._digest: str | None = None

    def rewrite(self, snapshot: Callable[[str], None]) -> None:
        """All that the options ask for; `snapshot(label)` is called at the points of the curve."""
        with torch.no_grad():
            original = self.source.load_block(self.index)
            self._check_finite(original)
            gram = self._run_original(original)
            block = self.target.load_block(self.index)
            before, after = self.plan.blocks[self.index].before, self.plan.blocks[self.index].after
            if self.plan.regroups and before is not None and after is not None:
                self._regroup(original, block, before, after, gram)
                self._note_error("merged", block)
                self._snapshot(snapshot, CURVE[0])
                if self.options.refit and self.streams:
                    self._refit(original, block, after)
                    self._note_error("refitted", block)
            else:
                self._note_error("merged", block)
                self._snapshot(snapshot, CURVE[0])
            self.source.free_block(self.index)
        if self.options.heal and self.streams:
            self._heal(block, self.streams, snapshot)
        self._round(block)

    def stored(self, path: str, dtype: torch.dtype) -> Tensor:
        """A parameter of the rewritten block in the type in which it is stored."""
        block = self.target.model.get_submodule(self.target.blocks[self.index])
        return block.get_parameter(path).detach().to(dtype)

    @torch.no_grad()
    def go_on(self) -> str | None:
        """Run the rewritten block on; gives the digests of both models' next hidden states."""
        if self.streams is None or self._digest is None:
            return None
        if self.index + 1 == len(self.source.blocks):
            self.streams.forget(self.index + 1)
            return None
        block = self.target.model.get_submodule(self.target.blocks[self.index])
        return f"{self._digest}:{self.streams.new.advance(self.index, block)}"

    def close(self) -> None:
        self.source.free_block(self.index)
        self.target.free_block(self.index)

    # The parts

    def _run_original(self, original: nn.Module) -> Tensor | None:
        """Advance the original model; the Gram matrix of its attention's input, where heads will be regrouped."""
        attention = self.plan.blocks[self.index].before
        if self.streams is None:
            return None
        if attention is None or not self.plan.regroups:
            self._digest = self.streams.old.advance(self.index, original)
            return None
        keys = original.get_submodule(attention.key.op)
        gram = gqa.InputGram(keys.get_parameter("weight").shape[1])
        handle = keys.register_forward_pre_hook(lambda _module, args: gram.add(args[0]))
        try:
            self._digest = self.streams.old.advance(self.index, original)
        finally:
            handle.remove()
        if not bool(torch.isfinite(gram.matrix).all()):
            raise BadInput(
                f"{self.name}.{attention.key.op} receives NaN or infinite activations",
                "the model overflows or its weights are damaged",
                "check it with `infopt eval MODEL`",
            )
        return gram.matrix

    def _regroup(
        self, original: nn.Module, block: nn.Module, before: Attention, after: Attention, gram_II: Tensor | None
    ) -> None:
        weights = take(original, before)
        moments = None if gram_II is None else gqa.Moments.of(weights, gram_II)
        groups = gqa.by_position(before.kv_heads, after.kv_heads)
        if moments is not None:
            distance_GG = gqa.distances(weights, moments, before, self.options.merge)
            position = gqa.spread(distance_GG, groups)
            if self.options.grouping == "similarity":
                groups = gqa.by_similarity(distance_GG, after.kv_heads)
            self.report["spread"] = {"position": position, "chosen": gqa.spread(distance_GG, groups)}
        made = gqa.regroup(weights, before, after, groups, self.options.merge, moments)
        put(block, after, made.weights)
        self.report |= {"groups": groups, "lost_keys": made.lost_keys, "lost_values": made.lost_values}
        ops = {part.op for part in (after.query, after.key, after.value)}
        paths = dict(block.named_parameters())
        self.changed |= {f"{op}.{kind}" for op in ops for kind in ("weight", "bias") if f"{op}.{kind}" in paths}
        self.changed.add(f"{after.out}.weight")

    def _refit(self, original: nn.Module, block: nn.Module, attention: Attention) -> None:
        if self.streams is None:
            return
        old, new = original.get_submodule(attention.out), block.get_submodule(attention.out)
        weight = new.get_parameter("weight")
        bias = dict(old.named_parameters()).get("bias")
        fit = gqa.OutputFit(weight.shape[1], weight.shape[0])
        seen: dict[str, Tensor] = {}
        handles = [
            old.register_forward_hook(lambda _m, _a, out: seen.update(y=out if bias is None else out - bias)),
            new.register_forward_pre_hook(lambda _m, args: seen.update(z=args[0])),
        ]
        try:
            for hidden_BTC, old_call, new_call in self.streams.both(self.index):
                old_call.run(original, hidden_BTC)
                new_call.run(block, hidden_BTC)
                fit.add(seen["z"], seen["y"])
        finally:
            for handle in handles:
                handle.remove()
        weight.copy_(fit.solve(weight))

    def _heal(self, block: nn.Module, streams: Streams, snapshot: Callable[[str], None]) -> None:
        parameters = trained(self.source, self.index, block)
        untouched = set(self.changed)
        steps = self.options.steps
        points = {max(1, steps // 4): CURVE[2], max(1, steps // 2): CURVE[3]}
        if self.plan.regroups:
            self._snapshot(snapshot, CURVE[1])
        if self.report["error"] == 0:  # a block that nothing has reached yet
            for label in CURVE[2:]:
                self._snapshot(snapshot, label)
            return

        def on_step(step: int, tokens: int) -> None:
            if step in points:
                self._snapshot(snapshot, points[step])
                self.report.setdefault("tokens", {})[points[step]] = tokens

        if self.options.checkpointing and self.index == 0:
            batch = next(streams.batches(0, held=False))
            self.costs = costs(block, parameters, batch)
        self.changed = untouched | set(parameters)
        done = heal(
            block,
            parameters,
            lambda: streams.batches(self.index, held=False),
            lambda: streams.batches(self.index, held=True),
            steps,
            self.options.lr,
            self.options.checkpointing,
            on_step,
        )
        self.report["healed"] = {"before": done.before, "after": done.after, "tokens": done.tokens, "kept": done.kept}
        self.report["error"] = done.after
        if not done.kept:
            self.changed = untouched
            self.notes.append("healing did not lower the error on held-out windows: the block is as it was before")

    def _round(self, block: nn.Module) -> None:
        """What goes on through the stream is what is written."""
        with torch.no_grad():
            for path in self.changed:
                dtype = self.source.weights.tensors[self.source.tensor_key(self.index, path)].dtype
                parameter = block.get_parameter(path)
                parameter.copy_(parameter.to(dtype))

    def _snapshot(self, snapshot: Callable[[str], None], label: str) -> None:
        if self.options.curve and self.options.heal and self.streams:
            snapshot(label)

    def _note_error(self, name: str, block: nn.Module) -> None:
        if self.streams:
            streams = self.streams
            self.report[name] = block_error(block, lambda: streams.batches(self.index, held=True))
            self.report["error"] = self.report[name]

    def _check_finite(self, block: nn.Module) -> None:
        for path, parameter in block.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise BadInput(
                    f"{self.name}.{path} holds values that are NaN or infinite",
                    "they would spread to every head that is merged with theirs",
                    "repair or download the model again",
                )

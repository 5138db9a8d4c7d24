"""The topology of a decoder block, found by running it and proven by changing it. No architecture is named here.

1. Trace. Hooks on the leaf modules tell which linear ops read the same tensor: they share a space.
2. Probe (`infopt.calibration.probe`). One-token probes tell which op's channel feeds which column of each space.
3. Prove. On longer input the writer's rows are really multiplied by random scales and the readers' columns divided by them:
   the readers' outputs and the block's output must stay what they were, within float32 noise. A norm may multiply by w or by
   1 + w; both laws are tried. What is not proven is not recorded, and the space says why.

The probe finds, the proof decides: an op whose output somebody else reads too (a norm that is also a residual branch, a
layer that experts read) passes the first and fails the second.

Legend: B batch, T time, H hidden width, O output channels, C columns of a space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infopt.calibration.experts import add_experts
from infopt.calibration.probe import SAMPLES, Bench, Feed
from infopt.experts import Expert, experts_in
from infopt.model import BlockCall, Skeleton
from infopt.topology import Fold, Law, Op, OpKind, Space, Topology

PROOF_SHAPE = (2, 12)
# Relative change of a reader's or the block's output that float32 rounding explains. A single wrong column among 30,000
# changes a reader's output by 3e-3.
TOLERANCE = 1e-5
SEED = 20250101
_COUNTERS = re.compile(r"(^|_)(idx|index|id|number|layer)$")


@torch.no_grad()
def discover(skeleton: Skeleton, i: int) -> Topology:
    """The proven topology of block i. Loads the block for the time it needs, unless it is loaded; weights end unchanged.

    Raises ValueError for a skeleton that is not float32: the proof needs its precision.
    """
    if skeleton.dtype != torch.float32:
        raise ValueError(f"a proof needs float32, not {skeleton.dtype}")
    with skeleton.outer_loaded():
        proof_call = skeleton.calls(*PROOF_SHAPE)[i]
        probe_call = skeleton.calls(SAMPLES, 1)[i]
    block = skeleton.model.get_submodule(skeleton.blocks[i])
    borrowed = any(parameter.is_meta for parameter in block.parameters())
    if borrowed:
        skeleton.load_block(i)
    try:
        return _discover(block, skeleton.config.get_text_config().hidden_size, probe_call, proof_call)
    finally:
        if borrowed:
            skeleton.free_block(i)


def structure_key(block: nn.Module) -> Hashable:
    """Equal for two blocks of one model that differ only in their weights and their number."""
    modules = tuple((name, type(module).__name__, _plain(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _plain(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Attributes that choose a code path (layer types, windows, head counts), without counters of layers."""
    return tuple(
        (name, repr(value))
        for name, value in sorted(vars(module).items())
        if isinstance(value, str | int) and not name.startswith("_") and not _COUNTERS.search(name)
    )


def _discover(block: nn.Module, width: int, probe_call: BlockCall, proof_call: BlockCall) -> Topology:
    generator = torch.Generator().manual_seed(SEED)
    hidden_BTH = torch.randn(*PROOF_SHAPE, width, generator=generator)
    trace = _trace(block, proof_call, hidden_BTH)
    bench = Bench(
        block,
        probe_call,
        torch.randn(SAMPLES, 1, width, generator=generator),
        {op.name: block.get_submodule(op.name) for op in trace.ops},
        [readers[0] for readers in trace.reads],
        generator,
    )
    feeds = _all_feeds(bench, trace)
    proof = _Proof(block, proof_call, hidden_BTH, generator)
    spaces = [_space(number, trace, feeds[number], proof) for number in range(len(trace.reads))]
    topology = Topology(trace.ops, _named(spaces), trace.unhandled)
    return add_experts(topology, block, proof_call, hidden_BTH, _discover_expert)


def _discover_expert(expert: Expert, width: int) -> Topology:
    """One expert as a block of its own."""
    alone = BlockCall((), {})
    return _discover(expert, width, alone, alone)


# 1. Trace


@dataclass(frozen=True)
class _Trace:
    """ops in execution order; for each space the names of its readers; parameters that belong to no op."""

    ops: tuple[Op, ...]
    reads: list[tuple[str, ...]]
    unhandled: tuple[str, ...]


def _trace(block: nn.Module, call: BlockCall, hidden_BTH: Tensor) -> _Trace:
    apart = tuple(f"{path}." for path in experts_in(block))  # which experts run depends on the tokens
    candidates = {
        name: op
        for name, module in block.named_modules()
        if not name.startswith(apart) and (op := _as_op(name, module)) is not None
    }
    runs: list[tuple[str, Tensor, tuple[int, ...]]] = []  # the tensors are kept alive, so that addresses stay unique

    def hook(op: Op) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
            if _is_what_it_says(op, module, args[0], out):
                runs.append((op.name, args[0], _address(args[0])))

        return note

    handles = [block.get_submodule(op.name).register_forward_hook(hook(op)) for op in candidates.values()]
    try:
        call.run(block, hidden_BTH)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _, _ in runs]
    once = [name for name in names if names.count(name) == 1]
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, _, address in runs:
        if name in once and candidates[name].kind != "norm":
            groups.setdefault(address, []).append(name)
    owned = {f"{name}.{part}" for name in once for part in ("weight", "bias")}
    unhandled = tuple(name for name, _ in block.named_parameters() if name not in owned and not name.startswith(apart))
    return _Trace(tuple(candidates[name] for name in once), [tuple(group) for group in groups.values()], unhandled)


def _as_op(name: str, module: nn.Module) -> Op | None:
    own = dict(module.named_parameters())
    if not own or set(own) - {"weight", "bias"} or "weight" not in own:
        return None
    shape = tuple(own["weight"].shape)
    kind: OpKind
    if isinstance(module, Conv1D):
        kind, inputs, outputs = "conv1d", shape[0], shape[1]
    elif isinstance(module, nn.Linear):
        kind, outputs, inputs = "linear", shape[0], shape[1]
    elif len(shape) == 1 and all(parameter.dim() == 1 for parameter in own.values()):
        kind, outputs, inputs = "norm", shape[0], shape[0]
    else:
        return None
    return Op(name, kind, outputs, inputs)


def _is_what_it_says(op: Op, module: nn.Module, x: Tensor, out: object) -> bool:
    """Whether a matrix op's answer is its input times its matrix: a router that also picks experts is more than that."""
    if not isinstance(out, Tensor):
        return False
    if op.kind == "norm":
        return out.shape == x.shape
    product = nn.functional.linear(x, _matrix(op, module), dict(module.named_parameters()).get("bias"))
    return _relative(product, out) <= TOLERANCE


def _address(x: Tensor) -> tuple[int, ...]:
    """The same for a tensor and its reshaped views, another for a tensor that was changed in place in between."""
    return x.untyped_storage().data_ptr(), int(x.storage_offset()), x.shape[-1], x.numel(), x.stride(-1), x._version


# 2. Probe


def _all_feeds(bench: Bench, trace: _Trace) -> list[dict[str, Feed]]:
    """For each space, how every op that runs before it feeds it; ops that do not reach it are left out."""
    order = {op.name: at for at, op in enumerate(trace.ops)}
    feeds: list[dict[str, Feed]] = [{} for _ in trace.reads]
    for op in trace.ops:
        later = [number for number, readers in enumerate(trace.reads) if order[readers[0]] > order[op.name]]
        if later:
            for number, feed in bench.feeds(op.name, op.out_features, later).items():
                feeds[number][op.name] = feed
    return feeds


# 3. Prove


def _space(number: int, trace: _Trace, feeds: dict[str, Feed], proof: _Proof) -> Space:
    ops = {op.name: op for op in trace.ops}
    readers = trace.reads[number]
    fed_by = tuple(name for name, feed in feeds.items() if feed.separable and ops[name].kind != "norm")
    fold, reason = None, _no_writer(feeds, fed_by)
    for name in reversed([name for name, feed in feeds.items() if feed.complete]):
        fold, reason = _prove(ops[name], feeds[name], [ops[reader] for reader in readers], proof)
        if fold is not None:
            break
    return Space("", ops[readers[0]].in_features, readers, fold, reason, fed_by)


def _no_writer(feeds: dict[str, Feed], fed_by: tuple[str, ...]) -> str:
    if fed_by:
        return f"{', '.join(fed_by)} writes it through a function that no scale passes"
    if feeds:
        return "no single op writes it: it reads the residual stream"
    return "no op writes it: it reads the block's input"


def _prove(writer: Op, feed: Feed, readers: list[Op], proof: _Proof) -> tuple[Fold | None, str]:
    width = len(feed.rows)
    rows = tuple(feed.rows.tolist())
    identity = width == writer.out_features and rows == tuple(range(width))
    laws: tuple[Law, ...] = ("mul", "one_plus") if writer.kind == "norm" else ("linear",)
    error = float("inf")
    for law in laws:
        fold = Fold(writer.name, law, None if identity else rows)
        change = proof.change(writer, fold, readers)
        if change <= TOLERANCE:
            return fold, ""
        error = min(error, change)
    return None, f"{writer.name} seems to write it, but moving scales into it changed the output by {error:.0e}"


@dataclass(frozen=True)
class _Proof:
    """Runs the block before and after a fold with random scales."""

    block: nn.Module
    call: BlockCall
    hidden_BTH: Tensor
    generator: torch.Generator

    def change(self, writer: Op, fold: Fold, readers: list[Op]) -> float:
        """The largest relative change of the readers' outputs and of the block's output. The weights are put back."""
        s_O = torch.exp2(torch.rand(writer.out_features, generator=self.generator) * 2 - 1)
        if fold.rows is not None:  # channels that feed no column keep their scale
            used = torch.zeros(writer.out_features, dtype=torch.bool)
            used[list(fold.rows)] = True
            s_O = torch.where(used, s_O, torch.ones(()))
        modules = [self.block.get_submodule(op.name) for op in (writer, *readers)]
        before = self._outputs(modules[1:])
        with _kept(modules):
            _scale_writer(modules[0], writer, fold.law, s_O)
            s_C = s_O if fold.rows is None else s_O[torch.tensor(fold.rows)]
            for op, module in zip(readers, modules[1:], strict=True):
                _matrix(op, module).div_(s_C)
            after = self._outputs(modules[1:])
        return max(_relative(old, new) for old, new in zip(before, after, strict=True))

    def _outputs(self, readers: list[nn.Module]) -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [module.register_forward_hook(lambda _m, _a, out: seen.append(out.clone())) for module in readers]
        try:
            answer = self.call.run(self.block, self.hidden_BTH)
        finally:
            for handle in handles:
                handle.remove()
        return [*seen, answer]


def _relative(old: Tensor, new: Tensor) -> float:
    if old.shape != new.shape or not bool(torch.isfinite(new).all()):
        return float("inf")
    return float((new - old).norm() / old.norm().clamp(min=1e-30))


@contextmanager
def _kept(modules: list[nn.Module]) -> Iterator[None]:
    """Whatever happens inside, these modules leave with the weights that they came with."""
    copies = [(parameter, parameter.clone()) for module in modules for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, copy in copies:
            parameter.copy_(copy)


def _matrix(op: Op, module: nn.Module) -> Tensor:
    """The op's weight as [O, I], a view that may be written."""
    weight = module.get_parameter("weight").data
    return weight.t() if op.kind == "conv1d" else weight


def _scale_writer(module: nn.Module, op: Op, law: Law, s_O: Tensor) -> None:
    if law == "linear":
        _matrix(op, module).mul_(s_O[:, None])
    elif law == "mul":
        module.get_parameter("weight").data.mul_(s_O)
    else:
        module.get_parameter("weight").data.add_(1).mul_(s_O).sub_(1)
    bias = dict(module.named_parameters()).get("bias")
    if bias is not None:
        bias.data.mul_(s_O)


def _named(spaces: list[Space]) -> tuple[Space, ...]:
    """Names that can be read, such as "input_layernorm->q_proj,k_proj,v_proj"; full paths where short ones collide."""

    def name(space: Space, whole: bool) -> str:
        writer = space.fold.writer if space.fold else (*space.fed_by, "residual")[0]
        first, *readers = [part if whole else part.rpartition(".")[2] for part in (writer, *space.readers)]
        return f"{first}->{','.join(readers)}"

    short = [name(space, False) for space in spaces]
    whole = len(set(short)) < len(short)
    return tuple(
        Space(name(space, whole), space.width, space.readers, space.fold, space.reason, space.fed_by)
        for space in spaces
    )

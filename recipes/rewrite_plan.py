"""What a rewrite will do to a model, settled and proven before any weight is changed.

Both models, the source and what becomes of it, are looked at by experiment: which rows make which head
(`infopt.calibration.heads`), and whether a window is obeyed. Every distinct block structure is looked at once.

Legend: C hidden width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from infopt.calibration.discover import discover, structure_key
from infopt.calibration.heads import find_attention, prove_heads
from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported
from infopt.exporters.folder import model_config
from infopt.heads import Attention
from infopt.model import Skeleton
from infopt.rewriters.gqa import check_heads
from infopt.rewriters.options import RewriteOptions
from infopt.rewriters.sliding_window import SLIDING, window_settings
from infopt.rewriters.target import changed_config, kv_settings, target_skeleton
from infopt.topology import Topology

_SMALL_WINDOW, _PROOF_TOKENS = 3, 8


@dataclass(frozen=True)
class BlockPlan:
    """One block structure: its name in the reports, its topology, its attention before and after; None: it has none."""

    structure: str
    topology: Topology
    before: Attention | None
    after: Attention | None


@dataclass(frozen=True)
class RewritePlan:
    """settings: what changes in config.json. shapes: of the tensors that get another one. windows: each block's, None: all.

    changes: whether anything does; asking for what the model has already is the identity.
    """

    settings: dict[str, Any]
    target: Skeleton
    shapes: dict[str, tuple[int, ...]]
    blocks: list[BlockPlan]
    windows: list[int | None]

    @property
    def regroups(self) -> bool:
        return bool(self.shapes)

    @property
    def changes(self) -> bool:
        return self.regroups or bool(self.settings)

    def cache_bytes(self, tokens: int, after: bool) -> int:
        """Bytes of the bf16 key-value cache of so many tokens in all blocks, before or after the rewrite."""
        total = 0
        for block, window in zip(self.blocks, self.windows, strict=True):
            attention = block.after if after else block.before
            if attention is not None:
                kept = min(tokens, window) if after and window is not None else tokens
                widths = attention.key.channels.shape[1] + attention.value.channels.shape[1]
                total += 2 * kept * attention.kv_heads * widths
        return total


def plan_rewrite(reader: CheckpointReader, skeleton: Skeleton, options: RewriteOptions) -> RewritePlan:
    """Raises Unsupported and UsageError for whatever cannot be rewritten, before any work."""
    config = model_config(reader.config)
    settings: dict[str, Any] = {}
    text = skeleton.config.get_text_config()
    if options.kv_heads is not None:
        settings |= kv_settings(skeleton, options.kv_heads)
        for key, wanted in settings.items():  # before a definition is built that has no such heads
            check_heads(getattr(text, key), wanted)
        settings = {key: value for key, value in settings.items() if getattr(text, key) != value}
    windows: list[int | None] = [None] * len(skeleton.blocks)
    if options.window is not None:
        found = window_settings(text, options.window, options.every, options.sinks)
        settings |= found
        types = found.get("layer_types") or [SLIDING] * len(windows)
        windows = [options.window if kind == SLIDING else None for kind in types]
    target, shapes = target_skeleton(skeleton, changed_config(config, settings))
    blocks = _look(skeleton, target, options, bool(shapes))
    if options.kv_heads is not None and not shapes and options.kv_heads != max(_heads(blocks), default=0):
        raise Unsupported(
            f"--kv-heads {options.kv_heads}: {text.model_type} does not follow its config's number of key-value heads",
            "changing it changes no weight of this model",
            "leave --kv-heads out",
        )
    if options.window is not None:
        _prove_windows(reader, skeleton, settings, windows)
    return RewritePlan(settings, target, shapes, blocks, windows)


def _heads(blocks: list[BlockPlan]) -> list[int]:
    return [block.before.kv_heads for block in blocks if block.before is not None]


def _look(skeleton: Skeleton, target: Skeleton, options: RewriteOptions, regroups: bool) -> list[BlockPlan]:
    known: dict[Hashable, BlockPlan] = {}
    blocks = []
    for i, name in enumerate(skeleton.blocks):
        key = structure_key(skeleton.model.get_submodule(name))
        if key not in known:
            known[key] = _look_at(skeleton, target, i, f"topology-{len(known)}", options, regroups)
        blocks.append(known[key])
    if options.kv_heads is not None and all(block.before is None for block in blocks):
        raise Unsupported(
            f"--kv-heads {options.kv_heads}: no block has attention", "no heads to group", "leave --kv-heads out"
        )
    return blocks


def _look_at(
    skeleton: Skeleton, target: Skeleton, i: int, structure: str, options: RewriteOptions, regroups: bool
) -> BlockPlan:
    skeleton.load_block(i)
    try:
        topology = discover(skeleton, i)
        before = find_attention(skeleton, i, topology) if options.attention else None
        if before is not None and options.kv_heads is not None:
            _check_grouping(before, options.kv_heads)
            before = prove_heads(skeleton, i, before) if regroups else before
    finally:
        skeleton.free_block(i)
    if before is None or not regroups:
        return BlockPlan(structure, topology, before, before)
    target.load_block(i)
    try:
        after = find_attention(target, i, discover(target, i))
    finally:
        target.free_block(i)
    if after is None or after.kv_heads != options.kv_heads or len(after.group) != len(before.group):
        raise Unsupported(
            f"{skeleton.blocks[i]}: the definition for {options.kv_heads} key-value heads does not have them",
            f"it has {after.kv_heads if after else 0}",
            "use another model",
        )
    return BlockPlan(structure, topology, before, after)


def _check_grouping(attention: Attention, wanted: int) -> None:
    if attention.kv_heads == 1:
        raise Unsupported(
            f"--kv-heads {wanted}: the model has one key-value head",
            "it is a multi-query model already",
            "leave --kv-heads out",
        )
    check_heads(attention.kv_heads, wanted)


@torch.no_grad()
def _prove_windows(
    reader: CheckpointReader, skeleton: Skeleton, settings: dict[str, Any], windows: list[int | None]
) -> None:
    """With a window of 3 tokens, the last of 8 must not see the first in a layer that slides, and must in one that does not."""
    small = changed_config(model_config(reader.config), {**settings, "sliding_window": _SMALL_WINDOW})
    model, _ = target_skeleton(skeleton, small)
    kinds = {window: i for i, window in reversed(list(enumerate(windows)))}
    calls = model.calls(2, _PROOF_TOKENS)
    generator = torch.Generator().manual_seed(0)
    hidden_BTC = torch.randn(1, _PROOF_TOKENS, model.width, generator=generator).repeat(2, 1, 1)
    hidden_BTC[1, 0] = torch.randn(model.width, generator=generator)
    for window, i in kinds.items():
        answer_BTC = calls[i].run(model.load_block(i), hidden_BTC)
        model.free_block(i)
        sees = not torch.equal(answer_BTC[0, -1], answer_BTC[1, -1])
        if sees == (window is not None):
            text = skeleton.config.get_text_config()
            raise Unsupported(
                f"{skeleton.blocks[i]}: the {text.model_type} definition does not do what its config says",
                f"with a window, its last token {'still sees' if sees else 'does not see'} the first",
                "leave --window out",
            )


def windowed(plan: RewritePlan, window: int) -> dict[str, Any]:
    """The plan's settings with another window."""
    return {**plan.settings, "sliding_window": window}

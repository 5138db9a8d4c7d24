"""What `infopt rewrite` is asked to do, as plain data; the command line, the run and the report share it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from infopt.errors import UsageError

GROUPINGS = ("position", "similarity")
MERGES = ("lstsq", "mean", "first")
_FLAGS = {"grouping": "--group", "refit": "--no-refit", "heal": "--no-heal"}


@dataclass(frozen=True)
class RewriteOptions:
    """kv_heads, window: what changes; None leaves it. every: each such layer keeps full attention. rotate: turn the residual
    stream and the values first, with signs from the seed; the function stays. The rest says how.

    steps, lr: of the gradient healing of each block; a step is one batch of about 512 tokens. heal_steps, heal_lr: of the
    distillation of the whole model after that, about 1024 tokens each; 0 leaves it out. curve: keep what the blocks
    were at some points of the healing, to measure the distance to the original against the tokens seen.
    """

    kv_heads: int | None = None
    grouping: str = "similarity"
    merge: str = "lstsq"
    refit: bool = True
    heal: bool = True
    steps: int = 64
    lr: float = 1e-3
    heal_steps: int = 0
    heal_lr: float = 1e-4
    checkpointing: bool = False
    curve: bool = True
    window: int | None = None
    every: int | None = None
    sinks: int = 0
    rotate: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.attention and not self.rotate:
            raise UsageError("nothing is to be rewritten", "give --kv-heads, --window or --rotate", "--kv-heads 4")
        for name, value, known in (("--group", self.grouping, GROUPINGS), ("--merge", self.merge, MERGES)):
            if value not in known:
                raise UsageError(f"{name} {value}", f"known: {', '.join(known)}", f"{name} {known[0]}")
        for flag, rate, usual in (
            ("--lr", self.lr, RewriteOptions.lr),
            ("--heal-lr", self.heal_lr, RewriteOptions.heal_lr),
        ):
            if not 0 < rate <= 1:
                raise UsageError(f"{flag} {rate}", "it must be above 0 and at most 1", f"{flag} {usual}")
        for names, missing in self._without_effect():
            for name in names:
                if getattr(self, name) != getattr(RewriteOptions, name):
                    flag = _FLAGS.get(name, "--" + name.replace("_", "-"))
                    raise UsageError(f"{flag} without {missing}", "it would have no effect", f"drop {flag}")

    def _without_effect(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """(fields that nothing reads here, the flag that they go with)."""
        if self.kv_heads is None:
            yield ("grouping", "merge", "refit"), "--kv-heads"
        if self.window is None:
            yield ("every", "sinks"), "--window"
        if not self.attention:
            yield ("heal", "steps", "lr", "heal_steps", "heal_lr", "checkpointing"), "--kv-heads or --window"
        if not self.heal_steps:
            yield ("heal_lr",), "--heal-steps"

    @property
    def attention(self) -> bool:
        """Whether the attention changes, and with it what the model computes."""
        return self.kv_heads is not None or self.window is not None

    @property
    def needs_data(self) -> bool:
        """Whether calibration text must be read."""
        regroups = self.kv_heads is not None
        return (
            (self.heal and self.attention)
            or self.heal_steps > 0
            or (regroups and (self.refit or self.merge == "lstsq" or self.grouping == "similarity"))
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

"""Windows of different lengths: where a window has no more tokens, it holds `NO_TOKEN`, always at its end.

Behind its last token nothing of a window is read: not by attention, for tokens see only what came before them (which is
tried out on every block), not by a statistic, not by a router's counts. So there is no pad token that could matter and no
side on which it could be: whatever a tokenizer says about padding is not asked.

Legend: N windows, B windows of a batch, T tokens of a window, C channels, H heads, D channels of a head, R real tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infopt.errors import Unsupported
from infopt.model import BlockCall

NO_TOKEN = -1
_TOLERANCE = 1e-4  # relative, of what may change for a token when later ones do: experts sum in other orders


def padded(rows: list[list[int]]) -> Tensor:
    """Rows of token ids as windows [N, T], T that of the longest."""
    length = max(map(len, rows))
    return torch.tensor([row + [NO_TOKEN] * (length - len(row)) for row in rows], dtype=torch.int64)


def real_tokens(windows_NT: Tensor) -> Tensor | None:
    """Which entries are tokens, bool [N, T]; None where all are. ValueError for a gap before a token."""
    real_NT = windows_NT != NO_TOKEN
    if bool(real_NT.all()):
        return None
    if bool((real_NT[:, 1:] & ~real_NT[:, :-1]).any()):
        raise ValueError("windows are filled up at their end")
    return real_NT


def only_real(x: Tensor, real_BT: Tensor | None) -> Tensor:
    """The rows of activations [B, T, ...] or [B * T, ...] that belong to tokens, [R, ...]; all, unchanged, without a mask."""
    if real_BT is None:
        return x
    if x.shape[:2] == real_BT.shape:
        return x[real_BT]
    if len(x) == real_BT.numel():
        return x[real_BT.flatten()]
    raise Unsupported(
        f"A layer receives activations of shape {list(x.shape)} for {list(real_BT.shape)} tokens.",
        "Which of them stand for padding cannot be told.",
        "Leave --pad out: rows are then joined to windows of one length.",
    )


def only_real_heads(x_BHTD: Tensor, real_BT: Tensor | None) -> Tensor:
    """Keys or values [B, H, T, D] of tokens alone, as [R, H, 1, D]; all, unchanged, without a mask."""
    return x_BHTD if real_BT is None else x_BHTD.transpose(1, 2)[real_BT].unsqueeze(2)


@torch.no_grad()
def check_causal(name: str, block: nn.Module, call: BlockCall, hidden_BTC: Tensor) -> None:
    """Unsupported if tokens of the block see later ones; shown by changing the later half of some hidden states."""
    half = hidden_BTC.shape[1] // 2
    changed_BTC = hidden_BTC.clone()
    changed_BTC[:, half:] = hidden_BTC[:, half:].flip(-1) + 1
    before, after = (call.run(block, x_BTC)[:, :half] for x_BTC in (hidden_BTC, changed_BTC))
    if bool((after - before).norm() > _TOLERANCE * before.norm()):
        raise Unsupported(
            f"In {name} a token's answer depends on later tokens.",
            "It would see the padding behind its window.",
            "Leave --pad out: rows are then joined to windows of one length.",
        )

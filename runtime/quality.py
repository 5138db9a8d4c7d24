"""How good a model is on text, and how far a compressed one is from its original, streamed block by block.

    perplexity   exp of the mean over predicted tokens of -log q(next token)
    KL           per predicted token, the sum over the vocabulary of p (log p - log q): p the reference, q the candidate
    top-1        the share of predicted tokens where both find the same token most likely

Perplexity says little about a small change: it can even fall by luck. KL sees every change of every probability and its
tail (99.9 %) shows the tokens that went wrong, which a mean hides. Both models see the same windows.

Memory: the hidden states of all windows once per model, one block, then the two heads and the logits of some tokens: a
quarter of a head, unless that is a small one.
log-softmax in fp32, sums in float64. A model compared with itself gives a KL of exactly zero.

Legend: N windows, T tokens of a window, P predicted tokens (N * (T - 1)), K tokens of one piece, C width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from infopt.checkpoint import CheckpointReader
from infopt.errors import VerificationFailed
from infopt.memory import bytes_of
from infopt.runtime.model import RuntimeModel
from infopt.team import ALONE, Team

_LOGITS_PER_PIECE = 2**19  # 2 MiB of fp32: what is done with logits after each other stays in a processor's cache
_BYTES_PER_READ = 16 * 2**20


@dataclass(frozen=True)
class Comparison:
    """Candidate against reference on the same predicted tokens. KL in nats."""

    tokens: int
    perplexity_reference: float
    perplexity: float
    kl_mean: float
    kl_median: float
    kl_999: float
    kl_max: float
    top1: float

    @property
    def perplexity_increase(self) -> float:
        """Relative: 0.05 is five per cent more than the reference."""
        return self.perplexity / self.perplexity_reference - 1

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_increase": self.perplexity_increase}


def perplexity(
    model: RuntimeModel, windows_NT: Tensor, on_block: Callable[[], None] | None = None
) -> dict[str, float | int]:
    """{"perplexity", "nll" (nats per token), "tokens"} on windows of token ids; every window predicts T - 1 tokens.

    Raises VerificationFailed where the model answers with numbers that are not finite.
    """
    hidden_NTC = model.last_hidden(windows_NT, on_block)
    model.load_outer()
    total, count = 0.0, 0
    for logits_KV, next_K in _logits(model, hidden_NTC, windows_NT):
        log_q_KV = _log_probabilities(model, logits_KV)
        total -= log_q_KV.gather(1, next_K[:, None].to(log_q_KV.device)).sum(dtype=torch.float64).item()
        count += len(next_K)
    model.free_outer()
    return {"perplexity": _exp(total / count), "nll": total / count, "tokens": count}


def compare(
    reference: RuntimeModel,
    candidate: RuntimeModel,
    windows_NT: Tensor,
    on_block: Callable[[], None] | None = None,
    team: Team = ALONE,
) -> Comparison:
    """Run both models block by block (one block in memory at a time), then compare their next-token distributions.

    `on_block` is called len(reference) + len(candidate) times. Raises VerificationFailed for infinite answers.
    """
    return compare_each(reference, [candidate], windows_NT, on_block, team)[0]


def compare_each(
    reference: RuntimeModel,
    candidates: list[RuntimeModel],
    windows_NT: Tensor,
    on_block: Callable[[], None] | None = None,
    team: Team = ALONE,
) -> list[Comparison]:
    """`compare` for several candidates; the reference runs once. Of a team each process runs its share of the windows, if
    there are enough, and all get the whole answer."""
    team = team if len(windows_NT) >= team.size else ALONE
    share_NT = team.share(windows_NT)
    hidden_r_NTC = reference.last_hidden(share_NT, on_block)
    return [_compared(reference, hidden_r_NTC, candidate, share_NT, on_block, team) for candidate in candidates]


def _compared(
    reference: RuntimeModel,
    hidden_r_NTC: Tensor,
    candidate: RuntimeModel,
    windows_NT: Tensor,
    on_block: Callable[[], None] | None,
    team: Team,
) -> Comparison:
    hidden_c_NTC = candidate.last_hidden(windows_NT, on_block)
    _load_heads(reference, candidate)
    failure = None
    found_P4 = torch.zeros(0, 4, dtype=torch.float64)
    try:
        found_P4 = torch.cat(list(_token_by_token(reference, hidden_r_NTC, candidate, hidden_c_NTC, windows_NT)))
    except VerificationFailed as error:
        failure = error  # raised when all have come so far: nobody may be left waiting for this process
    reference.free_outer()
    candidate.free_outer()
    if team.total(failure is not None):
        raise failure or VerificationFailed(
            f"{candidate.folder} or its original answers with logits that are not finite",
            "They came up in another process.",
            f"infopt verify {candidate.folder}",
        )
    return _summary(team.gather(found_P4))


def _token_by_token(
    reference: RuntimeModel, hidden_r_NTC: Tensor, candidate: RuntimeModel, hidden_c_NTC: Tensor, windows_NT: Tensor
) -> Iterator[Tensor]:
    """Of some predicted tokens at a time, float64 [K, 4]: both models' -log probabilities, whether they agree, the KL."""
    pairs = zip(_logits(reference, hidden_r_NTC, windows_NT), _logits(candidate, hidden_c_NTC, windows_NT), strict=True)
    for (logits_r_KV, next_K), (logits_c_KV, _) in pairs:
        log_p_KV = _log_probabilities(reference, logits_r_KV)
        log_q_KV = _log_probabilities(candidate, logits_c_KV)
        nll_K2 = [-log_KV.gather(1, next_K[:, None])[:, 0].double() for log_KV in (log_p_KV, log_q_KV)]
        agree_K = (log_p_KV.argmax(1) == log_q_KV.argmax(1)).double()
        yield torch.stack([*nll_K2, agree_K, _kl(log_p_KV, log_q_KV)], 1)


def identical(one: CheckpointReader, other: CheckpointReader, name: str) -> bool:
    """Whether both folders hold the same tensor, bit for bit; read in pieces of a few megabytes."""
    a, b = one.tensors[name], other.tensors[name]
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    if not a.shape or not a.nbytes:
        return _same_bytes(one.get(name), other.get(name))
    rows = max(1, _BYTES_PER_READ * a.shape[0] // a.nbytes)
    return all(
        _same_bytes(one.rows(name, start, stop), other.rows(name, start, stop))
        for start in range(0, a.shape[0], rows)
        for stop in [min(start + rows, a.shape[0])]
    )


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bytes_of(a), bytes_of(b))


def _load_heads(reference: RuntimeModel, candidate: RuntimeModel) -> None:
    """Both models' outer parts; tensors that the folders have in common are in memory once."""
    tensors = reference.load_outer()
    if candidate is not reference:
        keys = [key for key in candidate.skeleton.outer_keys() if key in tensors]
        candidate.load_outer({key: tensors[key] for key in keys if identical(reference.reader, candidate.reader, key)})


def _logits(model: RuntimeModel, hidden_NTC: Tensor, windows_NT: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits_KV fp32, next token ids_K) for the tokens that have a next one, in order.

    The head is read once for many tokens, and what it gives is handed out piece by piece.
    """
    piece = max(1, _LOGITS_PER_PIECE // model.skeleton.config.get_text_config().vocab_size)
    size = max(piece, model.skeleton.logits_at_once)
    for hidden_TC, ids_T in zip(hidden_NTC, windows_NT, strict=True):
        for start in range(0, len(ids_T) - 1, size):
            stop = min(start + size, len(ids_T) - 1)
            pieces = model.logits(hidden_TC[start:stop]).split(piece)
            yield from zip(pieces, ids_T[start + 1 : stop + 1].split(piece), strict=True)
            del pieces  # before the next ones are made


def _log_probabilities(model: RuntimeModel, logits_KV: Tensor) -> Tensor:
    """log q [K, V] in fp32; VerificationFailed if one is not a number."""
    log_q_KV = torch.log_softmax(logits_KV, dim=-1)
    if not math.isfinite(log_q_KV.sum(dtype=torch.float64).item()):
        raise VerificationFailed(
            f"{model.folder}: the model answers with logits that are not finite",
            "A weight is damaged, or a value overflows on the way.",
            f"infopt verify {model.folder}",
        )
    return log_q_KV


def _kl(log_p_KV: Tensor, log_q_KV: Tensor) -> Tensor:
    """KL(p || q) per token [K], float64; both arguments are overwritten. Rounding cannot make it negative."""
    difference_KV = torch.sub(log_p_KV, log_q_KV, out=log_q_KV)
    return difference_KV.mul_(log_p_KV.exp_()).sum(1, dtype=torch.float64).clamp_min_(0)


def _summary(found_P4: Tensor) -> Comparison:
    tokens = len(found_P4)
    nll_r, nll_c, agree, _ = found_P4.sum(0).tolist()
    ordered = found_P4[:, 3].sort().values
    return Comparison(
        tokens=tokens,
        perplexity_reference=_exp(nll_r / tokens),
        perplexity=_exp(nll_c / tokens),
        kl_mean=ordered.mean().item(),
        kl_median=ordered[tokens // 2].item(),
        kl_999=ordered[min(tokens - 1, math.ceil(0.999 * tokens) - 1)].item(),
        kl_max=ordered[-1].item(),
        top1=agree / tokens,
    )


def _exp(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # beyond it a float overflows; such a model is broken either way

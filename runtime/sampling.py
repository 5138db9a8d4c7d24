"""The next token of a text, from its logits.

    temperature 0    the most likely token (the first of equals)
    otherwise        softmax(logits / temperature), cut to the `top_k` most likely tokens, then to the fewest whose
                     probabilities reach `top_p` (Holtzman et al. 2020, nucleus sampling), and one drawn from the rest

Every text draws with a generator of its own, so what it says does not depend on which others are being read.

Legend: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infopt.errors import UsageError, VerificationFailed


def most_likely(logits: Tensor) -> Tensor:
    """int64 [...] of fp32 [..., V]: the first of the largest. On a processor by numpy, in a tenth of torch's time."""
    return torch.as_tensor(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @property
    def fine(self) -> bool:
        """Whether a draw looks at more than the most likely tokens."""
        return self.temperature > 0 and not 0 < self.top_k <= 64

    def __post_init__(self) -> None:
        fine = {
            "temperature": math.isfinite(self.temperature) and self.temperature >= 0,
            "top-k": self.top_k >= 0,
            "top-p": 0 < self.top_p <= 1,
            "seed": 0 <= self.seed < 2**63,
        }
        for name, ok in fine.items():
            if not ok:
                value = getattr(self, name.replace("-", "_"))
                raise UsageError(f"--{name} {value}", "is out of range", "--temperature 0.8 --top-k 40 --top-p 0.95")


@dataclass
class Sampler:
    """One text's choices, in order."""

    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.sampling.seed)

    def choose(self, logits_V: Tensor) -> int:
        """The next token; VerificationFailed where the model answers with numbers that are not finite."""
        best = int(most_likely(logits_V))
        if not math.isfinite(logits_V[best].item()):
            raise VerificationFailed(
                "The model answers with numbers that are not finite.", "Its weights are damaged.", "infopt verify"
            )
        if self.sampling.temperature == 0:
            return best
        kept_K, ids_K = self._kept(logits_V.float().cpu() / self.sampling.temperature)
        return int(ids_K[torch.multinomial(kept_K, 1, generator=self._generator)])

    def _kept(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, not normed; token ids) of what may be drawn, the most likely first."""
        count = min(self.sampling.top_k or len(logits_V), len(logits_V))
        best_K, ids_K = torch.topk(logits_V, count)
        p_K = torch.softmax(best_K, 0)
        enough = int((p_K.cumsum(0) - p_K < self.sampling.top_p).sum())
        return p_K[: max(1, enough)], ids_K[: max(1, enough)]

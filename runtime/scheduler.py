"""Many texts at once: each is admitted when there is a place, read, continued with the others, and retired by itself.

One `step` admits who fits, reads one piece of one prompt, and continues all texts that have been read by one token. So a
text that comes later need not wait for the others' ends, and one with a long prompt does not stop them. A text's tokens
are the same with any neighbours (up to the order in which fp32 is summed).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from infopt.errors import OutOfResources
from infopt.runtime.engine import Engine
from infopt.runtime.paged import PagedCache, Request
from infopt.runtime.sampling import Sampler, Sampling

Finish = Literal["stop", "length", "context"]


@dataclass
class Text:
    """A prompt and what follows it. finish: "stop" (a token that ends texts, not in `tokens`), "length" (`most` tokens)
    or "context" (the model knows no more positions); None while it is being written."""

    prompt: Sequence[int]
    most: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None


@dataclass
class _Running:
    text: Text
    place: Request
    sampler: Sampler
    last: int = -1

    @property
    def unread(self) -> int:
        return len(self.text.prompt) - self.place.length


class Scheduler:
    """Texts in an engine. stop: tokens that end a text. Raises what `Engine.check_prompt` raises, and OutOfResources."""

    def __init__(self, engine: Engine, cache: PagedCache, stop: frozenset[int] = frozenset()) -> None:
        self.engine, self.cache, self.stop = engine, cache, stop
        self.waiting: deque[Text] = deque()
        self.reading: deque[_Running] = deque()
        self.writing: list[_Running] = []

    def submit(self, text: Text) -> None:
        self.engine.check_prompt(text.prompt)
        if not self.cache.could_fit(self._capacity(text)):
            what = f"a text of {self._capacity(text):,} tokens does not fit the cache"
            raise OutOfResources(what, "It could never be admitted.", "Make the cache larger, or the text shorter.")
        self.waiting.append(text)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.writing)

    def run(self) -> Iterator[tuple[Text, int]]:
        """Every new token as it comes, until all texts are finished."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[tuple[Text, int]]:
        """One pass over a piece of a prompt, and one over all texts that are being written; the new tokens."""
        while self.waiting and (place := self.cache.admit(self._capacity(self.waiting[0]))):
            text = self.waiting.popleft()
            self.reading.append(_Running(text, place, Sampler(text.sampling)))
        fresh = self._read()
        written = self._write()
        self.writing += fresh
        said = [(running.text, running.last) for running in (*fresh, *written) if running.text.finish != "stop"]
        for running in [running for running in self.writing if running.text.finish]:
            self.cache.retire(running.place)
            self.writing.remove(running)
        return said

    def _capacity(self, text: Text) -> int:
        """Tokens to be stored; the last one that is written never is."""
        longest = len(text.prompt) + text.most - 1
        return longest if self.engine.positions is None else min(longest, self.engine.positions)

    def _read(self) -> list[_Running]:
        """Read a piece of the first prompt; it, with its first token, if that was the last piece."""
        if not self.reading:
            return []
        running = self.reading[0]
        start = running.place.length
        piece = running.text.prompt[start : start + self.cache.piece(start)]
        logits_BV = self.engine.advance(
            self.cache, [running.place], torch.tensor([list(piece)]), running.text.sampling.fine
        )
        if running.unread:
            return []
        self._choose(running, logits_BV[0])
        return [self.reading.popleft()]

    def _write(self) -> list[_Running]:
        if not self.writing:
            return []
        ids_BQ = torch.tensor([[running.last] for running in self.writing])
        fine = any(running.text.sampling.fine for running in self.writing)
        logits_BV = self.engine.advance(self.cache, [running.place for running in self.writing], ids_BQ, fine)
        for running, logits_V in zip(self.writing, logits_BV, strict=True):
            self._choose(running, logits_V)
        return list(self.writing)

    def _choose(self, running: _Running, logits_V: Tensor) -> None:
        text = running.text
        running.last = running.sampler.choose(logits_V)
        if running.last in self.stop:
            text.finish = "stop"
            return
        text.tokens.append(running.last)
        if len(text.tokens) >= text.most:
            text.finish = "length"
        elif running.place.length >= running.place.capacity:
            text.finish = "context"

"""`infopt generate`: text from a model, quantized or not."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infopt.cli.evaluate import Kernels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import device

    from infopt.kernels.cpu import Precision
    from infopt.runtime.engine import KVCache as Cache
    from infopt.runtime.scheduler import Text


class KVCache(StrEnum):
    """How keys and values are kept."""

    stored = "stored"
    float = "float"
    fp8 = "fp8"
    int8 = "int8"
    int4 = "int4"


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, quantized or not, or a hub id.")],
    prompt: Annotated[list[str], typer.Option(help="What to go on from; several are answered at once.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token every time.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draws.")] = 0,
    precision: Annotated[Kernels, typer.Option(help="How quantized layers run.")] = Kernels.exact,
    kv_cache: Annotated[
        KVCache,
        typer.Option(help="Type of the cache; stored: as the folder says. int4 without calibration is rough."),
    ] = KVCache.stored,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N for one of several GPUs.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout, when it is complete.")] = False,
) -> None:
    """Go on from a prompt, token by token, on stdout. Greedy unless --temperature says otherwise. Tensor-parallel shards run
    with one process per rank.

    Example: infopt generate ./model-w4 --chat --prompt "What is the capital of France?" --precision packed
    """
    from infopt.calibration.data import load_tokenizer
    from infopt.checkpoint import resolve
    from infopt.exporters.assemble import is_shards
    from infopt.report import json_out, note
    from infopt.runtime.device import device_errors, find_device
    from infopt.runtime.sampling import Sampling
    from infopt.runtime.scheduler import Text
    from infopt.shards import SOURCE

    where = find_device(device)
    sampling = Sampling(temperature, top_k, top_p, seed)
    folder = resolve(model)
    tokenizer = load_tokenizer(folder / SOURCE if is_shards(folder) else folder)
    texts = [Text(encode(tokenizer, words, chat), max_new_tokens, sampling) for words in prompt]
    pieces = Pieces(tokenizer)
    with device_errors(where):
        for text, token in answers(folder, texts, precision.value, kv_cache.value, where):
            if len(texts) == 1 and not as_json:
                write(pieces.add(token))
            if text.finish == "context":
                note(f"stopped: the model knows {len(text.prompt) + len(text.tokens) - 1:,} positions")
    if as_json:
        told = [_answer(tokenizer, *pair) for pair in zip(prompt, texts, strict=True)]
        settings = {"precision": precision.value, "kv_cache": kv_cache.value, "seed": seed, "temperature": temperature}
        json_out({"model": model, **settings, "answers": told})
    elif len(texts) == 1:
        write(pieces.rest() + "\n")
    else:
        for words, text in zip(prompt, texts, strict=True):
            write(f"> {words}\n{tokenizer.decode(text.tokens, skip_special_tokens=True)}\n\n")


def answers(
    folder: Path, texts: list[Text], precision: Precision, cache: Cache, device: device
) -> Iterator[tuple[Text, int]]:
    """Every new token as it comes, in this process or from the ranks of shards."""
    from infopt.errors import Unsupported
    from infopt.exporters.assemble import is_shards
    from infopt.runtime import rank_generate
    from infopt.runtime.engine import Engine
    from infopt.runtime.scheduler import Scheduler

    if is_shards(folder):
        if device.type != "cpu":
            raise Unsupported(f"--device {device} for shards", "Their ranks run on the processor.", "--device cpu")
        yield from rank_generate.generate(folder, texts, precision, cache)
        return
    engine = Engine(folder, precision, cache, device=device)
    for text in texts:
        engine.check_prompt(text.prompt)
    longest = max(len(text.prompt) + text.most for text in texts)
    scheduler = Scheduler(engine, engine.cache(longest, len(texts)), engine.stop_ids())
    for text in texts:
        scheduler.submit(text)
    yield from scheduler.run()


def encode(tokenizer: Any, words: str, chat: bool) -> list[int]:
    """Token ids of a prompt. BadInput where the model has no chat template, or one that does not work."""
    from infopt.calibration.data import token_ids
    from infopt.chat import fill

    name = tokenizer.name_or_path
    if chat:
        words = fill(name, tokenizer, [{"role": "user", "content": words}], answer=True)
    return token_ids("the prompt", tokenizer, [words], special=not chat)[0]


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Pieces:
    """Text from tokens as they come. A character may need several tokens, so the last ones wait until it is whole; a few
    that were written already are decoded again each time, since a tokenizer may begin a text without its space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._written = 0  # of the tokens

    def add(self, token: int) -> str:
        self._tokens.append(token)
        whole = self._decode(len(self._tokens))
        if whole.endswith("\ufffd"):
            return ""
        return self._take(whole)

    def rest(self) -> str:
        return self._take(self._decode(len(self._tokens)))

    def _take(self, whole: str) -> str:
        new = whole[len(self._decode(self._written)) :]
        self._tokens = self._tokens[max(0, self._written - 4) :]  # the text before these is done with
        self._written = len(self._tokens)
        return new

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(self._tokens[:count], skip_special_tokens=True)


def _answer(tokenizer: Any, words: str, text: Text) -> dict[str, Any]:
    return {
        "prompt": words,
        "text": tokenizer.decode(text.tokens, skip_special_tokens=True),
        "prompt_tokens": len(text.prompt),
        "tokens": text.tokens,
        "finish": text.finish,
    }

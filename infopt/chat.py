"""Conversations by the model's own chat template, which is a program by a stranger.

transformers runs it in jinja's sandbox: it reaches no files and no attributes of ours. It may still count to 10^10 in nested
loops or make a text of 10 GB. So it runs in a forked child of bounded processor time and memory that gives back text and
nothing else; an alarm in this process would not end a single long operation, and works in the main thread only.
"""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection
from typing import Any

from infopt.errors import BadInput

SECONDS = 10  # of processor time; a real template needs milliseconds
BYTES = 2**29  # more memory than the process that forked
_MAX_TEXT = 2**26
_DONE, _FAILED = b"+", b"-"


def fill(
    what: str, tokenizer: Any, messages: list[dict[str, str]], answer: bool = False, seconds: int = SECONDS
) -> str:
    """The conversation as the template writes it. answer: with the beginning of the model's own turn. what: says in the
    message whose template it is. BadInput for one that fails or needs more than `seconds` and BYTES."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, tokenizer, messages, answer, seconds), daemon=True)
    child.start()
    theirs.close()
    try:
        said = ours.recv_bytes(_MAX_TEXT)
    except (EOFError, OSError):  # killed by its limit, or a longer text
        said = _FAILED + f"it needs more than {seconds} seconds, or writes without end".encode()
    finally:
        ours.close()
        child.join()
    text = said[1:].decode()
    if said[:1] == _FAILED:
        raise BadInput(f"the chat template of {what} cannot be used", text, "Leave --chat out, or give plain text.")
    return text


def _child(out: Connection, tokenizer: Any, messages: list[dict[str, str]], answer: bool, seconds: int) -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        mine = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mine + BYTES, mine + BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
        out.send_bytes(_DONE + str(text).encode())
    except Exception as error:  # noqa: BLE001  whatever a template does is the template's fault
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        out.send_bytes(_FAILED + reason.encode(errors="replace"))

"""A Hugging Face tokenizer as GGUF's metadata: byte-level BPE, the kind that GGUF calls "gpt2".

llama.cpp cuts text before it merges by rules that it knows by name (`tokenizer.ggml.pre`). A wrong name gives other tokens
without any error, so the name is not guessed: the folder's own rules, as tokenizer.json spells them, must be among
those in the table. Anything else is refused, and `--no-tokenizer` writes the file without one.

The way back needs the same table: transformers makes a tokenizer from a file without looking at the name, so `write_tokenizer`
puts the rules that the name stands for in place. A name that is not in the table leaves the
tokenizer as transformers makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from infopt.errors import BadInput, Unsupported
from infopt.exporters.gguf_header import GGUFHeader

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: what a pre-tokenizer does, in order -> llama.cpp's name for it
_RULES = {
    ("bytes+regex",): "gpt-2",
    ("digits", "bytes+regex"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
}
#: Names of models whose text is cut as by one of the rules above.
_ALIASES = {"gpt-2": "gpt-2", "smollm": "smollm", "llama-bpe": "llama-bpe", "llama3": "llama-bpe", "qwen2": "qwen2"}
_NORMALIZERS = (None, {"type": "NFC"})  # llama.cpp normalises nothing; Qwen's NFC changes no composed text
_FAILURES = (ValueError, TypeError, KeyError, OSError, AttributeError, ImportError)
_READING_FAILURES = (*_FAILURES, IndexError, ZeroDivisionError, RuntimeError)
_FIX = "--no-tokenizer writes the file without one; llama.cpp's own converter may know this tokenizer"


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer in `folder`, filled up with unused tokens to the embedding's rows. Raises Unsupported, BadInput."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
    except _FAILURES as error:
        raise Unsupported(
            f"{folder} has no fast tokenizer", f"{type(error).__name__}: {str(error)[:200]}", _FIX
        ) from error
    model = rules["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or rules.get("normalizer") not in _NORMALIZERS:
        raise Unsupported(f"{folder}: a {model['type']} tokenizer", "infopt writes byte-level BPE to GGUF", _FIX)
    tokens, types = _tokens(tokenizer, rules, vocab_size, folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre(rules.get("pre_tokenizer"), folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for kind, add in _SPECIAL.items():
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < vocab_size:
            add(writer, token_id)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


_SPECIAL = {
    "bos": GGUFWriter.add_bos_token_id,
    "eos": GGUFWriter.add_eos_token_id,
    "unk": GGUFWriter.add_unk_token_id,
    "pad": GGUFWriter.add_pad_token_id,
}


def write_tokenizer(header: GGUFHeader, stage: Path) -> bool:
    """Write the tokenizer with its chat template; False where the file has none."""
    from transformers import AutoTokenizer

    if not header.values.get("tokenizer.ggml.tokens"):
        return False
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, local_files_only=True
        )
        tokenizer.save_pretrained(stage)
        _restore_rules(header, stage / "tokenizer.json")
    except _READING_FAILURES as error:
        raise Unsupported(
            f"{header.path}: its tokenizer cannot be converted",
            f"{type(error).__name__}: {error}",
            "Use the original Hugging Face model.",
        ) from error
    return True


def _restore_rules(header: GGUFHeader, path: Path) -> None:
    """How text is cut before it is merged: the file says it by name, which transformers does not read."""
    name = header.values.get("tokenizer.ggml.pre")
    if header.values.get("tokenizer.ggml.model") != "gpt2" or not isinstance(name, str) or not path.exists():
        return
    rules = _with_rules(json.loads(path.read_text(encoding="utf-8")), name)
    if rules is not None:
        path.write_text(json.dumps(rules, indent=2, ensure_ascii=False), encoding="utf-8")


def _with_rules(rules: dict[str, Any], name: str) -> dict[str, Any] | None:
    """tokenizer.json's content with the pre-tokenizer that llama.cpp's `name` stands for; None for a name not known."""
    known = {pre: steps for steps, pre in _RULES.items()}
    if name not in _ALIASES:
        return None
    parts = [_spelled(step) for step in known[_ALIASES[name]]]
    return {**rules, "pre_tokenizer": {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0]}


def _spelled(step: str) -> dict[str, Any]:
    """The inverse of `_step`."""
    if step in ("bytes+regex", "bytes"):
        regex = step == "bytes+regex"
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    if step == "digits":
        return {"type": "Digits", "individual_digits": True}
    return {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}


def _tokens(tokenizer: Any, rules: dict[str, Any], vocab_size: int, folder: Path) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids that the tokenizer does not use are named and marked so."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= vocab_size:
        what = f"{folder}: the tokenizer has the id {max(by_id)}"
        raise BadInput(what, f"the embedding has {vocab_size} rows", "use the tokenizer of this model")
    added = {entry["id"]: entry["special"] for entry in rules.get("added_tokens", [])}
    tokens = [by_id.get(i, f"[UNUSED{i}]") for i in range(vocab_size)]
    types: list[int] = []
    for i in range(vocab_size):
        if i not in by_id:
            types.append(TokenType.UNUSED)
        elif i in added:
            types.append(TokenType.CONTROL if added[i] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return tokens, types


def _pre(pre_tokenizer: Any, folder: Path) -> str:
    steps = tuple(_step(part) for part in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]))
    if steps not in _RULES:
        why = f"llama.cpp must know by name how text is cut, and this is none of {', '.join(_RULES.values())}"
        raise Unsupported(f"{folder}: an unknown pre-tokenizer: {str(steps)[:200]}", why, _FIX)
    return _RULES[steps]


def _step(part: dict[str, Any]) -> str:
    """One step of a pre-tokenizer in a word; its JSON where it is none that GGUF has a name for."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return "bytes+regex" if part.get("use_regex", True) else "bytes"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(part.get("pattern", {}).get("Regex"))
    return json.dumps(part)

"""Rules of `infopt lint` about files: what can run code, what a server needs beside weights, heads and layers that lack.

Each rule is a function of a model that yields findings; `infopt.exporters.lint` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from infopt.checkpoint import PICKLES, contained
from infopt.errors import InfoptError
from infopt.exporters.lint_model import Finding, Level, Model, found, number_of, quoted
from infopt.header import TensorInfo, read_tensor
from infopt.memory import bytes_of

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: Tokens that only models trained to chat have.
_CHAT_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_PIECE_ROWS = 4096


def unsafe_files(model: Model) -> Iterator[Finding]:
    """Pickles and code run on loading; links may lead to anybody's files."""
    for name in model.files:
        suffix = "." + name.rpartition(".")[2].lower()
        if suffix in PICKLES and not name.endswith("training_args.bin"):
            yield found(
                "pickle", "warning", name, "loading a pickle can run code", f"rm {name}: safetensors hold the weights"
            )
        elif suffix == ".py":
            yield found(
                "remote-code", "warning", name, "it is code that a loader may be asked to run", f"read it, or rm {name}"
            )
        try:
            contained(model.folder, name)
        except InfoptError as error:
            yield found("link", "error", name, error.what + ": " + error.why, error.fix)


def remote_code(model: Model) -> Iterator[Finding]:
    """config.json may ask the loader to run the folder's own code."""
    for path, value in _walk(model.config):
        if path[-1] in ("auto_map", "trust_remote_code") and value:
            message = f"{'.'.join(path)} asks for code of the model's own to be run"
            yield found(
                "remote-code", "error", "config.json", message, "remove it, where transformers knows the model itself"
            )


def _walk(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield (*path, str(key)), value
        yield from _walk(value, (*path, str(key)))


def tokenizer(model: Model) -> Iterator[Finding]:
    """A server cannot start without a tokenizer, and garbles ids that the embedding lacks."""
    if not any(name in model.files for name in _TOKENIZERS):
        yield found(
            "tokenizer", "warning", "tokenizer.json", "there is no tokenizer", "copy it from the original model"
        )
        return
    if "tokenizer_config.json" not in model.files:
        message = "it is missing: special tokens and the tokenizer's class are unknown"
        yield found("tokenizer", "warning", "tokenizer_config.json", message, "copy it from the original model")
    largest, rows = _largest_id(model.json("tokenizer.json")), _embedding_rows(model)
    if largest is not None and rows is not None and largest >= rows:
        message = f"it gives the id {largest}, and the embedding has {rows} rows"
        yield found("tokenizer", "error", "tokenizer.json", message, "use the tokenizer of this very model")


def _largest_id(data: Any) -> int | None:
    inner = data.get("model") if isinstance(data, dict) else None
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = data.get("added_tokens") if isinstance(data, dict) else None
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return max((number for number in ids if type(number) is int), default=None)


def _embedding_rows(model: Model) -> int | None:
    for name, info in model.tensors.items():
        if name.rpartition(".")[0].rpartition(".")[2] in _EMBEDDINGS and len(info.shape) == 2:
            return info.shape[0]
    return None


def chat_template(model: Model) -> Iterator[Finding]:
    """A chat model without its template answers nonsense; two templates that differ answer by who reads which."""
    config = model.json("tokenizer_config.json")
    inline = config.get("chat_template") if isinstance(config, dict) else None
    has_file = any(name in model.files for name in _TEMPLATES)
    if not inline and not has_file and any(name in model.files for name in _TOKENIZERS):
        chats = _chat_tokens(model)
        message = (
            f"there is no chat template, though the tokenizer has {chats[0]}" if chats else "there is no chat template"
        )
        level: Level = "warning" if chats else "info"
        yield found("chat-template", level, "chat_template.jinja", message, "copy it from the original model")
    if isinstance(inline, str) and "chat_template.jinja" in model.files:
        path = model.folder / "chat_template.jinja"
        try:
            own = contained(model.folder, path.name).read_text(encoding="utf-8", errors="replace")[: 2**20]
        except (OSError, InfoptError) as error:
            yield found("chat-template", "error", path.name, f"it cannot be read: {error}", "copy it anew")
            return
        if own.strip() != inline.strip():
            message = "it differs from the template in tokenizer_config.json, and servers disagree on which to read"
            yield found("chat-template", "warning", path.name, message, "keep one of the two")


def _chat_tokens(model: Model) -> list[str]:
    data = model.json("tokenizer.json")
    added = data.get("added_tokens") if isinstance(data, dict) else None
    contents = [token.get("content") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [token for token in _CHAT_TOKENS if token in contents]


def generation_config(model: Model) -> Iterator[Finding]:
    """It lists every end token and the sampling defaults; without it servers go on past the end of a turn."""
    if model.config and "generation_config.json" not in model.files:
        message = "it is missing: end tokens and sampling defaults of the original are lost"
        yield found(
            "generation-config", "warning", "generation_config.json", message, "copy it from the original model"
        )


def ties(model: Model) -> Iterator[Finding]:
    """The tie flag must agree with the tensors: both, or neither."""
    if not model.config or not model.tensors:
        return
    heads = [layer for name, layer in model.layers.items() if layer.last in HEADS]
    tied = model.text_config.get("tie_word_embeddings", model.config.get("tie_word_embeddings"))
    if tied is None:
        tied = _tied_by_default(model.config.get("model_type"))
    if tied is False and not heads and _embedding(model) is not None:
        message = "tie_word_embeddings is false, and there is no lm_head: it would be random"
        yield found("tied-head", "error", "config.json", message, "set tie_word_embeddings to true, or add the head")
    for head in heads if tied else []:
        info = head.info()
        if head.quantized:
            message = "the head is quantized and tied: one of the two is not what is served"
            yield found("tied-head", "error", info, message, "set tie_word_embeddings to false, or remove the head")
        elif (embedding := _embedding(model)) is not None and "weight" in head.parts:
            same = _equal(embedding, head.parts["weight"])
            message = "the head is stored although it is tied" + ("" if same else ", and it differs from the embedding")
            level: Level = "info" if same else "error"
            yield found("tied-head", level, info, message, "remove it, or set tie_word_embeddings to false")


def _tied_by_default(model_type: Any) -> bool | None:
    from transformers import CONFIG_MAPPING  # imported where it is needed: it takes a second

    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    return getattr(CONFIG_MAPPING[model_type], "tie_word_embeddings", None)


def _embedding(model: Model) -> TensorInfo | None:
    for name, info in model.tensors.items():
        if name.endswith(".weight") and name.split(".")[-2] in _EMBEDDINGS and len(info.shape) == 2:
            return info
    return None


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for start in range(0, one.shape[0], _PIECE_ROWS):
        stop = min(start + _PIECE_ROWS, one.shape[0])
        a, b = (read_tensor(info, start, stop) for info in (one, other))
        if not torch.equal(bytes_of(a), bytes_of(b)):
            return False
    return True


def missing_layers(model: Model) -> Iterator[Finding]:
    """Layers that config.json promises, and draft layers (multi-token prediction) that quantizers drop."""
    depth, draft = model.text_config.get("num_hidden_layers"), model.text_config.get("num_nextn_predict_layers")
    numbers = {number for name in model.tensors if (number := number_of(name)) is not None}
    if type(depth) is not int or not numbers:
        return
    absent = [number for number in range(min(depth, 100_000)) if number not in numbers]
    if absent:
        message = f"num_hidden_layers is {depth}, and there are no tensors of layer {quoted([str(n) for n in absent])}"
        yield found("missing-layers", "error", "config.json", message, "fetch the missing shards")
    has_draft = any("mtp" in name or (number_of(name) or 0) >= depth for name in model.tensors)
    if type(draft) is int and draft > 0 and not has_draft:
        message = f"num_nextn_predict_layers is {draft}, and the draft layers are not there"
        fix = "copy them from the original model, or set it to 0"
        yield found("missing-layers", "warning", "config.json", message, fix)


def missing_experts(model: Model) -> Iterator[Finding]:
    """Experts that config.json promises: a loader fills absent ones with random numbers."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    wanted = next((n for key in keys if type(n := model.text_config.get(key)) is int), 0)
    there: dict[str, set[int]] = {}
    for name in model.layers:
        place, _, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        if number.isascii() and number.isdigit() and len(number) < 7:
            there.setdefault(f"{place}.experts", set()).add(int(number))
    for place, numbers in there.items():
        absent = [str(number) for number in range(min(wanted, 100_000)) if number not in numbers]
        if absent:
            message = f"{wanted} experts are promised, and {place} has no expert {quoted(absent)}"
            yield found("missing-layers", "error", "config.json", message, "fetch the missing shards")


def leftovers(model: Model) -> Iterator[Finding]:
    """Older quantization files that contradict config.json."""
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        data = model.json(name)
        inner = data.get("quantization", data) if isinstance(data, dict) else None
        if not isinstance(inner, dict):
            continue
        if not model.quantization:
            message = "config.json has no quantization_config; only some engines read this file"
            yield found("leftover", "warning", name, message, "put it into config.json as quantization_config")
        for key in ("bits", "group_size", "desc_act", "sym"):
            if key in inner and key in model.quantization and inner[key] != model.quantization[key]:
                message = f"{key} is {inner[key]!r} here and {model.quantization[key]!r} in config.json"
                yield found("leftover", "error", name, message, f"rm {name}")

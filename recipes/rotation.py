"""Rotate a model's checkpoint: what to do to which tensor, and the proof that the model stays what it was.

Every distinct block structure is looked at once (`infopt.calibration.residual`, `infopt.calibration.heads`). Before anything is
written, the blocks and the outer parts of the rotated checkpoint are run beside the original's in float32: with x Q where the
original is given x, a block must answer y Q where the original answers y, the embedding e Q for e, the head the same logits.

Legend: B batch, T tokens, C hidden width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infopt.calibration.discover import PROOF_SHAPE, discover, structure_key
from infopt.calibration.heads import find_attention
from infopt.calibration.residual import find_residual, law_of
from infopt.checkpoint import CheckpointReader
from infopt.errors import Unsupported
from infopt.exporters.folder import model_config
from infopt.hadamard import rotation
from infopt.heads import Attention
from infopt.memory import release
from infopt.model import Skeleton
from infopt.residual import Residual
from infopt.rewriters.rotate import Change, Rotated

TOLERANCE = 1e-4  # relative, float32
_ADDED = 1e-3  # of its input: a block that adds less is compared as if it added so much
_FIX = "leave --rotate out for this model"


@dataclass(frozen=True)
class _Found:
    """One block structure: who reads and writes the stream; its heads, None (and the reason) where values are left alone."""

    residual: Residual
    heads: Attention | None
    reason: str


def rotated(reader: CheckpointReader, seed: int) -> Rotated:
    """The checkpoint with its residual stream and its values rotated, proven; tensors in their stored types.

    Raises Unsupported, with the reason, for a model that a rotation would change.
    """
    skeleton = Skeleton(model_config(reader.config), reader)
    _check_whole(skeleton, reader)
    structures, of_block = _look(skeleton)
    widths = {found.heads.value.channels.shape[1] for found in structures.values() if found.heads}
    if len(widths) > 1:
        raise Unsupported(f"the blocks' heads have {sorted(widths)} channels", "one rotation serves all heads", _FIX)
    stream = rotation(skeleton.width, seed)
    head = rotation(widths.pop(), seed + 1) if widths else None
    changes = _outer(skeleton)
    for i, key in enumerate(of_block):
        changes |= _block(skeleton, i, structures[key])
    exact = Rotated(reader.folder, changes, stream, head, exact=True)
    errors = _prove(skeleton, exact, {key: of_block.index(key) for key in structures})
    left = {skeleton.blocks[of_block.index(key)]: found.reason for key, found in structures.items() if not found.heads}
    report = {
        "seed": seed,
        "residual": {"channels": stream.size, "matrix": stream.construction},
        "values": {"channels": head.size, "matrix": head.construction} if head else None,
        "values_left_alone": left,
        "errors": errors,
    }
    release()
    return Rotated(reader.folder, changes, stream, head, report=report)


def summary(reader: CheckpointReader) -> dict[str, Any]:
    """What infopt.json says of a rotated source; nothing of another."""
    return {"rotation": reader.report, "added": reader.added} if isinstance(reader, Rotated) else {}


def changed_by(reader: CheckpointReader) -> list[str]:
    """The tensors that a rotated source has otherwise than the checkpoint, or that only it has."""
    return sorted(reader.changes) if isinstance(reader, Rotated) else []


def tell(reader: CheckpointReader) -> Iterator[str]:
    """Lines for the user about a rotated source."""
    if not isinstance(reader, Rotated):
        return
    report = reader.report
    values = report["values"]
    said = f"; values of {values['channels']} ({values['matrix']})" if values else ""
    worst = max(report["errors"].values())
    residual = report["residual"]
    yield (
        f"rotated: residual stream of {residual['channels']} channels ({residual['matrix']}){said}; "
        f"proven to {worst:.0e}"
    )
    for block, reason in report["values_left_alone"].items():
        yield f"note: blocks like {block}: values are not rotated ({reason})"
    if reader.added:
        yield f"note: {', '.join(reader.added)} was tied to the embedding and is a tensor of its own now"


# Looking


def _look(skeleton: Skeleton) -> tuple[dict[Hashable, _Found], list[Hashable]]:
    """(what was found, by structure; the structure of every block)."""
    found: dict[Hashable, _Found] = {}
    keys = [structure_key(skeleton.model.get_submodule(name)) for name in skeleton.blocks]
    for i, key in enumerate(keys):
        if key not in found:
            skeleton.load_block(i)
            try:
                residual = find_residual(skeleton, i)
                heads, reason = _heads(skeleton, i)
                found[key] = _Found(residual, heads, reason)
            finally:
                skeleton.free_block(i)
    return found, keys


def _heads(skeleton: Skeleton, i: int) -> tuple[Attention | None, str]:
    try:
        heads = find_attention(skeleton, i, discover(skeleton, i))
    except Unsupported as error:
        return None, error.why or error.what
    return heads, "" if heads else "it has no attention"


def _check_whole(skeleton: Skeleton, reader: CheckpointReader) -> None:
    for path, reason in skeleton.stacked.items():
        raise Unsupported(f"{path}: its experts cannot be rotated", reason, _FIX)
    for key in skeleton.extra_keys():
        if len(reader.tensors[key].shape) > 1:
            raise Unsupported(
                f"{key} is a matrix that the model's definition does not use",
                "whether it reads the residual stream cannot be found out, and it would be wrong if it did",
                _FIX,
            )


# What becomes of each tensor


def _block(skeleton: Skeleton, i: int, found: _Found) -> dict[str, Change]:
    block = skeleton.model.get_submodule(skeleton.blocks[i])
    residual, heads = found.residual, found.heads
    changes: dict[str, Change] = {}
    for norm, law in residual.norms.items():
        changes[_key(skeleton, i, f"{norm}.weight")] = Change(neutral=law)
    values = heads.value.op if heads else None
    out = heads.out if heads else None
    for name in dict.fromkeys((*residual.readers, *residual.writers, *filter(None, (values, out)))):
        read = residual.readers.get(name)
        writes = name in residual.writers
        rows = heads.value.channels if heads and name == values else None
        changes[_key(skeleton, i, f"{name}.weight")] = Change(
            norm=(_key(skeleton, i, f"{read}.weight"), residual.norms[read]) if read else None,
            reads=name in residual.readers,
            writes=writes,
            values=rows,
            heads=len(heads.group) if heads and name == out else 0,
        )
        if (writes or rows is not None) and _has_bias(block.get_submodule(name)):
            changes[_key(skeleton, i, f"{name}.bias")] = Change(writes=writes, values=rows)
    return changes


def _has_bias(module: nn.Module) -> bool:
    return "bias" in dict(module.named_parameters(recurse=False))


def _key(skeleton: Skeleton, i: int, path: str) -> str:
    try:
        return skeleton.tensor_key(i, path)
    except Unsupported as error:
        raise Unsupported(error.what, error.why, _FIX) from error


def _outer(skeleton: Skeleton) -> dict[str, Change]:
    """The embedding, the final norm and the head; Unsupported for anything else outside the blocks."""
    model = skeleton.model
    inside = tuple(f"{block}." for block in skeleton.blocks)
    own = {
        name: module
        for name, module in model.named_modules()
        if not name.startswith(inside) and any(True for _ in module.parameters(recurse=False))
    }
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    others = {name: module for name, module in own.items() if module is not embedding and module is not head}
    (final, norm), *more = others.items() or [("", None)]
    if more or norm is None or not isinstance(head, nn.Linear):
        raise Unsupported(
            f"outside its blocks the model has {', '.join(others) or 'no norm'} beside embedding and head",
            "a rotation is known to pass an embedding, one norm and a linear head",
            _FIX,
        )
    with skeleton.outer_loaded():
        law = law_of(norm, skeleton.width)
        tied = head.weight is model.get_input_embeddings().weight
    if law is None:
        raise Unsupported(
            f"the final norm {final} ({type(norm).__name__}) is no RMS norm without a bias",
            "only x / rms(x) times a weight commutes with a rotation; a LayerNorm also takes the mean away",
            _FIX,
        )
    names = {id(module): f"{name}.weight" for name, module in own.items()}
    keys = skeleton.outer_sources()
    at_embedding, at_norm = (_one(keys, names[id(module)]) for module in (embedding, norm))
    at_head = names[id(head)] if tied else _one(keys, names[id(head)])
    return {
        at_embedding: Change(reads=True),
        at_norm: Change(neutral=law),
        at_head: Change(norm=(at_norm, law), reads=True, source=at_embedding if tied else None),
    }


def _one(keys: dict[str, list[str]], name: str) -> str:
    if len(keys.get(name, ())) != 1:
        raise Unsupported(f"{name} is not stored as one tensor of its own", "it could not be replaced", _FIX)
    return keys[name][0]


# The proof


@torch.no_grad()
def _prove(skeleton: Skeleton, exact: Rotated, first: dict[Hashable, int]) -> dict[str, float]:
    """The relative error of each part of the rotated model, at most TOLERANCE; Unsupported where it is larger."""
    turned = Skeleton(model_config(exact.config), exact)
    generator = torch.Generator().manual_seed(exact.stream.size)
    x_BTC = torch.randn(*PROOF_SHAPE, skeleton.width, generator=generator)
    ids_BT = torch.randint(1, skeleton.config.get_text_config().vocab_size, PROOF_SHAPE, generator=generator)

    def turn(hidden_BTC: Tensor) -> Tensor:
        return exact.stream(hidden_BTC).float()

    with skeleton.outer_loaded():
        wanted = turn(skeleton.embed(ids_BT)), skeleton.logits(x_BTC)
    with turned.outer_loaded():
        given = turned.embed(ids_BT), turned.logits(turn(x_BTC))
    errors = {"embedding": _error(wanted[0], given[0]), "head": _error(wanted[1], given[1])}
    for i in first.values():
        call = skeleton.calls(*PROOF_SHAPE)[i]
        y_BTC = call.run(skeleton.load_block(i), x_BTC)
        skeleton.free_block(i)
        answer_BTC = call.run(turned.load_block(i), turn(x_BTC))
        turned.free_block(i)
        # What the block adds to its input: the input itself would hide an error. Its own rounding counts where that is little.
        floor = _ADDED * float(x_BTC.norm())
        errors[skeleton.blocks[i]] = _error(turn(y_BTC - x_BTC), answer_BTC - turn(x_BTC), floor)
    for name, error in errors.items():
        if not error <= TOLERANCE:
            raise Unsupported(
                f"{name}: the rotated model computes something else (relative error {error:.0e})",
                "something reads or writes the residual stream, or mixes a head's channels, in a way that was not found",
                _FIX,
            )
    return errors


def _error(wanted: Tensor, given: Tensor, floor: float = 1e-30) -> float:
    return float((given - wanted).norm() / wanted.norm().clamp(min=floor))

"""Who reads and who writes a block's residual stream, found by putting tensors of ours where layers answer.

With every layer that could write the stream made to answer zero, the stream is the block's input from end to end. Then

    a norm reads it     whose input is the block's input; it must commute with orthogonal maps once its weight is neutral:
                        an RMS norm does, a LayerNorm takes the mean away and does not
    a layer reads it    whose input is what we let a norm answer (random numbers, others for each norm), or the block's input
    a layer writes it   that, made to answer one vector for every token, moves the block's output along that vector; along
                        another means that something with weights of its own comes after it (a norm after the layer)

No layer is known by its name. What is found here is a suggestion; `infopt.recipes.rotation` proves the rotated block.

Legend: B batch, T tokens, C hidden width, X anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from infopt.calibration.discover import PROOF_SHAPE
from infopt.errors import Unsupported
from infopt.model import BlockCall, Skeleton
from infopt.residual import NEUTRAL, Residual
from infopt.topology import Law

SEED = 20250901
_TOLERANCE = 1e-4  # relative, float32
_LAWS: tuple[Law, ...] = ("mul", "one_plus")


@torch.no_grad()
def find_residual(skeleton: Skeleton, i: int) -> Residual:
    """The readers and writers of block i's residual stream. The block must be loaded; its weights end unchanged.

    Raises Unsupported, with the reason, for a block whose stream cannot be rotated.
    """
    name = skeleton.blocks[i]
    look = _Look(skeleton.model.get_submodule(name), skeleton.calls(*PROOF_SHAPE)[i], skeleton.width, name)
    norms = look.norms()
    readers = look.readers(norms)
    return Residual(norms, readers, look.writers(set(readers)))


@torch.no_grad()
def law_of(norm: nn.Module, width: int) -> Law | None:
    """How an RMS norm multiplies by its weight; None where it is no RMS norm, or has a bias. The weight ends unchanged."""
    parameters = dict(norm.named_parameters())
    if set(parameters) != {"weight"} or tuple(parameters["weight"].shape) != (width,):
        return None
    weight_C = parameters["weight"].data
    generator = torch.Generator().manual_seed(SEED)
    x_XC = torch.randn(16, width, generator=generator) + 0.5
    v_C = torch.nn.functional.normalize(torch.randn(width, generator=generator) + 0.5, dim=0)
    other_C = torch.rand(width, generator=generator) + 0.5
    kept = weight_C.clone()
    try:
        for law in _LAWS:
            weight_C.fill_(NEUTRAL[law])
            plain, mirrored = norm(x_XC), norm(_mirror(x_XC, v_C))
            weight_C.copy_(other_C)
            scaled = norm(x_XC)
            factor_C = other_C + 1 if law == "one_plus" else other_C
            if _close(mirrored, _mirror(plain, v_C)) and _close(scaled, plain * factor_C):
                return law
    finally:
        weight_C.copy_(kept)
    return None


class _Look:
    """One block, run again and again with some layers' answers replaced."""

    def __init__(self, block: nn.Module, call: BlockCall, width: int, name: str) -> None:
        self.block, self.call, self.width, self.name = block, call, width, name
        self.generator = torch.Generator().manual_seed(SEED)
        self.hidden_BTC = self._random(*PROOF_SHAPE, width)
        self.own = {path: m for path, m in block.named_modules() if any(True for _ in m.parameters(recurse=False))}
        self.might_write = [
            path for path, m in self.own.items() if isinstance(m, nn.Linear) and m.out_features == width
        ]

    def norms(self) -> dict[str, Law]:
        """The norms that read the stream, with their laws."""
        inputs, _ = self._run({})
        found: dict[str, Law] = {}
        for path, seen in inputs.items():
            if max(p.dim() for p in self.own[path].parameters(recurse=False)) > 1 or not self._is_stream(seen):
                continue
            law = law_of(self.own[path], self.width)
            if law is None:
                raise self._refused(
                    f"its norm {path} ({type(self.own[path]).__name__}) is no RMS norm without a bias",
                    "only x / rms(x) times a weight commutes with a rotation; a LayerNorm also takes the mean away",
                )
            found[path] = law
        return found

    def readers(self, norms: Mapping[str, Law]) -> dict[str, str | None]:
        """The layers that read the stream, each with its norm."""
        answers: dict[str | None, Tensor] = {norm: self._random(*PROOF_SHAPE, self.width) for norm in norms}
        inputs, _ = self._run({norm: answer for norm, answer in answers.items() if norm})
        answers[None] = self.hidden_BTC
        found: dict[str, str | None] = {}
        for path, seen in inputs.items():
            if path in norms:
                continue
            sources = [norm for norm, answer in answers.items() if self._reads(seen, answer)]
            if sources:
                weight = dict(self.own[path].named_parameters(recurse=False)).get("weight")
                if weight is None or weight.dim() != 2 or weight.shape[1] != self.width:
                    raise self._refused(
                        f"{path} reads it and is no layer with a matrix [O, {self.width}]",
                        f"its parameters are {', '.join(n for n, _ in self.own[path].named_parameters(recurse=False))}",
                    )
                found[path] = sources[0]
        for path in self.own:  # experts that no token reached are like those that some token did
            twins = [other for other in found if _role(other) == _role(path)]
            if twins and path not in inputs:
                found[path] = found[twins[0]]
        return found

    def writers(self, readers: set[str]) -> tuple[str, ...]:
        """The layers whose answers are added to the stream."""
        _, quiet_BTC = self._run({})
        if not _close(quiet_BTC, self.hidden_BTC):
            raise self._refused(
                "something else than its linear layers writes it",
                "with all of them silent, the block does not answer what it was given",
            )
        roles: dict[str, list[str]] = {}
        for path in self.might_write:
            if path not in readers:
                roles.setdefault(_role(path), []).append(path)
        found: list[str] = []
        for paths in roles.values():
            r_C = self._random(self.width)
            _, answer_BTC = self._run(dict.fromkeys(paths, r_C))
            moved_BTC = answer_BTC - self.hidden_BTC
            if float(moved_BTC.norm()) <= _TOLERANCE * float(self.hidden_BTC.norm()):
                continue
            along_BTC = (moved_BTC @ r_C)[..., None] / r_C.dot(r_C) * r_C
            if not _close(along_BTC, moved_BTC):
                raise self._refused(
                    f"what {paths[0]} answers is changed before it is added to the stream",
                    "a norm with weights of its own, or the like, comes after the layer, and no rotation passes it",
                )
            found += paths
        return tuple(found)

    def _run(self, answers: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """(the first input of every module with parameters, the block's output) with these modules' answers replaced, and
        every other layer that might write made to answer zero."""
        inputs: dict[str, Tensor] = {}
        silent = {path: torch.zeros(()) for path in self.might_write}
        with (
            _watched(self.own, inputs),
            _answering({p: self.own[p] for p in (*silent, *answers)}, silent | {**answers}),
        ):
            return inputs, self.call.run(self.block, self.hidden_BTC)

    def _is_stream(self, seen: Tensor) -> bool:
        return seen.numel() == self.hidden_BTC.numel() and torch.equal(seen.reshape(-1, self.width), self._tokens())

    def _tokens(self) -> Tensor:
        return self.hidden_BTC.reshape(-1, self.width)

    def _reads(self, seen: Tensor, answer_BTC: Tensor) -> bool:
        """Whether every token of an input is one of these (an expert reads some of them)."""
        if seen.shape[-1] != self.width or not seen.numel():
            return False
        tokens_XC = answer_BTC.reshape(-1, self.width)
        same = seen.reshape(-1, 1, self.width) == tokens_XC
        return bool(same.all(-1).any(-1).all())

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _refused(self, what: str, why: str) -> Unsupported:
        return Unsupported(
            f"{self.name}: its residual stream cannot be rotated: {what}", why, "leave --rotate out for this model"
        )


@contextmanager
def _watched(modules: Mapping[str, nn.Module], inputs: dict[str, Tensor]) -> Iterator[None]:
    def note(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(path, args[0].clone())

        return hook

    with _hooks([module.register_forward_pre_hook(note(path)) for path, module in modules.items()]):
        yield


@contextmanager
def _answering(modules: Mapping[str, nn.Module], answers: Mapping[str, Tensor]) -> Iterator[None]:
    def put(answer: Tensor) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
            same = answer.numel() == out.numel()
            return (answer.reshape(out.shape) if same else answer.expand(out.shape)).to(out.dtype).clone()

        return hook

    with _hooks([module.register_forward_hook(put(answers[path])) for path, module in modules.items()]):
        yield


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _role(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def _mirror(x_XC: Tensor, v_C: Tensor) -> Tensor:
    """A reflection: orthogonal, and it mixes all channels."""
    return x_XC - 2 * (x_XC @ v_C)[:, None] * v_C


def _close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm()) <= _TOLERANCE * float(other.norm())

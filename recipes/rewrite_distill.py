"""End-to-end distillation: gradient steps that bring a rewritten model's predictions back to the original's.

Healing by blocks (`infopt.rewriters.heal`) brings hidden states back, channel by channel; what the model predicts from them is
not asked. Here the whole model is trained on it: the mean over tokens of KL(p || q), p the original's next-token distribution
and q the rewritten model's (Hinton et al. 2015, at temperature 1), by Adam, every weight of the blocks, no LoRA; embedding and
head stay. Both models are in memory whole, in float32, with the gradients and two moments of the trained one: the one part
of infopt for which that is so. accelerate runs the steps.

Every eighth window is held out; where its KL is not lower after the steps than before, nothing is kept. The state is saved
every few steps, and a killed run goes on from there to the same bytes: which windows a step sees follows from its number.

Legend: N windows, B windows of a step, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from infopt.errors import BadInput
from infopt.header import read_header
from infopt.model import Skeleton
from infopt.output import write_safetensors
from infopt.rewriters.heal import BETAS, StepCost, checkpointed, compared, rate, trainable

_STEP_TOKENS = 1024
_HELD_OUT = 8
_SAVE_EVERY = 16


@dataclass(frozen=True)
class Distilled:
    """The held-out KL before and after, the training KL of each step, the tokens of all; `kept`: whether it became lower."""

    before: float
    after: float
    kept: bool
    tokens: int
    losses: list[float]


class Distillation:
    """`student` learns to predict what `teacher` predicts on `windows_NT`; both are loaded whole here.

    parameters: the student's that learn, by any names. state: the file that a later run goes on from, where its fingerprint is
    this one.
    """

    def __init__(
        self,
        teacher: Skeleton,
        student: Skeleton,
        windows_NT: Tensor,
        parameters: dict[str, nn.Parameter],
        state: Path,
        fingerprint: str,
    ) -> None:
        self._teacher, self._student, self._parameters = teacher, student, parameters
        self._state, self._fingerprint = state, fingerprint
        is_held_N = torch.arange(len(windows_NT)) % _HELD_OUT == _HELD_OUT - 1
        alone = not is_held_N.any()  # too few windows to hold one out
        self._held_NT = windows_NT if alone else windows_NT[is_held_N]
        self._train_NT = windows_NT if alone else windows_NT[~is_held_N]
        self._each = max(1, _STEP_TOKENS // windows_NT.shape[1])

    def __call__(
        self, steps: int, lr: float, checkpointing: bool, on_step: Callable[[int, float], None] | None = None
    ) -> Distilled:
        """Train in place. on_step(step, its KL) is called after each step of this run, from 1 on."""
        parameters = list(self._parameters.values())
        optimizer = torch.optim.Adam(parameters, lr=lr, betas=BETAS, fused=True)
        accelerator = Accelerator(cpu=True)
        optimizer = accelerator.prepare(optimizer)
        losses: list[float] = []
        resumed = self._resume(optimizer.state)
        before, losses = resumed or (self._held_out(), [])
        with trainable(parameters), self._checkpointed(checkpointing):
            for step in range(len(losses), steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate(step, steps)
                losses.append(self._backward(self._windows(step), accelerator.backward))
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if on_step:
                    on_step(step + 1, losses[-1])
                if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
                    self._save(optimizer.state, before, losses)
        after = self._held_out()
        tokens = steps * self._each * self._train_NT.shape[1]
        return Distilled(before, after, after < before, tokens, losses)  # not kept where it is NaN

    def costs(self) -> list[StepCost]:
        """Of one window, without and with checkpointing; nothing is changed."""
        with trainable(self._parameters.values()):
            window_1T = self._windows(0)[:1]
            return compared(
                lambda: self._backward(window_1T, Tensor.backward), lambda: self._checkpointed(True), turns=2
            )

    def _checkpointed(self, wanted: bool) -> Any:
        """Each block forgets what it computed, where wanted."""
        blocks = self._student.model.get_submodule(self._student.blocks[0].rpartition(".")[0])
        return checkpointed(blocks) if wanted else nullcontext()

    def _windows(self, step: int) -> Tensor:
        first = step * self._each
        return self._train_NT[[(first + i) % len(self._train_NT) for i in range(self._each)]]

    @torch.enable_grad()
    def _backward(self, windows_BT: Tensor, backward: Callable[[Tensor], None]) -> float:
        """Window by window, so that the logits of one at a time are in memory; the mean KL."""
        total = 0.0
        for window_1T in windows_BT.split(1):
            loss = self._kl(window_1T) / len(windows_BT)
            backward(loss)
            total += float(loss.detach())
        return total

    def _kl(self, window_1T: Tensor) -> Tensor:
        with torch.no_grad():
            log_p_TV = self._teacher.model(input_ids=window_1T, use_cache=False).logits[0].float().log_softmax(-1)
        log_q_TV = self._student.model(input_ids=window_1T, use_cache=False).logits[0].float().log_softmax(-1)
        return nn.functional.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def _held_out(self) -> float:
        return sum(float(self._kl(window_1T)) for window_1T in self._held_NT.split(1)) / len(self._held_NT)

    # Resume

    def _save(self, moments: dict[Any, dict[str, Any]], before: float, losses: list[float]) -> None:
        tensors = {f"value.{name}": p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            tensors |= {f"{key}.{name}": moments[parameter][key] for key in ("exp_avg", "exp_avg_sq")}
        said = {"fingerprint": self._fingerprint, "before": before, "losses": losses}
        write_safetensors(self._state, tensors, {"distillation": json.dumps(said)})

    def _resume(self, moments: dict[Any, dict[str, Any]]) -> tuple[float, list[float]] | None:
        """Put parameters and moments back; (the held-out KL before, the KL of the steps), None without a usable state."""
        if not self._state.is_file():
            return None
        try:
            infos, metadata = read_header(self._state)
            said = json.loads(metadata.get("distillation", "{}"))
        except (BadInput, ValueError):
            return None
        shapes = {f"{kind}.{name}": tuple(p.shape) for kind in ("value", "exp_avg", "exp_avg_sq")
                  for name, p in self._parameters.items()}  # fmt: skip
        if said.get("fingerprint") != self._fingerprint or {n: tuple(i.shape) for n, i in infos.items()} != shapes:
            return None
        tensors = load_file(self._state)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"value.{name}"])
                moments[parameter] = {key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
                moments[parameter]["step"] = torch.tensor(float(len(said["losses"])))
        return float(said["before"]), list(said["losses"])

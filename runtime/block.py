"""One decoder block in as few operations as torch allows, put in a block's place after a proof that it computes the same.

    x = h + o(attention(rope(qk_norm(qkv(norm(h))))))          q, k, v are one matrix, gate and up another
    h' = x + down(act(gate(norm(x))) * up(norm(x)))

This is the common block: RMS norms before two branches, rotary angles on whole heads, a gated MLP. It is recognised by the
names that transformers gives such parts, and believed only after `proven`: block and copy must answer the same on random
hidden states, for a whole text and for a token that follows one from the cache, up to the order of fp32 sums. A block
that is another one (scaled residuals, norms after the branches, partial or interleaved angles, soft caps) fails, and stays.

At batch 1 a block of a small model costs about as much in calls as in arithmetic; this has a third of the calls. A token
that follows a text attends to each text's own keys alone, unpadded and, where pages are neighbours, uncopied.

Legend: B texts, Q new tokens, C width, H heads, Hq of queries, Hk of keys, D channels of a head, O and I of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infopt import kernels
from infopt.kernels.cpu import Precision
from infopt.kernels.cuda.linear import CudaLinear
from infopt.kernels.native import PackedWeight
from infopt.kv_cache import with_cache
from infopt.model import BlockCall
from infopt.qtensor import QTensor
from infopt.runtime.paged import PagedCache, Step
from infopt.runtime.store import LayerKind

TOLERANCE = 2e-5  # relative to the largest value; fp32
PROOF_TOKENS = 6
_QKV = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.qkv_proj",))
_GATE_UP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.gate_up_proj",))
_NORMS = ("input_layernorm", "post_attention_layernorm")
ODD = (AttributeError, TypeError, ValueError, LookupError, RuntimeError)
Codes = Callable[[str], QTensor | None]  # an op's path in the block -> its codes, None for a float weight


@dataclass(frozen=True)
class Norm:
    """RMS norm with the weight that multiplies."""

    weight_C: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight_C.shape, self.weight_C, self.eps)


@dataclass(frozen=True)
class Linear:
    """Layers that read the same, as one. nbytes: of the weights as they are kept. kernels: what runs. weight, bias_O: of the
    whole, where it is one weight of the C++ or of a GPU."""

    multiply: Callable[[Tensor], Tensor]
    nbytes: int
    kernels: tuple[str, ...]
    weight: PackedWeight | CudaLinear | None = None
    bias_O: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class Angles:
    """The cosines and signed sines of one pass, made by the first block that asks and shared by the others."""

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Tensor] | None = None
        self._made: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def __call__(self, cos_BQD: Tensor, sin_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, Q, 1, D] each; the first half of the sines is negative, for heads whose halves have changed places."""
        if self._asked is None or self._asked[0] is not cos_BQD or self._asked[1] is not sin_BQD:
            low, high = sin_BQD.chunk(2, dim=-1)
            self._made = cos_BQD[:, :, None], torch.cat((low.neg(), high), dim=-1)[:, :, None]
            self._asked = (cos_BQD, sin_BQD)
        return self._made


class FusedBlock(nn.Module):
    """See the module. `block` gives the parts and keeps nothing; codes: of its quantized ops; angles: shared by the blocks of
    a model. Raises one of `ODD` for a block of another shape."""

    def __init__(
        self, block: nn.Module, layer: int, codes: Codes, precision: Precision, angles: Angles | None = None
    ) -> None:
        super().__init__()
        self.angles = angles or Angles()
        attention: Any = block.get_submodule("self_attn")
        config = attention.config
        self.layer = layer
        self.heads: tuple[int, int] = (config.num_attention_heads, config.num_key_value_heads)
        self.width, self.scaling = int(attention.head_dim), float(attention.scaling)
        self.norm, self.mlp_norm = (rms_norm(block.get_submodule(name)) for name in _NORMS)
        self.head_norms = self._head_norms(attention)
        self.qkv = join(block, _names(block, _QKV), codes, precision)
        self.o = join(block, ("self_attn.o_proj",), codes, precision)
        mlp: Any = block.get_submodule("mlp")
        self.act: nn.Module = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn
        names = _names(block, _GATE_UP)
        self._gated = join_gated(block, names, codes, self.act) if precision == "packed" else None
        self.gate_up = self._gated or join(block, names, codes, precision)
        self.down = join(block, ("mlp.down_proj",), codes, precision)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def packed_bytes(self) -> int:
        """Of the weights as they are kept."""
        return sum(linear.nbytes for linear in self.linears)

    def _head_norms(self, attention: Any) -> tuple[Norm, Norm] | None:
        if not hasattr(attention, "q_norm"):
            return None
        norms = rms_norm(attention.q_norm), rms_norm(attention.k_norm)
        if any(norm.weight_C.numel() != self.width for norm in norms):
            raise ValueError("the norm of queries is not one of heads")
        return norms

    def forward(
        self,
        hidden_BQC: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Tensor:
        """The next hidden states; the arguments are those of the block."""
        if position_embeddings is None:
            raise ValueError("a block with rotary angles was called without them")
        q_BQHD, k_BQHD, v_BQHD = self._heads(self.norm(hidden_BQC), *position_embeddings)
        if past_key_values is not None and hidden_BQC.shape[1] == 1:
            a_BQC = self._next(q_BQHD, k_BQHD, v_BQHD, past_key_values)
        else:
            a_BQC = self._whole(q_BQHD, k_BQHD, v_BQHD, attention_mask, past_key_values)
        hidden_BQC = self.o(a_BQC).add_(hidden_BQC)
        return self.down(self.gated(self.mlp_norm(hidden_BQC))).add_(hidden_BQC)

    def gated(self, x: Tensor, product: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """act(gate) * up of a normed x. product: how it is made of [gate | up], where the weight's kernel does not do it."""
        if self._gated is not None:
            return self._gated(x)
        if product is not None:
            return product(self.gate_up(x))
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.act(gate).mul_(up)

    def _heads(self, x_BQC: Tensor, cos_BQD: Tensor, sin_BQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values; [B, Q, H, D]."""
        queries, keys = self.heads
        qkv_BQHD = self.qkv(x_BQC).view(*x_BQC.shape[:2], queries + 2 * keys, self.width)
        qk_BQHD = qkv_BQHD[:, :, : queries + keys]
        if self.head_norms is not None:
            q_norm, k_norm = self.head_norms
            qk_BQHD = torch.cat((q_norm(qk_BQHD[:, :, :queries]), k_norm(qk_BQHD[:, :, queries:])), dim=2)
        cos_BQ1D, sin_BQ1D = self.angles(cos_BQD, sin_BQD)
        turned_BQHD = torch.cat((qk_BQHD[..., self.width // 2 :], qk_BQHD[..., : self.width // 2]), dim=-1)
        qk_BQHD = turned_BQHD.mul_(sin_BQ1D).addcmul_(qk_BQHD, cos_BQ1D)
        return qk_BQHD[:, :, :queries], qk_BQHD[:, :, queries:], qkv_BQHD[:, :, queries + keys :]

    def _next(self, q_BQHD: Tensor, k_BQHD: Tensor, v_BQHD: Tensor, step: Step) -> Tensor:
        """One token of each text: nothing that was read is hidden from it, so no mask. The queries of a group of heads are
        rows of one product with their keys."""
        step.store(k_BQHD[:, 0], v_BQHD[:, 0], self.layer)
        groups = (1, self.heads[1], -1, self.width)
        parts = [
            F.scaled_dot_product_attention(q_1HD.view(groups), k_1HKD, v_1HKD, scale=self.scaling)
            for q_1HD, (k_1HKD, v_1HKD) in zip(q_BQHD, step.each(self.layer), strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(len(parts), 1, -1)

    def _whole(self, q_BQHD: Tensor, k_BQHD: Tensor, v_BQHD: Tensor, mask: Tensor | None, step: Step | None) -> Tensor:
        """Several tokens of each text; mask: as transformers made it, None for a whole text."""
        k_BHKD, v_BHKD = k_BQHD.transpose(1, 2), v_BQHD.transpose(1, 2)
        if step is not None:
            k_BHKD, v_BHKD = step.update(k_BHKD, v_BHKD, self.layer)
        a_BHQD = F.scaled_dot_product_attention(
            q_BQHD.transpose(1, 2), k_BHKD, v_BHKD, attn_mask=mask, is_causal=mask is None, scale=self.scaling,
            enable_gqa=True,
        )  # fmt: skip
        return a_BHQD.transpose(1, 2).flatten(-2)


def join(block: nn.Module, names: Sequence[str], codes: Codes, precision: Precision) -> Linear:
    """Readers of one space as one linear layer, their outputs side by side; one after the other where they differ in kind."""
    modules: list[Any] = [block.get_submodule(name) for name in names]
    found = [codes(name) for name in names]
    bias_O = _joined([getattr(module, "bias", None) for module in modules], modules)
    if all(q is None for q in found):
        w_OI = torch.cat([module.weight for module in modules]) if len(modules) > 1 else modules[0].weight
        if not all(type(module) is nn.Linear for module in modules):
            raise ValueError("a linear layer of another kind")
        if precision == "packed" and w_OI.device.type != "cpu":
            return _half(w_OI, bias_O)
        return Linear(lambda x: F.linear(x, w_OI, bias_O), w_OI.nbytes, ("float",))
    whole = _one(found)
    if whole is not None:
        prepared = kernels.prepare(whole, precision)
        weight = prepared if isinstance(prepared, CudaLinear) else getattr(prepared, "weight", None)
        return Linear(lambda x: prepared(x, bias_O), prepared.nbytes, (prepared.kernel,), weight, bias_O)
    each = [join(block, [name], codes, precision) for name in names]
    ran = tuple(kernel for linear in each for kernel in linear.kernels)
    return Linear(lambda x: torch.cat([linear(x) for linear in each], dim=-1), sum(one.nbytes for one in each), ran)


def join_gated(block: nn.Module, names: Sequence[str], codes: Codes, act: nn.Module) -> Linear | None:
    """A gate and what it is multiplied with as one linear layer that gives their product, where a GPU's kernel does that."""
    found = [codes(name) for name in names]
    whole = None if any(q is None for q in found) else _one(found)
    if whole is None or whole.codes.device.type != "cuda" or not _is_silu(act):
        return None
    prepared = CudaLinear.of(whole, gated=True)
    if prepared is None:
        return None
    modules: list[Any] = [block.get_submodule(name) for name in names]
    bias_O = _joined([getattr(module, "bias", None) for module in modules], modules)
    return Linear(lambda x: prepared(x, bias_O), prepared.nbytes, (prepared.kernel,), prepared, bias_O)


def _is_silu(act: nn.Module) -> bool:
    x = torch.linspace(-8, 8, 100)
    return torch.allclose(act(x), F.silu(x), rtol=1e-5, atol=1e-6)


def _half(w_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """A float weight in bf16, as GPUs multiply."""
    half_OI, half_O = w_OI.bfloat16(), None if bias_O is None else bias_O.bfloat16()
    return Linear(lambda x: F.linear(x.to(half_OI.dtype), half_OI, half_O).to(x.dtype), half_OI.nbytes, ("bf16",))


def _one(found: Sequence[QTensor | None]) -> QTensor | None:
    """The weights below each other, None where they do not share a grid or scales are not of rows."""
    qs = [q for q in found if q is not None]
    if len(qs) == 1 == len(found):
        return qs[0]
    grid = qs[0].grid
    same = len(qs) == len(found) and all(q.grid == grid for q in qs) and grid.rows == 1
    if not same or (grid.inputs is not None and not grid.inputs.dynamic):
        return None
    codes, scale, zero = (torch.cat([getattr(q, name) for q in qs]) for name in ("codes", "scale", "zero"))
    return QTensor(codes, scale, zero, grid)


def _joined(biases: Sequence[Tensor | None], modules: Sequence[nn.Module]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    rows = (int(getattr(module, "out_features")) for module in modules)  # noqa: B009
    device = next(bias.device for bias in biases if bias is not None)
    return torch.cat(
        [torch.zeros(row, device=device) if bias is None else bias for bias, row in zip(biases, rows, strict=True)]
    )


def rms_norm(module: nn.Module) -> Norm:
    """The module as an RMS norm, its weight w or 1 + w, whichever gives its answers; ValueError if neither does."""
    weight_C = getattr(module, "weight", None)
    if not isinstance(weight_C, Tensor):
        raise ValueError(f"{type(module).__name__} has no weight")
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
    # small values among them, so that another eps would show
    x_TC = torch.randn(4, len(weight_C), generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [30.0], [1e-3], [1e-4]]
    )
    x_TC = x_TC.to(weight_C.device)
    wanted_TC = module(x_TC)
    for norm in (Norm(weight_C, eps), Norm(weight_C + 1, eps)):
        if same(norm(x_TC), wanted_TC):
            return norm
    raise ValueError(f"{type(module).__name__} is no RMS norm")


def proven(block: nn.Module, fused: FusedBlock, call: BlockCall, kind: LayerKind, layers: int) -> bool:
    """Whether both answer the same: for a text of some tokens, and for its last one when the others are in a cache.

    call: what the block receives for a text of `PROOF_TOKENS` tokens. Both must compute in fp32 (`exact`).
    """
    width = fused.norm.weight_C.numel()
    hidden_BTC = torch.randn(1, PROOF_TOKENS, width, generator=torch.Generator().manual_seed(1))
    hidden_BTC = hidden_BTC.to(fused.norm.weight_C.device)
    wanted_BTC = call.run(block, hidden_BTC)
    if not same(call.run(fused, hidden_BTC), wanted_BTC):
        return False
    cache = PagedCache([LayerKind(kind.window)] * layers, PROOF_TOKENS, 1, PROOF_TOKENS, hidden_BTC.device)
    request = cache.admit(PROOF_TOKENS)
    if request is None:
        return False
    first = Step(cache, [request], PROOF_TOKENS - 1)
    with_cache(_part(call, slice(0, PROOF_TOKENS - 1)), block, first).run(fused, hidden_BTC[:, :-1])
    first.commit()
    last = with_cache(_part(call, slice(PROOF_TOKENS - 1, None)), block, Step(cache, [request], 1))
    return same(last.run(fused, hidden_BTC[:, -1:]), wanted_BTC[:, -1:])


def same(found: Tensor, wanted: Tensor) -> bool:
    """Row by row, relative to the row's largest value; False where anything is not finite."""
    error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1e-30)
    return found.shape == wanted.shape and bool((error <= TOLERANCE).all())


def try_fuse(block: nn.Module, layer: int, codes: Codes, call: BlockCall, kind: LayerKind, layers: int) -> bool:
    """Whether the block (in memory, computing in fp32) may be replaced."""
    try:
        fused = FusedBlock(block, layer, codes, "exact").eval()
        return proven(block, fused, call, kind, layers)
    except ODD:
        return False


def _part(call: BlockCall, tokens: slice) -> BlockCall:
    """The call for some of the tokens; no mask, since none of them is followed by what it must not see."""
    kwargs = dict(call.kwargs)
    cos, sin = kwargs["position_embeddings"]
    return BlockCall(
        call.args, {**kwargs, "attention_mask": None, "position_embeddings": (cos[:, tokens], sin[:, tokens])}
    )


def _names(block: nn.Module, choices: Sequence[Sequence[str]]) -> Sequence[str]:
    present = {name for name, _ in block.named_modules()}
    for names in choices:
        if set(names) <= present:
            return names
    raise ValueError("a block of another shape")

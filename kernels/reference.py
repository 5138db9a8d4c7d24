"""What each operation means, in plain torch and fp32. Every fast kernel is tested against this file.

    linear      y = r(x) W^T + b,   W = (codes - zero) * scale,   r: how the grid says that inputs are rounded, if it does
    norms       h = x + residual, rounded to the type of x, as the residual stream is kept; y = h / rms(h) * weight
    attention   softmax(cap(q k^T * scaling)) v over the tokens that a query sees; cap(s) = c tanh(s / c), if there is a c

The cache that `rope_write` fills and `paged_decode` reads is described in `pages.py`; `sampling.py` has the draws.
Nothing here is fast, and nothing here may be clever. Results are fp32 where nothing else is said.

Legend: T tokens (any leading dimensions), I input columns, O output channels, C width, F width of a gated MLP, B texts,
Q queries of a text, K tokens that they see, N tokens in any order, Hq heads of queries, H heads of keys, D channels of a
head, R of them turned by rotary angles, P pages of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from infopt.grid import FP8, Inputs
from infopt.kernels.pages import PAGE, Pages
from infopt.qtensor import QTensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
ROUGH = 2.0**-8  # of a number that was rounded to 16 bits: twice what bf16 loses at most, for the sum before it too


def linear(x_TI: Tensor, q: QTensor, bias_O: Tensor | None = None) -> Tensor:
    """y [..., O] in fp32 for x [..., I] of any floating dtype; the weight is dequantized in fp32 on every call."""
    bias = None if bias_O is None else bias_O.to(torch.float32)
    x_TI = x_TI.to(torch.float32) if q.grid.inputs is None else q.grid.inputs.round(x_TI, q.input_scale)
    return F.linear(x_TI, q.dequantize(torch.float32), bias)


def quantize(x_TC: Tensor, inputs: Inputs, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes [T, C] int8 or E4M3, scale fp32 [T, G], or the one that was given) of what a layer reads."""
    values, scale = inputs.encode(x_TC, scale)
    if inputs.group is not None:
        values = values.flatten(-2)[..., : x_TC.shape[-1]]
    codes_TC = values.to(FP8 if inputs.kind == "float" else torch.int8)
    return codes_TC, scale.flatten(-2) if inputs.group is not None and inputs.dynamic else scale


def codes_linear(
    codes_TI: Tensor, scale_TG: Tensor, w_OI: Tensor, w_scale_RG: Tensor, rows: int, bias_O: Tensor | None = None
) -> Tensor:
    """y [T, O] of codes on both sides, int8 or E4M3; a scale of the weight covers `rows` rows, and as many columns as there
    are scales for; a scale of the inputs a token's columns, or one part of them."""
    x_TI = (
        codes_TI.float().unflatten(1, (scale_TG.shape[-1], -1)).mul(scale_TG.view(-1, scale_TG.shape[-1], 1)).flatten(1)
    )
    columns = -(-w_OI.shape[1] // w_scale_RG.shape[1])
    spread_OI = w_scale_RG.float().repeat_interleave(rows, 0)[: len(w_OI)].repeat_interleave(columns, 1)
    return F.linear(x_TI, w_OI.float() * spread_OI[:, : w_OI.shape[1]], None if bias_O is None else bias_O.float())


def add_rms_norm(x_TC: Tensor, residual_TC: Tensor | None, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y fp32, h in the dtype of x)."""
    h_TC = x_TC if residual_TC is None else (x_TC.float() + residual_TC.float()).to(x_TC.dtype)
    return rms_norm(h_TC, weight_C, eps), h_TC


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_C.float()


def gated(x_T2F: Tensor, act: str) -> Tensor:
    """act(gate) * up [T, F], where a token's first half is the gate."""
    gate_TF, up_TF = x_T2F.float().chunk(2, dim=-1)
    return ACTIVATIONS[act](gate_TF) * up_TF


def norm_linear(
    x_TI: Tensor, gamma_I: Tensor, beta_I: Tensor, eps: float, w_OI: Tensor, bias_O: Tensor, act: str = "none"
) -> Tensor:
    """act(layer_norm(x) W^T + b) [T, O]."""
    normed_TI = F.layer_norm(x_TI.float(), gamma_I.shape, gamma_I.float(), beta_I.float(), eps)
    return ACTIVATIONS[act](F.linear(normed_TI, w_OI.float(), bias_O.float()))


def rescore(
    rough_TV: Tensor, x_TC: Tensor, weight_VC: Tensor, margin_V: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """logits [T, V] that are roughly known without the bias: exactly, where they may be the largest; else roughly.

    A rough logit is off by margin_v |x|, for its weight was rounded, and by ROUGH of itself. So the largest exact logit, whose
    upper bound is not below it, is not below the lower bound of any other: who passes that test is multiplied again. What
    stays rough is below a lower bound, and so below an exact logit; or it is exact, as all are where x is 0."""
    off_TV = margin_V * x_TC.float().norm(dim=1, keepdim=True) + rough_TV.float().abs() * ROUGH
    rough_TV = rough_TV.float() if bias_V is None else rough_TV.float() + bias_V.float()
    least_T1 = (rough_TV - off_TV).amax(1, keepdim=True)
    exact_TV = F.linear(x_TC.float(), weight_VC.float(), None if bias_V is None else bias_V.float())
    return torch.where((off_TV > 0) & (rough_TV + off_TV >= least_T1), exact_TV, rough_TV)


# Attention


def rope(x_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, weight_D: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Heads, normed where there is a weight, whose first R channels are turned: pairs are (c, c + R / 2)."""
    x_NHD = x_NHD.float() if weight_D is None else rms_norm(x_NHD, weight_D, eps)
    width = cos_NR.shape[-1]
    turned_NHR, rest = x_NHD[..., :width], x_NHD[..., width:]
    low, high = turned_NHR.chunk(2, dim=-1)
    turned_NHR = turned_NHR * cos_NR.float()[:, None] + torch.cat((-high, low), dim=-1) * sin_NR.float()[:, None]
    return torch.cat((turned_NHR, rest), dim=-1)


def rope_write(
    qkv_NHD: Tensor, cos_NR: Tensor, sin_NR: Tensor, q_weight_D: Tensor | None, k_weight_D: Tensor | None, eps: float,
    slots_N: Tensor, keys: Pages, values: Pages,
) -> Tensor:  # fmt: skip
    """q [N, Hq, D] of qkv [N, Hq + 2 H, D]; the turned keys and the values go to the cache, rounded as it keeps them."""
    heads = keys.heads
    q, k, v = qkv_NHD.split((qkv_NHD.shape[1] - 2 * heads, heads, heads), dim=1)
    keys.write(slots_N, rope(k, cos_NR, sin_NR, k_weight_D, eps))
    values.write(slots_N, v.float())
    return rope(q, cos_NR, sin_NR, q_weight_D, eps)


def attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, scaling: float, window: int | None = None, cap: float | None = None
) -> Tensor:
    """[B, Hq, Q, D]; causal: the last query is the last token, and sees the `window` last ones."""
    queries, tokens = q_BHQD.shape[2], k_BHKD.shape[2]
    repeats = q_BHQD.shape[1] // k_BHKD.shape[1]
    k_BHKD, v_BHKD = (x.float().repeat_interleave(repeats, dim=1) for x in (k_BHKD, v_BHKD))
    scores_BHQK = q_BHQD.float() @ k_BHKD.transpose(2, 3) * scaling
    if cap is not None:
        scores_BHQK = cap * torch.tanh(scores_BHQK / cap)
    device = q_BHQD.device
    back_QK = torch.arange(tokens - queries, tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    hidden_QK = (back_QK < 0) if window is None else (back_QK < 0) | (back_QK >= window)
    return scores_BHQK.masked_fill(hidden_QK, -torch.inf).softmax(-1) @ v_BHKD


def paged_decode(
    q_BHD: Tensor, keys: Pages, values: Pages, tables_BP: Tensor, pages_B: Tensor, lengths_B: Tensor, scaling: float,
    window: int | None = None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """[B, Hq, D]: one token of each text, which is stored already, over the text's own tokens.

    tables: the pages of each text; position p lies in page `table[p // PAGE % pages]`, so that a window can be a ring.
    """
    results = []
    for q_HD, table_P, pages, length in zip(q_BHD, tables_BP, pages_B.tolist(), lengths_B.tolist(), strict=True):
        first = 0 if window is None else max(0, length - window)
        position_K = torch.arange(first, length, device=q_BHD.device)
        slots_K = table_P.long()[position_K // PAGE % pages] * PAGE + position_K % PAGE
        k_HKD, v_HKD = keys.read(slots_K).transpose(0, 1), values.read(slots_K).transpose(0, 1)
        results.append(attention(q_HD[None, :, None], k_HKD[None], v_HKD[None], scaling, None, cap)[0, :, 0])
    return torch.stack(results)

"""The rows of `gpu_check.py` whose kernels are Triton's.

Shapes are Llama 3 8B's: 32 heads of queries, 8 of keys, 128 channels. Triton is imported when a row is run.

Legend: T tokens, C width, B texts, K tokens of a text, Hq heads of queries, H heads of keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from gpu_ops import BFLOAT, CUBLAS, GATE_UP, OURS, Call, Case, Contender, Op, Problem, linear_op
from torch import Tensor

from infopt.grid import Grid, Inputs
from infopt.kernels import reference
from infopt.kernels.packing import Packed
from infopt.kernels.pages import PAGE, Pages
from infopt.kv_cache import CacheGrid

INT8 = CacheGrid("int", 8, "token")
GRIDS = {"bf16": None, "int8": INT8, "fp8": CacheGrid("float", 8, "token"), "int4": CacheGrid("int", 4, "token", False)}
EPS = 1e-5


def source(*names: str) -> tuple[str, ...]:
    return tuple(f"kernels/triton/{name}.py" for name in ("numeric", *names))


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device).to(BFLOAT)


def no_flops(_: Case) -> int:
    return 0


# --- rows: norms, gates, rotary angles ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """kind: what comes out, "none" (bf16) or "int8". weight_C: of the norm."""

    x: Tensor
    residual: Tensor
    weight_C: Tensor
    kind: str


def _rows(kind: str, parts: int) -> Callable[[Case, torch.Generator], Rows]:
    def make(case: Case, generator: torch.Generator) -> Rows:
        shape = (case.tokens, case.sizes * parts)
        weight = 1 + 0.1 * random(generator, case.sizes)
        return Rows(random(generator, *shape), random(generator, *shape), weight, kind)

    return make


def _codes(y: Tensor, kind: str) -> list[Tensor]:
    return [y] if kind == "none" else list(reference.quantize(y, Inputs("int")))


def _norm_reference(r: Rows) -> list[Tensor]:
    y, h = reference.add_rms_norm(r.x, r.residual, r.weight_C, EPS)
    return [part.double() for part in (*_codes(y, r.kind), h)]


def _norm(r: Rows) -> Call:
    from infopt.kernels.triton import rows

    x, residual = r.x.clone(), r.residual.clone()

    def call() -> list[Tensor]:
        y, scale, h = rows.add_rms_norm(x, residual, r.weight_C, EPS, r.kind)
        return [y, h] if r.kind == "none" else [y, scale, h]

    return call


def _norm_torch(r: Rows) -> Call:
    x, residual = r.x.clone(), r.residual.clone()

    def call() -> list[Tensor]:
        h = x + residual
        return [F.rms_norm(h, r.weight_C.shape, r.weight_C, EPS), h]

    return call


def _gate(r: Rows) -> Call:
    from infopt.kernels.triton import rows

    x = r.x.clone()
    return lambda: list(rows.gated(x, "silu", r.kind))[: 1 if r.kind == "none" else 2]


def _gate_torch(r: Rows) -> Call:
    x = r.x.clone()

    def call() -> list[Tensor]:
        gate, up = x.chunk(2, dim=-1)
        return [F.silu(gate) * up]

    return call


def _rows_op(name: str, kind: str, gated: bool, cases: tuple[Case, ...]) -> Op:
    width = 1 if kind == "int8" else 2  # bytes of what comes out
    if gated:
        ours, torchs = _gate, _gate_torch
        moved: Callable[[Rows], int] = lambda r: r.x.nbytes + r.x.numel() // 2 * width  # noqa: E731
        wanted = lambda r: [y.double() for y in _codes(reference.gated(r.x, "silu"), r.kind)]  # noqa: E731
    else:
        ours, torchs, wanted = _norm, _norm_torch, _norm_reference
        moved = lambda r: 3 * r.x.nbytes + r.x.numel() * width  # noqa: E731
    return Op(
        name, source("rows"), cases, BFLOAT, _rows(kind, 2 if gated else 1), wanted, Contender("infopt", ours, moved),
        (Contender("torch", torchs, moved),), no_flops, lambda case: 1, ceiling="copy_bytes_per_s",
    )  # fmt: skip


# --- attention ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """One new token of each text over its pages. tables: int64 [B, P]."""

    q_BHD: Tensor
    keys: Pages
    values: Pages
    tables: Tensor
    lengths: Tensor


def _pages(slots: int, heads: int, width: int, grid: CacheGrid | None, generator: torch.Generator) -> Pages:
    device = generator.device
    if grid is None:
        return Pages(random(generator, slots, heads, width))
    pages = Pages.empty(slots, heads, width, grid, device=device)
    x_NHD = torch.randn(slots, heads, width, generator=generator, device=device)
    for some in torch.arange(slots, device=device).split(8192):
        pages.write(some, x_NHD[some])
    return pages


def texts(kind: str) -> Callable[[Case, torch.Generator], Texts]:
    def make(case: Case, generator: torch.Generator) -> Texts:
        context, queries, heads, width = case.sizes
        device, count = generator.device, -(-context // PAGE)
        order = torch.randperm(case.tokens * count, generator=generator, device=device)
        keys, values = (_pages(case.tokens * count * PAGE, heads, width, GRIDS[kind], generator) for _ in range(2))
        lengths = torch.full((case.tokens,), context, device=device)
        q_BHD = random(generator, case.tokens, queries, width)
        return Texts(q_BHD, keys, values, order.view(case.tokens, count), lengths)

    return make


def _dense(t: Texts) -> tuple[Tensor, Tensor]:
    """Keys and values as they are read, fp32 [B, K, H, D]."""
    slots = (t.tables[..., None] * PAGE + torch.arange(PAGE, device=t.tables.device)).flatten(1)[:, : int(t.lengths[0])]
    keys, values = (torch.stack([half.read(some) for some in slots]) for half in (t.keys, t.values))
    return keys, values


def _decode_reference(t: Texts) -> list[Tensor]:
    k, v = (x.double().repeat_interleave(t.q_BHD.shape[1] // t.keys.heads, 2) for x in _dense(t))
    scores = torch.einsum("bhd,bkhd->bhk", t.q_BHD.double(), k) * t.q_BHD.shape[2] ** -0.5
    return [torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), v)]


def cloned(pages: Pages) -> Pages:
    parts = {name: getattr(pages, name) for name in ("codes", "scale", "zero")}
    return replace(pages, **{name: None if part is None else part.clone() for name, part in parts.items()})


def _decode(t: Texts) -> Call:
    from infopt.kernels.triton import decode

    keys, values, scaling = cloned(t.keys), cloned(t.values), t.q_BHD.shape[2] ** -0.5
    pages = torch.full_like(t.lengths, t.tables.shape[1])
    return lambda: [decode.paged_decode(t.q_BHD, keys, values, t.tables, pages, t.lengths, scaling)]


def _decode_sdpa(t: Texts) -> Call:
    """torch's, on keys and values that lie together in bf16."""
    k, v = (x.transpose(1, 2).to(BFLOAT).contiguous() for x in _dense(t))
    return lambda: [F.scaled_dot_product_attention(t.q_BHD[:, :, None], k, v, enable_gqa=True)[:, :, 0]]


def cached(t: Texts) -> int:
    parts = (part for half in (t.keys, t.values) for part in (half.codes, half.scale, half.zero) if part is not None)
    return sum(part.nbytes for part in parts) + 2 * t.q_BHD.nbytes


def _decode_op(kind: str, cases: tuple[Case, ...]) -> Op:
    anchor = Contender("SDPA bf16", _decode_sdpa, lambda t: 4 * t.keys.codes[..., :1].numel() * t.q_BHD.shape[2])
    return Op(
        f"decode-attention-{kind}", source("decode"), cases, BFLOAT, texts(kind), _decode_reference,
        Contender("infopt", _decode, cached), (anchor,), no_flops, lambda case: 2,
    )  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    q_BHQD: Tensor
    k_BHKD: Tensor
    v_BHKD: Tensor
    window: int | None


def _prompt(case: Case, generator: torch.Generator) -> Prompt:
    queries, heads, width, window = case.sizes
    shapes = ((queries, case.tokens), (heads, case.tokens), (heads, case.tokens))
    return Prompt(*(random(generator, 1, *shape, width) for shape in shapes), window)


def _prefill_reference(p: Prompt) -> list[Tensor]:
    repeats, window, length = p.q_BHQD.shape[1] // p.k_BHKD.shape[1], p.window, p.q_BHQD.shape[2]
    place = torch.arange(length, device=p.q_BHQD.device)
    back = place[:, None] - place
    hidden = (back < 0) if window is None else (back < 0) | (back >= window)
    heads = []
    for h in range(p.q_BHQD.shape[1]):  # one at a time: scores in fp64 are large
        q, k, v = p.q_BHQD[0, h].double(), p.k_BHKD[0, h // repeats].double(), p.v_BHKD[0, h // repeats].double()
        scores = (q @ k.T * q.shape[1] ** -0.5).masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return [torch.stack(heads)[None]]


def _prefill(p: Prompt) -> Call:
    from infopt.kernels.triton import attention

    q, k, v = p.q_BHQD.clone(), p.k_BHKD.clone(), p.v_BHKD.clone()
    return lambda: [attention.attention(q, k, v, q.shape[3] ** -0.5, p.window)]


def _prefill_sdpa(p: Prompt) -> Call:
    if p.window is not None:
        raise NotImplementedError("no window without a mask")
    q, k, v = p.q_BHQD.clone(), p.k_BHKD.clone(), p.v_BHKD.clone()
    return lambda: [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]


def _scores(case: Case) -> int:
    queries, _, width, window = case.sizes
    seen = case.tokens * case.tokens // 2 if window is None else case.tokens * window
    return 4 * queries * width * seen


def _prompt_bytes(p: Prompt) -> int:
    return 2 * p.q_BHQD.nbytes + p.k_BHKD.nbytes + p.v_BHKD.nbytes


# --- linear layers ------------------------------------------------------------------------------------------------


def _triton_w4(problems: list[Problem]) -> Call:
    from infopt.kernels.triton import weight

    own = [(p.x_TI, Packed.of(p.q)) for p in problems]
    return lambda: [weight.multiply(x_TI, packed) for x_TI, packed in own]


@dataclass(frozen=True)
class Codes:
    """Both sides in 8 bits. scales fp32: [T, 1] and [O, 1]."""

    x: Tensor
    x_scale: Tensor
    w: Tensor
    w_scale: Tensor


def _coded(kind: str) -> Callable[[Case, torch.Generator], Codes]:
    def make(case: Case, generator: torch.Generator) -> Codes:
        rows, columns = case.sizes
        inputs = Inputs("int" if kind == "int8" else "float")
        x, w = (reference.quantize(random(generator, n, columns).float(), inputs) for n in (case.tokens, rows))
        return Codes(*x, *w)

    return make


def _codes_reference(c: Codes) -> list[Tensor]:
    return [(c.x.double() * c.x_scale.double()) @ (c.w.double() * c.w_scale.double()).T]


def _gemm(c: Codes) -> Call:
    from infopt.kernels.triton import gemm, linear

    x, w = c.x.clone(), c.w.clone()
    if c.x.dtype == torch.int8:
        return lambda: [gemm.int8_linear(x, c.x_scale, w, c.w_scale, None, BFLOAT)]
    return lambda: [linear.fp8_product(x, c.x_scale, w, c.w_scale, 1, BFLOAT)]


def _gemm_torch(c: Codes) -> Call:
    x, w_IO = c.x.clone(), c.w.clone().T
    if c.x.dtype == torch.int8:
        return lambda: [(torch._int_mm(x, w_IO).float() * c.x_scale * c.w_scale.T).to(BFLOAT)]
    w_scale = c.w_scale.T.contiguous()
    return lambda: [torch._scaled_mm(x, w_IO, c.x_scale, w_scale, out_dtype=BFLOAT)]


def _gemm_cublas(c: Codes) -> Call:
    x, w = (c.x.float() * c.x_scale).to(BFLOAT), (c.w.float() * c.w_scale).to(BFLOAT)
    return lambda: [F.linear(x, w)]


def _code_bytes(c: Codes) -> int:
    return c.x.nbytes + c.w.nbytes + c.x_scale.nbytes + c.w_scale.nbytes + 2 * len(c.x) * len(c.w)


def _gemm_op(kind: str) -> Op:
    torchs = Contender("_int_mm" if kind == "int8" else "_scaled_mm", _gemm_torch, _code_bytes)
    cublas = Contender("cublas bf16", _gemm_cublas, lambda c: 2 * _code_bytes(c))
    return Op(
        "w8a8" if kind == "int8" else "fp8", source("gemm"), tuple(Case("8B gate_up", t, GATE_UP) for t in (2048, 32)),
        BFLOAT, _coded(kind), _codes_reference, Contender("infopt", _gemm, _code_bytes), (torchs, cublas),
        lambda case: 2 * case.tokens * case.sizes[0] * case.sizes[1], lambda case: 1, peak=2.0,
    )  # fmt: skip


# --- the rows -----------------------------------------------------------------------------------------------------

HEADS = (32, 8, 128)
_TEXTS = tuple(Case(f"{b} x {k} tokens", b, (k, *HEADS)) for b, k in ((1, 65536), (16, 4096)))
_PROMPTS = (Case("4096 causal", 4096, (*HEADS, None)), Case("4096, window 1024", 4096, (*HEADS, 1024)))
_WIDE, _GATES = (Case("4096 wide", t, 4096) for t in (4096,)), (Case("14336 wide", t, 14336) for t in (4096,))
_NORMS, _ACTS = tuple(_WIDE), tuple(_GATES)
TRITON_OPS = (
    _decode_op("bf16", _TEXTS),
    _decode_op("int8", _TEXTS),
    _rows_op("add-rms-norm", "none", False, _NORMS),
    _rows_op("swiglu", "none", True, _ACTS),
    _rows_op("add-rms-norm-int8", "int8", False, _NORMS),
    _rows_op("swiglu-int8", "int8", True, _ACTS),
    Op(
        "prefill-attention", source("attention"), _PROMPTS, BFLOAT, _prompt, _prefill_reference,
        Contender("infopt", _prefill, _prompt_bytes), (Contender("SDPA", _prefill_sdpa, _prompt_bytes),), _scores,
        lambda case: 1,
    ),
    _decode_op("fp8", _TEXTS[:1]),
    _decode_op("int4", _TEXTS[:1]),
    linear_op(
        "triton-w4a16-g128", Grid(4, 128, True, BFLOAT), BFLOAT, ("8B gate_up", "8B down"), (64, 128), (CUBLAS,),
        Contender("infopt", _triton_w4, OURS.nbytes), source("weight"),
    ),
    _gemm_op("int8"),
    _gemm_op("fp8"),
)  # fmt: skip

"""Stand-ins for two of vLLM's processor kernels, in torch, for processors where its own are missing or wrong.

* Without AVX-512 the CPU build has no kernel for 4-bit weights at all.
* Without VNNI oneDNN adds products of 8-bit numbers in 16 bits, which saturate. Seen on an AVX2 processor: the product of
  random int8 matrices is off by 19 % of its largest value, and exact if the weights use 7 of their bits.

Both compute from the tensors that vLLM has loaded, fused, cut and repacked, so all of that is still vLLM's own work.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

Kept = list[tuple[Tensor, Tensor]]


def replace_where_needed() -> tuple[torch.library.Library, list[str]]:
    """The library, which must live as long as its operators are used, and which operators were replaced."""
    import vllm._custom_ops  # noqa: F401  registers vLLM's operators

    lib, replaced = torch.library.Library("_C", "FRAGMENT"), []
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        lib.define(
            "cpu_gemm_wna16(Tensor input, Tensor q_weight, Tensor(a!) output, Tensor scales, Tensor? zeros, "
            "Tensor? bias, int pack_factor, str isa_hint) -> ()"
        )
        lib.impl("cpu_gemm_wna16", _four_bits, "CPU")
        replaced.append("4-bit weights (no AVX-512)")
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        _replace_int8(lib)
        replaced.append("W8A8 (no VNNI)")
    return lib, replaced


def _four_bits(
    x: Tensor, words: Tensor, out: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *_: object
) -> None:
    """out = x W. W's codes lie in blocks of 16 output channels, zero points along the outputs; 8 where there are none."""
    inputs, outputs = x.shape[1], scales.shape[1]
    width = inputs // scales.shape[0]
    blocks = _nibbles(words.view(outputs // 16, inputs, 2)).reshape(outputs // 16, inputs, 16)
    codes = blocks.permute(1, 0, 2).reshape(inputs, outputs).float()
    zero = 8.0 if zeros is None else _nibbles(zeros).reshape(-1, outputs).float().repeat_interleave(width, 0)
    y = x.float() @ ((codes - zero) * scales.float().repeat_interleave(width, 0))
    out.copy_(y if bias is None else y + bias.float())


def _nibbles(words: Tensor) -> Tensor:
    return (words[..., None] >> torch.arange(0, 32, 4)) & 15


def _replace_int8(lib: torch.library.Library) -> None:
    kept: Kept = []

    def create(weight_KN: Tensor, scales: Tensor, *_: object) -> int:
        kept.append((weight_KN.double(), scales.double().flatten()))
        return len(kept) - 1

    def multiply(
        out: Tensor, x: Tensor, x_scale: Tensor, _zero: object, _adjust: object, bias: Tensor | None, handler: Tensor
    ) -> None:
        weight_KN, scale_N = kept[int(handler.item())]
        y = (x.double() @ weight_KN) * scale_N * x_scale.double()
        out.copy_(y if bias is None else y + bias.double())

    for name, function in (("create_onednn_scaled_mm_handler", create), ("onednn_scaled_mm", multiply)):
        lib.impl(name, function, "CPU", allow_override=True)
    lib.impl("release_dnnl_matmul_handler", lambda handler: None, "CompositeExplicitAutograd", allow_override=True)

"""One evaluator for every tool's output: WikiText-2 style perplexity in transformers, float32, on CPU, and how far the
predictions are from the original model's: mean KL divergence and the share of equal first choices.

Protocol: the whole text, tokenised once by the original model's tokenizer, non-overlapping windows, each of which begins
with the token that the tokenizer puts before a text, if it does; the first N of them, each window's first token not
predicted. Three kinds of output are read:
  compressed-tensors   by transformers itself, decompressed while loading, scales in float32
  GPTQ                 decoded here (transformers would need GPTQModel for it): `w = (q - z) * s`
  dequantized/*.safetensors   put over the original model's weights
Where compressed-tensors' config has `input_activations`, the inputs of every linear layer that has a scale are rounded as
engines do it: int8 or E4M3, with a scale from the largest value of a token, or of 128 columns of it, or with the one that is
stored (`round_inputs`). With a `kv_cache_scheme` keys and values are rounded to E4M3 by the stored scales (`Cache`).
Anything missing or unexpected is an error: a perplexity of a half-loaded model is worse than none.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.quantization.lifecycle import forward_helpers
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig, DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--original", "--dataset", "--result"):
        parser.add_argument(name, required=True, type=Path)
    parser.add_argument("--reference", required=True, type=Path, help="the original's predictions; made if absent")
    parser.add_argument("--windows", type=int, required=True)
    parser.add_argument("--seqlen", type=int, required=True)
    options = parser.parse_args()
    ids_NT = eval_windows(options)
    with torch.no_grad():
        reference_NTV = original_log_probs(options, ids_NT)
        model = load(options.model, options.original)
        rows = [
            window_row(log_probs(model, ids_T), torch.from_numpy(log_p_TV), ids_T)
            for ids_T, log_p_TV in zip(ids_NT, reference_NTV, strict=True)
        ]
    losses, kls, same = zip(*rows, strict=True)
    answer = {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "kl_mean": sum(kls) / len(kls),
        "top1": sum(same) / len(same),
        "windows": len(losses),
        "seqlen": options.seqlen,
        "window_losses": losses,
    }
    options.result.write_text(json.dumps(answer))


def eval_windows(options: argparse.Namespace) -> torch.Tensor:
    """int64 [windows, seqlen]"""
    text = options.dataset.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(options.original)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin = torch.tensor(whole[: whole.index(plain[0])], dtype=torch.int64)
    length = options.seqlen - len(begin)
    count = len(ids) // length
    if count < options.windows:
        raise SystemExit(f"{options.dataset} holds {count} windows of {options.seqlen} tokens; ask for fewer")
    windows_NT = ids[: options.windows * length].view(options.windows, length)
    return torch.cat((begin.expand(len(windows_NT), -1), windows_NT), dim=1)


def log_probs(model: torch.nn.Module, ids_T: torch.Tensor) -> torch.Tensor:
    """float32 [T - 1, V]"""
    cache = Cache(model.kv_scales) if hasattr(model, "kv_scales") else None
    found = model(ids_T[None], past_key_values=cache, use_cache=cache is not None)
    return found.logits[0, :-1].float().log_softmax(-1)


def original_log_probs(options: argparse.Namespace, ids_NT: torch.Tensor) -> np.ndarray:
    """float32 [N, T - 1, V]: computed once and kept in a file of some GB, because it is half of an evaluation."""
    vocabulary = AutoConfig.from_pretrained(options.original).vocab_size
    shape = (len(ids_NT), options.seqlen - 1, vocabulary)
    if options.reference.exists():
        return np.memmap(options.reference, np.float32, "c", shape=shape)
    part = options.reference.with_suffix(".part")
    found_NTV = np.memmap(part, np.float32, "w+", shape=shape)
    model = AutoModelForCausalLM.from_pretrained(options.original, dtype=torch.float32).eval()
    for row_TV, ids_T in zip(found_NTV, ids_NT, strict=True):
        row_TV[:] = log_probs(model, ids_T).numpy()
    found_NTV.flush()
    part.rename(options.reference)
    return found_NTV


def window_row(log_q_TV: torch.Tensor, log_p_TV: torch.Tensor, ids_T: torch.Tensor) -> tuple[float, float, float]:
    """Of the tokens 1.. of a window: mean negative log likelihood and KL divergence in nats, share of equal first choices."""
    loss = torch.nn.functional.nll_loss(log_q_TV, ids_T[1:]).item()
    kl = torch.nn.functional.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True).item()
    return loss, kl, (log_q_TV.argmax(-1) == log_p_TV.argmax(-1)).float().mean().item()


def load(folder: Path, original: Path) -> torch.nn.Module:
    """The model that the folder stands for, in float32."""
    if (folder / "dequantized").is_dir():
        changed: dict[str, torch.Tensor] = {}
        for part in sorted((folder / "dequantized").glob("*.safetensors")):
            changed |= load_file(part)
        return _put_over(original, changed)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config")
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kind = quantization["quant_method"]
    if kind == "compressed-tensors":
        decode_in_float32()
        model, notes = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            quantization_config=CompressedTensorsConfig(dequantize=True),
            output_loading_info=True,
        )
        _refuse(notes["missing_keys"], [name for name in notes["unexpected_keys"] if not name.endswith(READ_HERE)])
        round_inputs(model, folder, quantization)
        fuse(model, folder, quantization)
        if quantization.get("kv_cache_scheme"):
            model.kv_scales = kv_scales(folder, quantization["kv_cache_scheme"], model.config.num_hidden_layers)
        return model.eval()
    if kind == "gptq":
        return _put_over(original, decode_gptq(folder, quantization))
    raise SystemExit(f"{folder}: quant_method {kind!r} is not one that this evaluator reads")


def decode_in_float32() -> None:
    """Keep compressed-tensors from rounding weights a second time: it multiplies codes and scales in the scales' type, so that
    of two tools the one whose scales are bf16 would be charged for an error that no server makes."""
    inner = forward_helpers._dequantize

    def dequantize(x_q: torch.Tensor, scale: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        return inner(x_q, scale.float(), *others, **named)

    forward_helpers._dequantize = dequantize


def scaled_by_maximum(x_TI: torch.Tensor, kind: str) -> torch.Tensor:
    """Rounded by a scale from the largest value of each row."""
    scale_T1 = (x_TI.abs().amax(-1, keepdim=True) / LARGEST[kind]).clamp(min=1e-12)
    return rounded(x_TI, scale_T1, kind)


def rounded(x: torch.Tensor, scale: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int":
        return (x / scale).round().clamp(-128, 127) * scale
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


LARGEST = {"int": 127, "float": 448}
KV_SCALES = (".k_scale", ".v_scale")
READ_HERE = (".input_scale", *KV_SCALES)  # scales that transformers has no place for


def round_inputs(model: torch.nn.Module, folder: Path, quantization: dict) -> None:
    """Round what the quantized layers are given, where the config says that an engine rounds it."""
    kinds = [group.get("input_activations") for group in quantization["config_groups"].values()]
    if kinds == [None] * len(kinds):
        return
    given = kinds[0]
    how = given["dynamic"], given["strategy"], given.get("group_size")
    known = ((True, "token", None), (True, "group", 128), (False, "tensor", None))
    if any(kind != given for kind in kinds) or how not in known or not given["symmetric"] or given["num_bits"] != 8:
        raise SystemExit(f"{folder}: inputs {kinds} are not one type that this evaluator rounds")
    layers, kind = dict(model.named_modules()), given["type"]
    stored = stored_tensors(folder, ".input_scale")
    scaled = [name.removesuffix(".weight_scale") for name in stored_names(folder) if name.endswith(".weight_scale")]
    if not scaled:
        raise SystemExit(f"{folder}: no layer has a scale")

    def hook(name: str) -> Any:
        def before(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            x_TI = args[0]
            if not given["dynamic"]:
                x_TI = rounded(x_TI, stored[f"{name}.input_scale"], kind)
            elif how[2] is None:
                x_TI = scaled_by_maximum(x_TI, kind)
            else:
                x_TI = torch.cat([scaled_by_maximum(part, kind) for part in x_TI.split(how[2], -1)], -1)
            return (x_TI, *args[1:])

        return before

    for name in scaled:
        layers[name].register_forward_pre_hook(hook(name))


FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: torch.nn.Module, folder: Path, quantization: dict) -> None:
    """Layers that servers fuse get one weight scale where each has one for its whole tensor of floats: the largest, to which
    vLLM rounds the others again (`requantize_with_max_scale`)."""
    weights = [group["weights"] for group in quantization["config_groups"].values()]
    if not all((kind["type"], kind["strategy"]) == ("float", "tensor") for kind in weights):
        return
    stored = stored_tensors(folder, ".weight_scale")
    for name, module in model.named_modules():
        for siblings in FUSED:
            scales = {part: stored.get(f"{name}.{part}.weight_scale") for part in siblings}
            if all(scale is not None for scale in scales.values()):
                most = max(float(scale) for scale in scales.values())
                for part in siblings:
                    weight = getattr(module, part).weight
                    weight.data = rounded(weight.data, torch.tensor(most), "float")


class Cache(DynamicCache):
    """Gives a layer's keys and values back as an FP8 cache with these scales holds them."""

    def __init__(self, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        k_scale, v_scale = self.scales[layer_idx]
        return rounded(keys, k_scale, "float"), rounded(values, v_scale, "float")


def kv_scales(folder: Path, scheme: dict, layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's stored scales of keys and of values, one number each."""
    if (scheme["type"], scheme["num_bits"], scheme["strategy"], scheme["dynamic"]) != ("float", 8, "tensor", False):
        raise SystemExit(f"{folder}: a cache of {scheme} is none that this evaluator rounds")
    stored = stored_tensors(folder, *KV_SCALES)
    if len(stored) != 2 * layers:
        raise SystemExit(f"{folder}: {len(stored)} scales for {layers} layers' keys and values")
    of = {int(name.split(".layers.")[1].split(".")[0]): name.rpartition(".")[0] for name in stored}
    return [(stored[f"{of[i]}.k_scale"], stored[f"{of[i]}.v_scale"]) for i in range(layers)]


def stored_tensors(folder: Path, *ends: str) -> dict[str, torch.Tensor]:
    """The tensors, fp32, whose names end in one of these."""
    found = {}
    for part in sorted(folder.glob("*.safetensors")):
        with safe_open(part, framework="pt") as file:
            names = [name for name in file.keys() if name.endswith(ends)]  # noqa: SIM118
            found |= {name: file.get_tensor(name).float() for name in names}
    return found


def stored_names(folder: Path) -> list[str]:
    """The names of all tensors in a folder."""
    names = []
    for part in sorted(folder.glob("*.safetensors")):
        with safe_open(part, framework="pt") as file:
            names += file.keys()
    return names


def _put_over(original: Path, changed: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The original model with these weights in place of its own."""
    config = AutoConfig.from_pretrained(original)
    model = AutoModelForCausalLM.from_pretrained(original, config=config, dtype=torch.float32)
    if not changed:
        raise SystemExit("no quantized weight was found")
    notes = model.load_state_dict(changed, strict=False)
    _refuse([], notes.unexpected_keys)
    return model.eval()


def _refuse(missing: list[str], unexpected: list[str]) -> None:
    if missing or unexpected:
        raise SystemExit(
            f"the model did not load whole: missing {list(missing)[:5]}, unexpected {list(unexpected)[:5]}"
        )


def decode_gptq(folder: Path, quantization: dict) -> dict[str, torch.Tensor]:
    """Every tensor of a GPTQ folder, its packed layers decoded to float32 [O, I]."""
    bits = quantization["bits"]
    offset = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1  # version 1 stores the zero point minus 1
    stored: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        stored |= load_file(part)
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    decoded = {}
    for name in layers:
        q_IO, z_GO, s_GO, group_I = (stored.pop(f"{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx"))
        q_IO = _unpack(q_IO.T, bits).T
        z_GO = (_unpack(z_GO, bits) + offset) & (2**bits - 1)
        group_I = group_I.long()
        w_IO = (q_IO - z_GO[group_I]).float() * s_GO.float()[group_I]
        decoded[f"{name}.weight"] = w_IO.T.contiguous()
    return {**{name: value.float() for name, value in stored.items()}, **decoded}


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, C], a stream of codes with the lowest bits first (3-bit codes cross words) -> int32 [R, C * 32 / bits]"""
    stream = ((packed[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten(-2)
    return (stream.unflatten(-1, (-1, bits)) << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)


if __name__ == "__main__":
    main()

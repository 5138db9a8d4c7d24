"""Rules of `infopt lint` about the quantization section of config.json against the layers that are there.

The section is a promise to a loader: which layers are packed and how. A name in it that matches nothing, or a layer that it
forgets, is not an error that any engine reports; the layer is filled with whatever the loader has instead.
"""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from infopt.exporters.lint_model import Finding, Layer, Model, found, quoted
from infopt.header import show

_CLASSES = re.compile(r"[A-Z]\w*")  # "Linear", "Embedding": a class of modules, not a path
_NOT_LINEAR = ("embed", "wte", "wpe", "norm", "ln_", "position", "conv", "router", "A_log")
_NESTED = re.compile(r"\([^()]*[*+{|][^()]*\)[*+{]|\\[1-9]")
_MANY = 4  # unbounded repeats in one pattern
_LONG = 200
_SECONDS = 5.0
_CONFIG = "config.json"


def required_keys(model: Model) -> Iterator[Finding]:
    """Keys without which an engine refuses the model, or silently reads it as something else."""
    wanted = {
        "gptq": ("bits", "group_size", "desc_act", "sym"),
        "awq": ("bits", "group_size", "zero_point"),
        "compressed-tensors": ("format", "quantization_status", "config_groups"),
        "fp8": ("activation_scheme",),
    }
    for key in wanted.get(model.method, ()):
        if key not in model.quantization:
            why = (
                "transformers then loads wrong weights" if key == "quantization_status" else "engines refuse the model"
            )
            yield found("config-key", "error", _CONFIG, f"quantization_config has no {key}: {why}", f"add {key}")
    if model.quantization and not model.method:
        yield found("config-key", "error", _CONFIG, "quantization_config has no quant_method", "add quant_method")
    status = model.quantization.get("quantization_status", "compressed")
    if model.method == "compressed-tensors" and status != "compressed":
        message = f"quantization_status is {show(status)}: the packed weights are not decompressed"
        yield found("config-key", "error", _CONFIG, message, 'set it to "compressed"')
    if model.quantization.get("transform_config"):
        message = "transform_config asks for rotations at run time: transformers leaves them out, silently"
        yield found("transform", "error", _CONFIG, message, "use a model whose rotations are folded into its weights")
    if model.method == "modelopt":
        message = "transformers ignores modelopt's quantization_config and runs the packed numbers as weights"
        yield found("config-key", "info", _CONFIG, message, "serve it with vLLM, SGLang or TensorRT-LLM")


def unmatched_names(model: Model) -> Iterator[Finding]:
    """Ignore lists and targets whose names match no module: the engine quantizes, or skips, something else."""
    modules = _modules(model)
    for key, patterns in _lists(model):
        for pattern in patterns:
            answer = _matches(pattern, modules, key)
            if answer is None:
                message = f"{key}: {show(pattern)} is no pattern that can be tried in bounded time"
                yield found("unmatched-name", "warning", _CONFIG, message, "write it without nested repeats")
            elif not answer:
                message = f"{key}: {show(pattern)} matches no module of this checkpoint"
                yield found("unmatched-name", "warning", _CONFIG, message, _closest(pattern, modules))


def _modules(model: Model) -> list[str]:
    """Paths of all modules with tensors and of what contains them; a tied head is there without a tensor."""
    paths = {"lm_head"}
    for name in model.layers:
        parts = name.split(".")
        paths.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return sorted(paths)


def _lists(model: Model) -> Iterator[tuple[str, list[str]]]:
    section = model.quantization
    for key in ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers", "exclude"):
        names = section.get(key)
        if isinstance(names, list):
            yield key, [name for name in names if isinstance(name, str) and not _CLASSES.fullmatch(name)]
    for name, group in _groups(model):
        yield f"config_groups.{name}.targets", [t for t in group["targets"] if not _CLASSES.fullmatch(t)]
    dynamic = section.get("dynamic")
    if isinstance(dynamic, dict):
        yield "dynamic", [f"re:{key[2:] if key[:2] in ('+:', '-:') else key}" for key in dynamic]


def _groups(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    groups = model.quantization.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
            yield name, group


def _matches(pattern: str, modules: Iterable[str], key: str) -> bool | None:
    """Whether the pattern names any module, by the rule of its list; None where that cannot be found out safely."""
    test = _test(pattern, key)
    if test is None:
        return None
    deadline = time.monotonic() + _SECONDS
    for name in modules:
        if time.monotonic() > deadline:
            return None
        if len(name) <= _LONG and test(name):
            return True
    return False


def _test(pattern: str, key: str) -> Callable[[str], bool] | None:
    if pattern.startswith("re:"):
        source = pattern[3:]
        repeats = len(re.findall(r"[*+]|,\}", source))
        if len(source) > _LONG or repeats > _MANY or _NESTED.search(source):
            return None
        try:
            compiled = re.compile(source)
        except (re.error, OverflowError, RecursionError):
            return None
        return lambda name: bool(compiled.match(name) or (key == "dynamic" and compiled.search(name)))
    if any(mark in pattern for mark in "*?["):
        if pattern.count("*") > _MANY:
            return None
        return lambda name: fnmatch.fnmatchcase(name, pattern)
    if key == "modules_to_not_convert":
        return lambda name: pattern in name
    return lambda name: name == pattern or name.endswith(f".{pattern}") or name.startswith(f"{pattern}.")


def packed_numbers(model: Model) -> dict[str, tuple[object, object]]:
    """{layer: (bits, group_size)} of a gptq or awq folder: the section's, or those of the first rule in its table `dynamic`
    that means the layer. Absent are layers of which that cannot be found out safely."""
    section, numbers = model.quantization, {}
    dynamic = section.get("dynamic")
    rules = [
        (rule, _test(f"re:{key.removeprefix('+:')}", "dynamic"))
        for key, rule in (dynamic.items() if isinstance(dynamic, dict) else ())
        if isinstance(rule, dict) and not key.startswith("-:")
    ]
    deadline = time.monotonic() + _SECONDS
    for name in model.layers:
        own: dict[str, Any] | None = {}
        for rule, test in rules:
            if test is None or len(name) > _LONG or time.monotonic() > deadline:
                own = None
                break
            if test(name):
                own = rule
                break
        if own is not None:
            said = {**section, **own}
            numbers[name] = said.get("bits"), said.get("group_size")
    return numbers


def _closest(pattern: str, modules: list[str]) -> str:
    last = pattern.rpartition(".")[2]
    same = [name for name in modules if name.rpartition(".")[2] == last and last]
    return f"the checkpoint has {quoted(same, 2)}" if same else "remove it, or use the names of the tensors"


def uncovered_layers(model: Model) -> Iterator[Finding]:
    """Quantized layers that the section does not cover, and plain ones that it says are quantized."""
    layers = model.layers.values()
    packed = [layer for layer in layers if layer.quantized]
    if packed and not model.quantization:
        message = f"{len(packed)} layers are quantized, and config.json has no quantization_config"
        yield found("uncovered-layer", "error", packed[0].info(), message, "add the section that the tool wrote")
        return
    if model.quantization and not packed and model.tensors and _covers_weights(model):
        message = "config.json has a quantization_config, and no layer is quantized"
        yield found("uncovered-layer", "error", _CONFIG, message, "remove the section")
        return
    for layer in packed:
        if _ignored(model, layer.name):
            message = "it is quantized, and the ignore list says that it is not: it is read as plain weights"
            yield found("uncovered-layer", "error", layer.info(), message, f"remove {layer.name} from the ignore list")
        elif model.method == "compressed-tensors" and not _targeted(model, layer):
            message = "it is quantized, and no config group covers it"
            yield found("uncovered-layer", "error", layer.info(), message, f"add {layer.name} to a group's targets")
    if model.method == "compressed-tensors":
        yield from _plain_but_targeted(model, [layer for layer in layers if layer.matrix])


def _covers_weights(model: Model) -> bool:
    """A section may be about the KV cache alone, or quantize on loading."""
    return model.method in ("gptq", "awq") or any(True for _ in _groups(model))


def _plain_but_targeted(model: Model, plain: list[Layer]) -> Iterator[Finding]:
    for layer in plain:
        linear = not any(word in layer.name.lower() for word in _NOT_LINEAR) and layer.last not in ("gate", "weight")
        if linear and _targeted(model, layer) and not _ignored(model, layer.name):
            message = "it is not quantized, and the section says that it is: it becomes NaN or random"
            yield found("uncovered-layer", "error", layer.info(), message, f"add {layer.name} to the ignore list")


def _targeted(model: Model, layer: Layer) -> bool:
    for _, group in _groups(model):
        for target in group["targets"]:
            if target == "Linear" or _matches(target, [layer.name], "targets"):
                return True
    return False


def _ignored(model: Model, name: str) -> bool:
    for key, patterns in _lists(model):
        if not key.startswith(("config_groups", "dynamic")) and any(_matches(p, [name], key) for p in patterns):
            return True
    return False


def numbers(model: Model) -> Iterator[Finding]:
    """Bits, group sizes and flags that an engine refuses."""
    section = model.quantization
    if model.method in ("gptq", "awq"):
        yield from _flat_numbers(model, section)
    for name, group in _groups(model):
        weights = group.get("weights")
        if isinstance(weights, dict):
            yield from _group_numbers(f"config_groups.{name}.weights", weights)


def _flat_numbers(model: Model, section: dict[str, Any]) -> Iterator[Finding]:
    bits, size = section.get("bits"), section.get("group_size")
    allowed = (4,) if model.method == "awq" else (2, 3, 4, 8)
    if "bits" in section and (type(bits) is not int or bits not in allowed):
        message = f"bits is {show(bits)}; {model.method} has {', '.join(map(str, allowed))}"
        yield found("number", "error", _CONFIG, message, "quantize the model again")
    elif model.method == "gptq" and bits in (2, 3):
        yield found("number", "warning", _CONFIG, f"vLLM reads no gptq of {bits} bits", "use 4 bits, or another engine")
    if "group_size" in section and (type(size) is not int or (size != -1 and size < 1)):
        message = f"group_size is {show(size)}; it must be a positive number or -1"
        yield found("number", "error", _CONFIG, message, "quantize the model again")
    elif type(size) is int and size not in (-1, 32, 64, 128):
        message = f"group_size is {size}; kernels have -1, 32, 64 and 128"
        yield found("number", "warning", _CONFIG, message, "use a group size of 128")
    if model.method == "gptq" and section.get("sym") is False:
        message = "sym is false: vLLM refuses gptq with zero points"
        yield found("number", "warning", _CONFIG, message, "use awq or compressed-tensors for zero points")


def _group_numbers(where: str, weights: dict[str, Any]) -> Iterator[Finding]:
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    if type(bits) is not int or not 1 <= bits <= 16:
        yield found("number", "error", _CONFIG, f"{where}: num_bits is {show(bits)}", "quantize the model again")
    elif bits in (3, 5, 6, 7):
        message = f"{where}: codes of {bits} bits are packed otherwise since compressed-tensors 0.19"
        yield found("number", "info", _CONFIG, message, "use 4 or 8 bits, or pin the library")
    if strategy in ("group", "tensor_group") and (type(size) is not int or size < 1):
        message = f"{where}: group_size is {show(size)} with strategy {strategy}"
        yield found("number", "error", _CONFIG, message, "quantize the model again")
    if weights.get("actorder") in ("group", "dynamic", True):
        message = f"{where}: actorder {show(weights['actorder'])} is refused by compressed-tensors 0.19 and newer"
        yield found("act-order", "error", _CONFIG, message, "quantize with actorder static")

"""Everything that infopt asks of transformers: a definition on meta, the renaming of keys, the conversion of weights.

transformers keeps the tables that say how a checkpoint's tensors become a model's parameters (legacy names, per-expert
files stacked into one parameter, fused projections split). They live in internal modules that are imported by path, so
they are used here only, each in one small function. No code from a checkpoint is ever run, and nothing here reaches a
network.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from infopt.errors import BadInput, Unsupported
from infopt.sizes import check_sizes

# Keys that could make transformers fetch code or kernels, or build tables that a causal LM has no use for.
_DROPPED_KEYS = frozenset(
    [
        "auto_map",
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
        "_experts_implementation",
        "_name_or_path",
        "name_or_path",
        "num_labels",
        "id2label",
        "label2id",
    ]
)
_BUILD_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,  # torch's word for a padding token beyond the embedding
    ArithmeticError,
    RuntimeError,
    StrictDataclassError,
)
CHECK_FILES = "Correct config.json, or download the model again."


class Info(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path: ...


class Weights(Protocol):
    """Where tensors come from: a checkpoint reader, or a dequantizing view of one. `get` may be called from threads."""

    @property
    def tensors(self) -> Mapping[str, Any]: ...
    def get(self, name: str) -> Tensor: ...


def build_config(raw: Mapping[str, Any], weights: Weights) -> Any:
    """The transformers config for the dict of config.json, its sizes checked against the tensors first.

    Raises Unsupported for a model type that transformers does not know, BadInput for a config that is wrong.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput("config.json has no model_type.", "infopt cannot tell what the model is.", CHECK_FILES)
    if model_type not in CONFIG_MAPPING:
        why = "The installed transformers has no definition for it, and infopt never runs code from a checkpoint."
        raise Unsupported(f"config.json: model_type {model_type!r} is unknown.", why, "pip install -U transformers")
    kind = CONFIG_MAPPING[model_type]
    check_sizes(raw, getattr(kind, "attribute_map", {}), weights.tensors)
    try:
        return kind.from_dict(_clean(raw))
    except _BUILD_ERRORS as error:
        raise BadInput(f"config.json does not describe a {model_type} model.", _text(error), CHECK_FILES) from error


def build_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM on meta: parameters without memory, real buffers; eval mode, tied where the config says so."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"config.json: model_type {config.model_type!r} is not a causal language model."
        raise Unsupported(what, "transformers has no causal LM of that type.", "Use a text-generation model.")
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():  # on meta it would only take time
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
    except ImportError as error:
        what = f"The {config.model_type} definition cannot be built here."
        raise Unsupported(what, _text(error), "Install the package that it names.") from error
    except _BUILD_ERRORS as error:
        what = f"config.json does not describe a {config.model_type} model."
        raise BadInput(what, _text(error), CHECK_FILES) from error
    return model.eval().requires_grad_(False)


def find_blocks(model: PreTrainedModel, config: Any) -> str:
    """The module path of the decoder's blocks: the outermost ModuleList that is as long as the model is deep."""
    depth = config.get_text_config().num_hidden_layers
    found = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        what = f"{type(model).__name__} has no list of {depth} decoder blocks."
        raise Unsupported(what, "infopt streams a model block by block.", "Use another model.")

    def outermost_largest(name: str) -> tuple[int, int]:
        return name.count("."), -sum(parameter.numel() for parameter in model.get_submodule(name).parameters())

    return min(found, key=outermost_largest)


class KeyMap:
    """Every checkpoint key, mapped once: to a block, to the outer parts, or to nothing (`extra`).

    one_to_one: parameter path -> the checkpoint keys that become it without any conversion. converted: parameter path ->
    the keys that a conversion leads to it. split: for each block, the keys that `infopt.splitting` gave a parameter of
    their own after all, {key: parameter path}.
    Raises BadInput where a tensor's shape contradicts config.json, where a tensor is missing, or where the checkpoint
    has more layers than config.json says.
    """

    def __init__(self, model: PreTrainedModel, blocks: str, depth: int, weights: Weights) -> None:
        self.of_block: list[list[str]] = [[] for _ in range(depth)]
        self.outer: list[str] = []
        self.extra: list[str] = []
        self.one_to_one: dict[str, list[str]] = defaultdict(list)
        self.converted: dict[str, list[str]] = defaultdict(list)
        self.split: list[dict[str, str]] = [{} for _ in range(depth)]
        state = model.state_dict()
        pattern = re.compile(re.escape(blocks) + r"\.(\d+)\.")
        converted: set[int | None] = set()
        for key, (target, is_converted) in _rename(model, weights.tensors, state).items():
            match = pattern.match(target)
            index = int(match[1]) if match else None
            if target not in state:
                if index is not None and index >= depth and not _ignored(model, target):
                    _raise_extra_layer(key, weights, depth)
                self.extra.append(key)
                continue
            (self.outer if index is None else self.of_block[index]).append(key)
            if is_converted:
                converted.add(index)
                self.converted[target].append(key)
            else:
                self.one_to_one[target].append(key)
                _check_shape(key, weights, tuple(state[target].shape))
        self._check_missing(model, pattern, converted)

    def _check_missing(self, model: PreTrainedModel, pattern: re.Pattern[str], converted: set[int | None]) -> None:
        """Fail now rather than at the last block. Blocks with converted weights are checked when they are loaded."""
        for name, _ in model.named_parameters():
            match = pattern.match(name)
            if match and name not in self.one_to_one and int(match[1]) not in converted:
                raise missing(name)


def _rename(model: PreTrainedModel, keys: Iterable[str], state: dict[str, Tensor]) -> dict[str, tuple[str, bool]]:
    """checkpoint key -> (the model's key, whether a conversion and not only a renaming leads to it)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    renamed = {}
    for key in keys:
        target, source = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:  # the loader's own rule: a renaming must not lose a key that fits
            target, source = rename_source_key(key, [], [], prefix, state)
        renamed[key] = (target, source is not None)
    return renamed


def load_keys(model: PreTrainedModel, keys: list[str], weights: Weights, dtype: torch.dtype) -> None:
    """Read these checkpoint tensors into the model as `dtype`. BadInput names the file and tensor that do not fit."""
    mapping: list[Any] = list(get_model_conversion_mapping(model))
    config = LoadStateDictConfig(dtype=dtype, weight_mapping=mapping)
    with _without_progress_bar():
        answer = convert_and_load_state_dict_in_model(model, {key: _Lazy(weights, key) for key in keys}, config)
    info = answer[0] if isinstance(answer, tuple) else answer
    if info.conversion_errors:
        for key in keys:
            weights.get(key)  # a reading error was swallowed by the loader: meet it here, with its own message
        target, why = next(iter(info.conversion_errors.items()))
        raise BadInput(f"{_where(keys[0], weights)}: {target} cannot be made from it.", why[-400:], CHECK_FILES)
    if info.mismatched_keys:
        target, found, wanted = sorted(info.mismatched_keys)[0]
        what = f"{_where(keys[0], weights)}: {target} has shape {tuple(found)}."
        raise BadInput(what, f"config.json asks for {tuple(wanted)}.", CHECK_FILES)


def load_split(model: PreTrainedModel, paths: Mapping[str, str], weights: Weights, dtype: torch.dtype) -> None:
    """Read these checkpoint tensors into the parameters that are theirs alone, {key: parameter path}, as `dtype`."""
    for key, path in paths.items():
        module, _, name = path.rpartition(".")
        parameter = nn.Parameter(weights.get(key).to(dtype), requires_grad=False)
        setattr(model.get_submodule(module), name, parameter)


class Converters:
    """transformers' conversion of checkpoint tensors into a model's parameters, on its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._model, self._state = model, model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{parameter path: tensor} for tensors of any size under checkpoint keys that are converted on loading.

        Stacked parameters take their parts in the order of `tensors`. Raises what torch does for shapes that do not fit.
        """
        by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        prefix = self._model.base_model_prefix
        pending: dict[str, WeightConverter] = {}
        for key, tensor in tensors.items():
            target, source = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
            if source is None:
                raise ValueError(f"{key} is not converted")
            if target not in pending:
                pending[target] = copy.deepcopy(by_pattern[source])
            part: Any = tensor  # declared as a future; transformers takes tensors too, and does when it saves
            pending[target].add_tensor(target, key, source, part)
        made: dict[str, Tensor] = {}
        for target, converter in pending.items():
            made.update(converter.convert(target, model=self._model, config=self._model.config))
        return made


def small_twin(module: nn.Module, sizes: Mapping[int, int]) -> nn.Module:
    """A copy of a module of experts, still without weights, that believes to have other widths: {old: new}.

    It computes with transformers' plain loop over the experts, the definition that the faster ways are held to.
    """
    twin = copy.deepcopy(module)
    for name, value in vars(module).items():
        if type(value) is int:
            setattr(twin, name, sizes.get(value, value))
    config: Any = getattr(twin, "config", None)
    if config is not None:
        config._experts_implementation = "eager"
    return twin


def tie(model: PreTrainedModel, absent: set[str]) -> None:
    """Tie the parameters that are absent from the checkpoint to their sources, as transformers does on loading."""
    model.tie_weights(missing_keys=absent, recompute_mapping=False)


def missing(name: str) -> BadInput:
    return BadInput(f"The checkpoint has no tensor for {name}.", "The model needs it.", CHECK_FILES)


class _Lazy:
    """What the loader takes in place of a tensor: read when it is indexed, and held by nobody else."""

    def __init__(self, weights: Weights, key: str) -> None:
        self.weights, self.key = weights, key

    def __getitem__(self, _: object) -> Tensor:
        return self.weights.get(self.key)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """transformers shows a bar for every load; one per block would drown ours."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _clean(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _clean(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in raw.items()
        if key not in _DROPPED_KEYS
    }


def _ignored(model: PreTrainedModel, target: str) -> bool:
    """Whether the model's own definition lists this key as one to leave out (multi-token prediction layers)."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, target) for pattern in patterns)


def _check_shape(key: str, weights: Weights, wanted: tuple[int, ...]) -> None:
    shape = tuple(weights.tensors[key].shape)
    if shape != wanted:
        raise BadInput(f"{_where(key, weights)} has shape {shape}.", f"config.json asks for {wanted}.", CHECK_FILES)


def _raise_extra_layer(key: str, weights: Weights, depth: int) -> None:
    what = f"{_where(key, weights)} belongs to a layer beyond the last."
    raise BadInput(what, f"config.json: num_hidden_layers is {depth}.", CHECK_FILES)


def _where(key: str, weights: Weights) -> str:
    return f"{Path(weights.tensors[key].file).name}: {key}"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"

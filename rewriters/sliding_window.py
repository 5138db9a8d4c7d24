"""A sliding window: a token attends to the last W only, and the cache of such a layer stops growing at W tokens.

No weight changes; the config says it, in the words of the model's type: `sliding_window`, and where the type has them
`layer_types` (which layers), `use_sliding_window` and `max_window_layers`. A type without `sliding_window` has no code for
it, in transformers or elsewhere, and is refused; so are sinks (the first tokens kept in every window, Xiao et al. 2024),
which no type's config can say. `infopt.recipes.rewrite_plan` proves on a block that the window is obeyed.
"""

from __future__ import annotations

from typing import Any

from infopt.errors import Unsupported, UsageError

FULL, SLIDING = "full_attention", "sliding_attention"


def window_settings(text: Any, window: int, every: int | None, sinks: int) -> dict[str, Any]:
    """The keys of config.json that make it so. text: the model's (text) config object.

    Raises Unsupported (the type cannot), UsageError (a window that is wider than what the model has).
    """
    kind = text.model_type
    if sinks:
        raise Unsupported(
            f"--sinks {sinks}",
            "no model type's config can say that the first tokens stay visible, so no engine would keep them",
            "leave --sinks out",
        )
    if not hasattr(text, "sliding_window"):
        raise Unsupported(
            f"--window {window}: the type {kind} has no sliding window",
            "its config has no `sliding_window`, and nothing would read one",
            "types that have it: mistral, mixtral, qwen2, qwen3, phi3, starcoder2, gemma2, gemma3",
        )
    types = getattr(text, "layer_types", None)
    depth = int(text.num_hidden_layers)
    if every is not None and types is None:
        raise Unsupported(
            f"--every {every}: the type {kind} has one window for all layers",
            "its config has no `layer_types`",
            "leave --every out",
        )
    _check_wider(text, window, types)
    settings: dict[str, Any] = {"sliding_window": window}
    if hasattr(text, "use_sliding_window"):
        settings["use_sliding_window"] = True
    if types is not None:
        settings["layer_types"] = [_layer_type(kind, types[i], i, every) for i in range(depth)]
    if hasattr(text, "max_window_layers"):
        settings["max_window_layers"] = 0  # the first layer that slides, where no `layer_types` are read
    return settings


def _layer_type(kind: str, now: str, i: int, every: int | None) -> str:
    if now not in (FULL, SLIDING):
        raise Unsupported(
            f"layer {i} of the {kind} model is of type {now}", "it has no window to set", "leave --window out"
        )
    return FULL if every is not None and (i + 1) % every == 0 else SLIDING


def _check_wider(text: Any, window: int, types: list[str] | None) -> None:
    active = getattr(text, "use_sliding_window", True) and (types is None or SLIDING in types)
    now = text.sliding_window
    if active and isinstance(now, int) and window > now:
        raise UsageError(
            f"--window {window}",
            f"the model's window is {now} already, and it was not trained on more",
            f"--window {now}",
        )

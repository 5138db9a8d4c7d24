"""A GPU that is none: tensors that say they are on "cuda" and lie in memory, for what happens between the kernels.

An operator of torch computes on the memory, one of infopt runs what it would run on a GPU: Triton's kernel by its
interpreter; the CUDA C++ one, which only a GPU or the emulator executes, by the operator's meaning. A tensor in memory that
meets one on the device is an error, as it would be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from infopt.kernels import operators

CUDA = torch.device("cuda")
_MEETS = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "to", "type_as")  # may cross

#: Methods that ask CUDA for something before they are an operator.
_GUARDED = (
    "__getitem__", "__setitem__", "__int__", "__float__", "__bool__", "__index__", "item", "tolist", "contiguous", "copy_",
)  # fmt: skip


class There(Tensor):
    """A tensor on the GPU; `here` is where it lies."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        with torch.inference_mode(False):  # so that it can be detached outside
            made = Tensor._make_wrapper_subclass(
                cls,
                here.shape,
                strides=here.stride(),
                storage_offset=here.storage_offset(),
                dtype=here.dtype,
                device=CUDA,
            )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.here.data_ptr()


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    space, _, name = func._schema.name.partition("::")
    if name == "_has_compatible_shallow_copy_type":
        return False  # a parameter that moves becomes another
    if space == "infopt":
        operator = getattr(operators, name)
        kernel: Callable[..., Any] = operator._backend_fns["cuda" if name != "tile_linear" else "cpu"]
    else:
        kernel = func
    tensors: list[Tensor] = []
    tree_map(lambda part: tensors.append(part) if isinstance(part, Tensor) else None, (args, kwargs))
    apart = [t for t in tensors if not isinstance(t, There) and t.dim()]
    assert not apart or name in _MEETS, f"{func} has {[tuple(t.shape) for t in apart]} in memory"
    asked = kwargs.get("device", next((part for part in args if isinstance(part, torch.device)), None))
    target = torch.device(asked) if asked is not None else CUDA
    if name == "copy_" and not isinstance(args[0], There):
        target = torch.device("cpu")
    done = kernel(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    pairs = {id(t.here): t for t in tensors if isinstance(t, There)}
    if target.type == "cpu":
        return args[0] if name == "copy_" else done
    return tree_map(lambda part: pairs.get(id(part), There(part)) if isinstance(part, Tensor) else part, done)


def _inner(part: Any) -> Any:
    if isinstance(part, There):
        return part.here
    return torch.device("cpu") if isinstance(part, torch.device) else part


class _Asked(TorchFunctionMode):
    """Tensors that are asked for on the GPU, which torch without CUDA would not make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in _GUARDED and isinstance(args[0], There):
            done = func(*tree_map(_inner, args))
            if done is args[0].here:
                return args[0]
            return There(done) if isinstance(done, Tensor) else done
        where = kwargs.get("device")
        moved = next((part for part in args if isinstance(part, torch.device)), None)
        name = getattr(func, "__name__", "")
        if name == "to" and where is None and len(args) > 1 and isinstance(args[1], str):
            moved = torch.device(args[1])
        asked = where if where is not None else moved
        if asked is None or torch.device(asked).type != "cuda" or name in ("__get__", "device", "_parse_to"):
            return func(*args, **kwargs)
        if args and isinstance(args[0], There) and name == "to":
            return func(
                *(part for part in args if part is not moved), **{k: v for k, v in kwargs.items() if k != "device"}
            )
        here = torch.device("cpu")
        if where is not None:
            kwargs["device"] = here
        made = func(
            *(here if part is moved or (part == str(moved) and name == "to") else part for part in args), **kwargs
        )
        return There(made) if isinstance(made, Tensor) else made


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, tensors can be asked for on "cuda"."""
    with _Asked():
        yield

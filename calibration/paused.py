"""A block's forward pass that stops where a space is first read, and goes on when it is told to.

GPTQ wants every layer to see inputs that the already quantized layers before it have made ("true sequential"). Done by
running the block again for every space, that costs as many passes as there are spaces. Here each batch's forward pass is
a coroutine (a greenlet, because the code to be stopped is transformers' own and knows nothing of it): all batches run to
the first reader of a space and stop, the space's statistics are complete, its readers are quantized in place, and all
batches go on through the quantized weights. One pass per block, whatever the block's architecture.

What a stopped pass holds is *parked*: the inputs of its layers that are still in use go to a file and their memory is
given back, for they are as large as the calibration set. The file's pages stay in memory that nothing else needs.

Legend: B windows of a batch, T tokens, C channels.
"""

from __future__ import annotations

import io
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from infopt.errors import Unsupported
from infopt.experts import experts_in
from infopt.memory import memory_of, release
from infopt.topology import Space, Topology

_FREED = 64 << 20  # bytes given up by stopped passes, after which the gaps that they leave go back to the system


@dataclass(frozen=True)
class Arrival:
    """A pass has reached the experts at `path`: their input and where the router sends its tokens."""

    path: str
    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


class ParkingFile:
    """A file without a name, so that nothing is left of it after a crash. One serves a batch in every block of a run: its
    pages are in memory already, and writing them again costs a quarter of what new ones do."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: io.FileIO | None = None

    def write(self, offset: int, x: torch.Tensor) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._file.seek(offset)
        self._file.write(memory_of(x))

    def read(self, offset: int, x: torch.Tensor) -> None:
        if self._file is not None:
            self._file.seek(offset)
            self._file.readinto(memory_of(x))


class Paused:
    """One batch on its way through a block: the forward pass `run` of its `hidden_BTC`. It parks in `file`."""

    def __init__(
        self, run: Callable[[torch.Tensor], torch.Tensor], hidden_BTC: torch.Tensor, file: ParkingFile
    ) -> None:
        self._greenlet = _greenlet_type()(run)
        self._first: tuple[torch.Tensor, ...] = (hidden_BTC,)
        self._held = self._greenlet.held = [weakref.ref(hidden_BTC)]
        self._file, self._end = file, 0
        # by tensor: where it lies in the file, and its version that lies there
        self._written: dict[weakref.ref[torch.Tensor], tuple[int, int]] = {}
        self._parked: list[weakref.ref[torch.Tensor]] = []

    def resume(self, given: torch.Tensor | None = None) -> tuple[Space, torch.Tensor] | Arrival | torch.Tensor:
        """Run to the next space: (the space, its input [B, T, C]); or to a layer of experts, whose answer is then to be
        `given`; at the end the block's output [B, T, C]."""
        self._unpark()
        arguments, self._first = self._first or ((given,) if given is not None else ()), ()
        answer: tuple[Space, torch.Tensor] | Arrival | torch.Tensor = self._greenlet.switch(*arguments)
        if isinstance(answer, Arrival):
            self._held.append(weakref.ref(answer.hidden))
        return answer

    @property
    def nbytes(self) -> int:
        """What `park` would give back."""
        return sum(x.nbytes for _, x in self._whole())

    def park(self) -> None:
        """Move what the stopped pass holds to the file; what lies there already, unchanged since, is not written again."""
        for ref, x in self._whole():
            if self._written.get(ref, (0, -1))[1] != x._version:
                self._written[ref] = (self._end, x._version)
                self._file.write(self._end, x)
                self._end += x.nbytes
            x.untyped_storage().resize_(0)
            self._parked.append(ref)

    def _unpark(self) -> None:
        for ref in self._parked:
            x = ref()
            if x is not None:
                x.untyped_storage().resize_(x.nbytes)
                self._file.read(self._written[ref][0], x)
        self._parked = []

    def _whole(self) -> Iterator[tuple[weakref.ref[torch.Tensor], torch.Tensor]]:
        """The known tensors that are still in use. Only whole storages: a view's memory belongs to others too."""
        alive = {id(x): (ref, x) for ref in self._held if (x := ref()) is not None}
        self._held[:] = [ref for ref, _ in alive.values()]
        for ref, x in alive.values():
            if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes:
                yield ref, x


class Held:
    """What stopped passes keep in memory, up to a limit; the rest is parked, and gaps in the heap are given back."""

    def __init__(self, limit: int) -> None:
        self._limit, self._freed = limit, 0
        self._held: dict[str, int] = defaultdict(int)

    def park(self, place: str, forward: Paused) -> None:
        size = forward.nbytes
        if self._held[place] + size <= self._limit:
            self._held[place] += size
            return
        forward.park()
        self._freed += size
        if self._freed > _FREED:
            self._freed = 0
            release()


@contextmanager
def stops(block: nn.Module, topology: Topology) -> Iterator[None]:
    """Inside the context a pass through the block stops at each space's first reader, and once at a layer of experts,
    which `infopt.calibration.routed` then runs in its place. Every layer's input is known."""
    leaves = [module for module in block.modules() if not any(module.children())]
    handles = [module.register_forward_pre_hook(_note_input) for module in leaves]
    experts = experts_in(block)
    for path, module in experts.items():
        module.delegate = _arrive_at(path)
    for space in topology.spaces:
        if not space.readers[0].startswith(tuple(f"{path}." for path in experts)):
            handles.append(block.get_submodule(space.readers[0]).register_forward_pre_hook(_stop_at(space)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in experts.values():
            module.delegate = None


def _note_input(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    held = getattr(_greenlet_type().getcurrent(), "held", None)  # None where experts run between two stops
    if args and held is not None:
        held.append(weakref.ref(args[0]))


def _stop_at(space: Space) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        _greenlet_type().getcurrent().parent.switch((space, args[0]))

    return hook


def _arrive_at(path: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    def arrive(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = _greenlet_type().getcurrent().parent.switch(Arrival(path, hidden, index, weights))
        return answer

    return arrive


def _greenlet_type() -> Any:
    try:
        from greenlet import greenlet
    except ImportError:
        raise Unsupported(
            "The package greenlet is not installed.",
            "Quantizing space by space stops the model's own code in the middle.",
            "Install it with `pip install greenlet`, or use `--sequential block`.",
        ) from None
    return greenlet

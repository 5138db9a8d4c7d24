"""Two lanes that share the processor, half of the cores each: the batches of a pass travel on them.

Much of what happens between two matrix products is short: many cores on one short operation wait for one another, and
where another process has taken one of them, all the others wait for that one (GPTQ of SmolLM2 beside one busy process took
three times longer that way). Two things at a time, each on half of the cores, wait half as often, and one lane reads its
file while the other one computes.

There are always two lanes, whatever the machine. Work number n goes on lane n % 2, in order. Where sums are made, each
lane has its own, and they are added in the order of the lanes: so a result depends neither on which thread was faster nor
on whether there were two. A lane is one thread for as long as it exists, because a stopped forward pass
(`infopt.calibration.paused`) can only go on in the thread where it began.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

LANES = 2
_WEIGHTS_PER_CORE = 1 << 21


class Lanes:
    """The threads; made when first needed, gone when nobody refers to them."""

    def __init__(self) -> None:
        self._threads: list[ThreadPoolExecutor] = []
        self._cores = torch.get_num_threads()
        self._here = threading.local()
        self._stop = threading.Event()

    @property
    def current(self) -> int:
        """The lane that the caller runs on."""
        lane: int = self._here.lane
        return lane

    @property
    def number(self) -> int | None:
        """The number that the caller works on, None outside of the lanes."""
        return getattr(self._here, "number", None)

    def over(self, numbers: Iterable[int], work: Callable[[int], object]) -> None:
        """`work(n)` for every n, without gradients, in order on each lane; the first error is raised here."""
        todo: list[list[int]] = [[] for _ in range(LANES)]
        for n in numbers:
            todo[n % LANES].append(n)
        if not self._threads:
            self._threads = [ThreadPoolExecutor(1, "lane") for _ in range(min(LANES, self._cores))]
        self._stop.clear()
        with self._shared_out():
            running = [self._threads[lane % len(self._threads)].submit(self._run, lane, todo[lane], work)
                       for lane in range(LANES)]  # fmt: skip
            try:
                for done in running:
                    done.result()
            except BaseException:  # an interrupt too: nobody may be left working on what the caller now takes down
                self._stop.set()
                wait(running)
                raise

    def _run(self, lane: int, numbers: list[int], work: Callable[[int], object]) -> None:
        self._here.lane = lane
        torch.set_num_threads(self._share)
        try:
            with torch.no_grad():
                for n in numbers:
                    if self._stop.is_set():
                        return
                    self._here.number = n
                    work(n)
        except BaseException:
            self._stop.set()
            raise

    @property
    def _share(self) -> int:
        return self._cores // max(len(self._threads), 1)

    @contextmanager
    def _shared_out(self) -> Iterator[None]:
        """Each lane has its share of the cores. The number is the thread's own for OpenMP, but everybody's for MKL."""
        torch.set_num_threads(self._share)
        try:
            yield
        finally:
            torch.set_num_threads(self._cores)


@contextmanager
def enough_cores(weights: int) -> Iterator[None]:
    """No more cores than so many weights keep busy: a solver makes thousands of short operations, and on too many cores
    it does nothing but wait at their ends. Thirteen times longer, for SmolLM2 on two cores of which one was taken."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, min(cores, weights // _WEIGHTS_PER_CORE)))
    try:
        yield
    finally:
        torch.set_num_threads(cores)

"""Memory by hand: giving freed memory back to the system, and a tensor's bytes.

glibc keeps freed pieces of up to 32 MiB for itself, once it has seen larger ones freed, and a decoder block is made of
such pieces: streaming a 135M model through one block at a time grew from 450 to 950 MB of resident memory, all of it
free, in the gaps between small things that live on. Asking for the gaps after every block costs a few milliseconds and
stays at 400 MB. Refused: a small fixed threshold (`mallopt`), which costs a quarter more time in page faults.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_KEPT = 32 << 20  # the largest threshold that glibc accepts


def release() -> None:
    """Return what was freed to the system, where the C library can (glibc); elsewhere nothing happens."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def one_heap() -> None:
    """Let all threads of the process take memory from one heap (glibc), and keep what is freed until `release`.

    Each thread's own heap keeps its own gaps, a tenth of the memory that quantizing needs; and giving back every few
    megabytes that a batch freed, to take them again for the next one, is a sixth of the time (page faults). For a
    program's first lines, not for a library's.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-8, 1)  # M_ARENA_MAX
            mallopt(-3, _KEPT)  # M_MMAP_THRESHOLD: smaller pieces come from the heap
            mallopt(-1, _KEPT)  # M_TRIM_THRESHOLD: free memory at its end, from which on some is given back


def available() -> int | None:
    """Bytes that this process can still take, by the system and by a container's limit; None where nobody says."""
    limits = []
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    most, used = group / "memory.max", group / "memory.current"
    if most.exists() and used.exists() and (limit := most.read_text().strip()).isdigit():
        pages = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        held = int(used.read_text()) - int(pages.get("inactive_file", 0))  # files that were read may be dropped
        limits.append(max(0, int(limit) - held))
    return min(limits) if limits else None


def memory_of(x: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """A contiguous tensor's bytes, to be read or written in place while the tensor lives.

    Not by way of numpy, which fixes the size of a storage for good.
    """
    return (ctypes.c_char * x.nbytes).from_address(x.data_ptr())


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes in the order in which files have them, uint8 [nbytes]; of any device and strides.

    `contiguous` would leave a single element whatever strides it had, with which its bytes cannot be viewed.
    """
    import torch

    flat = x.detach().cpu().reshape(-1)
    return (flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)

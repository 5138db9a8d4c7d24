"""Where a model runs: what a user asks for, whether it is there, and what its failures mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from infopt.errors import OutOfResources, Unsupported
from infopt.memory import available

#: What the driver says, as torch hands it on, where no memory is the reason.
_DRIVER = ("CUDA error", "CUDA driver", "NVIDIA driver", "Found no NVIDIA")


def find_device(name: str) -> torch.device:
    """The device of this name, "cpu", "cuda" or "cuda:1"; Unsupported with the reason where it cannot be used."""
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise Unsupported(f"--device {name}", "infopt runs on processors and on NVIDIA GPUs.", "--device cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} was built without CUDA."
        raise Unsupported(f"--device {name}", why, "Install torch for CUDA (pytorch.org), or --device cpu.")
    if not torch.cuda.is_available():
        why = "torch sees no NVIDIA GPU: there is none, or its driver is missing or too old (nvidia-smi tells)."
        raise Unsupported(f"--device {name}", why, "--device cpu")
    if int(number or 0) >= torch.cuda.device_count():
        why = f"There are {torch.cuda.device_count()} GPUs, counted from 0."
        raise Unsupported(f"--device {name}", why, "--device cuda:0")
    if torch.cuda.get_device_capability(int(number or 0)) < (8, 0):
        raise Unsupported(f"--device {name}", "The kernels need compute capability 8.0 or newer.", "--device cpu")
    return torch.device("cuda", int(number or 0))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken there, None where nobody says."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and torch.cuda.is_available() else available()


@contextmanager
def device_errors(device: torch.device) -> Iterator[None]:
    """Memory that a GPU does not have, or a driver that fails, as an error that a user can understand."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = str(error).partition(".")[0][:200]
        fix = "Try --precision packed, --kv-cache int8, shorter texts, or --device cpu."
        raise OutOfResources(f"{device} is out of memory", why, fix) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _DRIVER):
            raise OutOfResources(f"{device} failed", str(error).partition("\n")[0][:200], "--device cpu") from error
        raise


def wait(device: torch.device) -> None:
    """Until everything that was asked of the device is done."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)

"""`infopt doctor`: what infopt has to work with on this machine, for the user and for a bug report.

It names no user, host or path of theirs except the folder whose disk is measured, so its output can be pasted anywhere.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = (
    "infopt", "torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "datasets", "numpy", "gguf",
    "compressed-tensors",
)  # fmt: skip
_FEATURES = ("avx2", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "i8mm",
             "bf16", "sve")  # fmt: skip


def doctor(
    folder: Annotated[Path, typer.Option(help="Measure the free space of the disk that holds this folder.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Show versions, processor, memory, disk and GPU: what a bug report needs.

    Example: infopt doctor --json
    """
    from infopt.errors import BadInput
    from infopt.report import json_out, table

    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder", "its disk was to be measured", "infopt doctor --folder .")
    found = examine(folder)
    if as_json:
        json_out(found)
        return
    table("versions", ["package", "version"], [(k, v or "not installed") for k, v in found["versions"].items()])
    table("machine", ["what", "found"], list(_lines(found)))


def examine(folder: Path) -> dict[str, Any]:
    """Everything that the command shows; sizes in bytes, None where it cannot be told."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": {"folder": str(folder), "free": shutil.disk_usage(folder).free},
        "gpus": _gpus(),
        "hub_offline": os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    facts = _read_pairs(Path("/proc/cpuinfo"))
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    return {
        "model": facts.get("model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [feature for feature in _FEATURES if feature in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def _memory() -> dict[str, int | None]:
    """Physical memory, and the limit of the container where there is one: a run is killed at the smaller."""
    facts = _read_pairs(Path("/proc/meminfo"))
    kib = {name: int(value.split()[0]) for name, value in facts.items() if value.endswith(" kB")}
    return {
        "total": kib["MemTotal"] * 1024 if "MemTotal" in kib else None,
        "available": kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None,
        "container_limit": _container_limit(),
    }


def _container_limit() -> int | None:
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit() and int(text) < 2**60:  # version 1 writes "no limit" as a number near 2^63
            return int(text)
    return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "memory": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _read_pairs(path: Path) -> dict[str, str]:
    """`name : value` lines, the first of each name; empty where the system has no such file."""
    pairs: dict[str, str] = {}
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon:
                pairs.setdefault(name.strip(), value.strip())
    return pairs


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, memory = found["cpu"], found["memory"]
    gpus = [f"{g['name']}, {_gib(g['memory'])}, compute capability {g['capability']}" for g in found["gpus"]]
    return [
        ("system", found["system"]),
        ("processor", cpu["model"] or "unknown"),
        ("cores", f"{cpu['cores']} usable, {cpu['torch_threads']} threads in torch"),
        ("instructions", f"{' '.join(cpu['features']) or 'unknown'} (torch uses {cpu['torch_capability']})"),
        ("memory", f"{_gib(memory['total'])}, {_gib(memory['available'])} available"),
        ("container limit", _gib(memory["container_limit"]) if memory["container_limit"] else "none"),
        ("free disk", f"{_gib(found['disk']['free'])} at {found['disk']['folder']}"),
        ("gpu", "; ".join(gpus) or "none: everything runs on the processor"),
        ("hub", "offline (HF_HUB_OFFLINE)" if found["hub_offline"] else "online"),
    ]


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"

"""CUDA C++ at run time: compiled by NVRTC when a kernel is first used, kept on disk, started through the driver.

No build step and no toolkit on the user's machine. NVRTC comes with every CUDA build of torch (or alone, as the package
nvidia-cuda-nvrtc), the driver with the GPU, and both are called through ctypes: eight functions of the one, three of the
other. Our sources include nothing of the toolkit, so no headers are looked for. torch's own `torch.cuda._compile_kernel`
does the same, but is private, keeps nothing on disk and needs a GPU to compile for.

Compiling needs no GPU, so the tests compile for every architecture that is supported. What is kept on disk lies under a
name made of the source, the architecture, the options and NVRTC's version, with its own sha256, and is written under
another name first: a file that was cut short or changed is compiled again.

Errors: `Unsupported` (exit 4) without a driver, without NVRTC, for a GPU that is too old, or newer than NVRTC or the driver
know; `OutOfResources` (exit 5) where the GPU's memory or registers do not suffice. That our source does not compile is
a bug and a RuntimeError with the compiler's log.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from infopt.errors import OutOfResources, Unsupported

OLDEST = 80  # sm_80: the tensor cores' m16n8k16 and bf16
_ENTRY = b"kernel"  # the one extern "C" function of every source
_OPTIONS = ("--std=c++17", "--ptxas-options=-v")
_OUT_OF_MEMORY, _OUT_OF_LAUNCH_RESOURCES = 2, 701
_NOT_FOR_THIS_GPU = {209: "no machine code for it", 218: "machine code that it cannot read", 222: "a newer compiler"}
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Source:
    """A translation unit with one `extern "C" __global__` function called `kernel`, and the headers that it includes."""

    text: str
    headers: tuple[tuple[str, str], ...] = ()  # (name, text)


@dataclass(frozen=True)
class Binary:
    """Machine code, and what the compiler said of its registers (empty where it comes from the disk)."""

    cubin: bytes
    log: str = ""


# --- the compiler -------------------------------------------------------------------------------------------------


class Nvrtc:
    """One libnvrtc. `compile` is a function of its arguments alone and needs no GPU."""

    def __init__(self, path: str) -> None:
        # It opens its second library by name, which is found where it was opened before, and not beside the first one.
        self._builtins = [ctypes.CDLL(str(part)) for part in Path(path).parent.glob("libnvrtc-builtins.so*")]
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @functools.cached_property
    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    @functools.cached_property
    def architectures(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return tuple(found)

    def compile(self, source: Source, architecture: int) -> Binary:
        """Machine code for sm_<architecture>."""
        program = ctypes.c_void_p()
        names, texts = (_strings([header[i] for header in source.headers]) for i in (0, 1))
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program), source.text.encode(), b"infopt.cu", len(source.headers), texts, names,
        )  # fmt: skip
        try:
            options = (f"--gpu-architecture=sm_{architecture}", *_OPTIONS)
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
            if status:
                raise RuntimeError(f"a kernel does not compile for sm_{architecture}:\n{log}")
            return Binary(self._text(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN"), log)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, size_of: str, get: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(size_of, program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(get, program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: {self._library.nvrtcGetErrorString(status).decode()}")


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))


def find_nvrtc(paths: Sequence[str] = tuple(sys.path)) -> Iterator[str]:
    """Where libnvrtc may be: in the packages that torch brings along, then wherever the system's loader finds one."""
    for folder in map(Path, paths):
        for pattern in ("nvidia/*/lib/libnvrtc.so.*", "torch/lib/libnvrtc*.so*"):
            yield from (str(path) for path in sorted(folder.glob(pattern), reverse=True) if "builtins" not in path.name)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12")


@functools.cache
def nvrtc() -> Nvrtc:
    """The first libnvrtc that loads."""
    for path in find_nvrtc():
        with suppress(OSError):
            return Nvrtc(path)
    raise Unsupported(
        "The kernels for GPUs cannot be compiled: there is no NVRTC.",
        "It comes with every CUDA build of torch; this torch has none.",
        "pip install nvidia-cuda-nvrtc",
    )


# --- on disk ------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where machine code is kept, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infopt" / "kernels"


def compiled(source: Source, architecture: int, folder: Path | None = None, compiler: Nvrtc | None = None) -> Binary:
    """`source` for sm_<architecture>: from the disk, or compiled and put there (if that is possible)."""
    compiler = compiler or nvrtc()
    path = (folder or cache_folder()) / f"{_key(source, architecture, compiler.version)}.cubin"
    with suppress(OSError):
        stored = path.read_bytes()
        if hashlib.sha256(stored[_DIGEST:]).digest() == stored[:_DIGEST]:
            return Binary(stored[_DIGEST:])
    binary = compiler.compile(source, architecture)
    with suppress(OSError):  # a full or read-only disk costs the time of compiling, nothing else
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write(path, hashlib.sha256(binary.cubin).digest() + binary.cubin)
    return binary


def _key(source: Source, architecture: int, version: str) -> str:
    return hashlib.sha256(repr((source, architecture, _OPTIONS, version)).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


# --- the GPU ------------------------------------------------------------------------------------------------------


@functools.cache
def driver() -> ctypes.CDLL:
    """libcuda, initialized."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unsupported("There is no NVIDIA driver on this machine.", str(error), "nvidia-smi") from error
    check(library.cuInit(0), library, "the driver does not start")
    return library


def check(status: int, library: ctypes.CDLL, doing: str) -> None:
    """An error of the driver as one of ours."""
    if not status:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    reason = f"CUDA error {status}: {(text.value or b'unknown').decode()}"
    if status in (_OUT_OF_MEMORY, _OUT_OF_LAUNCH_RESOURCES):
        raise OutOfResources(f"The GPU has no room: {doing}.", reason, "use a smaller batch or model")
    if status in _NOT_FOR_THIS_GPU:
        raise Unsupported(f"The GPU's driver refuses a kernel: {doing}.", reason, "update the NVIDIA driver")
    if doing == "the driver does not start":
        raise Unsupported("No GPU can be used.", reason, "nvidia-smi")
    raise RuntimeError(f"{doing}: {reason}")


def supported(capability: tuple[int, int], known: Sequence[int]) -> int:
    """The architecture to compile for: the newest that the GPU runs and NVRTC knows. Machine code runs on later minor
    versions of its major one and nowhere else."""
    major, minor = capability
    if major * 10 + minor < OLDEST:
        raise Unsupported(
            f"The GPU has compute capability {major}.{minor}.", f"The kernels need {OLDEST / 10} or newer.",
            "keep the weights on the processor",
        )  # fmt: skip
    fitting = [arch for arch in known if arch // 10 == major and arch % 10 <= minor]
    if not fitting:
        raise Unsupported(
            f"The GPU has compute capability {major}.{minor}.",
            f"NVRTC knows no architecture that runs on it (it knows up to {max(known) / 10}).",
            "install a newer torch",
        )
    return max(fitting)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which one, and a union of 64 bytes of which at most three numbers are used."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    ]  # fmt: skip


_CLUSTER, _EARLY = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, .._PROGRAMMATIC_STREAM_SERIALIZATION


@dataclass(frozen=True)
class Kernel:
    """A function on one GPU. Its only parameter is a structure, passed by value."""

    handle: ctypes.c_void_p

    def launch(
        self, blocks: int, threads: int, stream: int, arguments: ctypes.Structure, cluster: int = 1, early: bool = False
    ) -> None:
        """Asynchronous, on `stream` of the context that is current (torch's). cluster: blocks that run together.
        early: it may begin before the kernel before it has ended, and waits for that itself (programmatic dependent launch)."""
        attributes = (_Attribute * 2)(_Attribute(_CLUSTER, 0, (cluster, 1, 1)), _Attribute(_EARLY, 0, (early,)))
        shape = _Launch((blocks, 1, 1), (threads, 1, 1), 0, stream, attributes, 2 if early else cluster > 1)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        library = driver()
        status = library.cuLaunchKernelEx(ctypes.byref(shape), self.handle, pointers, None)
        check(status, library, "a kernel does not start")


def load(binary: Binary) -> Kernel:
    """The machine code on the GPU whose context is current; it stays there as long as the process."""
    library = driver()
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    check(library.cuModuleLoadData(ctypes.byref(module), binary.cubin), library, "machine code is not loaded")
    check(library.cuModuleGetFunction(ctypes.byref(handle), module, _ENTRY), library, "a kernel is not found")
    return Kernel(handle)

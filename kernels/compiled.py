"""A C++ source, compiled when it is first used, by whatever compiler the machine has, and kept for the next time.

`library(source)` is None where there is no compiler, or none that can do it; whoever asks has another way. What was built
is kept in the user's cache folder under a name made of everything that decides it: the source and what it includes, the
command, and what the compiler says when it is asked for its definitions, which tells its version and the instructions of this
processor. A file appears under its name whole or not at all, so processes may race; one that cannot be loaded is built again.

OpenMP's functions are left open, to be found in the library that torch has loaded already: two would each keep their own
threads, which wait for work by spinning and take the processor from the other.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_COMPILERS = ("c++", "g++", "clang++")
_ALWAYS = ("-O2", "-ftree-vectorize", "-std=c++17", "-fPIC", "-fno-math-errno", "-Wno-psabi")
#: The best first; the last is for a compiler that knows neither this processor nor OpenMP (one thread then).
_ATTEMPTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
_SECONDS = 120


@dataclass(frozen=True)
class Library:
    """What was loaded, and who made it: "g++ 12.2.0"."""

    functions: ctypes.CDLL
    compiler: str


def cache_folder() -> Path:
    """Where libraries are kept, by the convention for a user's caches."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "infopt" / "compiled"


def compilers() -> Iterator[str]:
    """The compilers on this machine, $CXX first."""
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        if name and (path := shutil.which(name)):
            yield path


def library(source: Path, folder: Path, found: Sequence[str], flags: Sequence[str] = ()) -> Library | None:
    """The library of a C++ file. folder: of libraries kept; found: compilers to try; flags: instead of this processor's."""
    attempts = (tuple(flags),) if flags else _ATTEMPTS
    with suppress(OSError):  # a home that cannot be written to: it is built again in every process
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for compiler in found:
        for attempt in attempts:
            made = _library(source, folder, [compiler, *_ALWAYS, *attempt])
            if made is not None:
                return made
    return None


def _library(source: Path, folder: Path, command: list[str]) -> Library | None:
    about = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    if about is None:
        return None
    parts = [about, "\0".join(command), torch.__version__]
    parts += [path.read_text() for path in sorted(source.parent.iterdir()) if path.suffix in (".cpp", ".h")]
    path = folder / f"{source.stem}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}.so"
    name = Path(command[0]).name + _version(about)
    with suppress(OSError):
        return Library(ctypes.CDLL(str(path)), name)
    keep = os.access(folder, os.W_OK)
    try:
        with tempfile.TemporaryDirectory(dir=folder if keep else None) as place:
            made = Path(place) / path.name
            objects = made.with_suffix(".o")
            if _run([*command, "-c", str(source), "-o", str(objects)]) is None:
                return None
            if _run([command[0], "-shared", *_UNDEFINED, str(objects), "-o", str(made)]) is None:
                return None
            loaded = ctypes.CDLL(str(made))  # raises OSError where a function is nowhere to be found
            if keep:
                os.replace(made, path)
        return Library(loaded, name)
    except OSError:
        return None


#: Functions that torch's libraries bring are looked up when this one is loaded, not when they are called.
_UNDEFINED = ("-Wl,-undefined,dynamic_lookup",) if platform.system() == "Darwin" else ("-Wl,-z,now",)


def _version(about: str) -> str:
    """ " 12.2.0" of a compiler's definitions."""
    words = (line.split() for line in about.splitlines())
    values = {each[1]: each[2] for each in words if len(each) == 3}
    prefix = "__clang_{}__" if "__clang_major__" in values else "__GNUC{}__"
    names = ("major", "minor", "patchlevel") if "__clang_major__" in values else ("", "_MINOR", "_PATCHLEVEL")
    parts = [values.get(prefix.format(name), "") for name in names]
    return f" {'.'.join(part for part in parts if part)}"


def _run(command: Sequence[str]) -> str | None:
    """What the command says, None where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None

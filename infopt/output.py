"""An output folder is complete or absent.

A run writes into `OUT.infopt-work/`, beside the final name and so on the same filesystem. When everything is there, the
folder gets a manifest (a sha256 of each file), all of it is synced to disk, and one `rename` gives it its name. Whoever
looks at OUT at any moment, and after any crash, finds nothing, the old result, or the new one, but no mixture.

    with OutputFolder(out, overwrite=False, source=model_folder) as o:
        ...write files into o.stage, and state for a resume into o.work...
        o.commit()

Without `commit()` the work folder stays, for the next run to resume from; `discard()` removes it. It is locked with
`flock`, which the kernel releases however the process ends, so there are no stale locks. The lock is taken before the
work is looked at and held until the work folder is gone.

With `overwrite=True` the old folder is moved into the work folder, the new one is renamed, and only then is the old one
deleted. A crash between the two renames leaves OUT absent; the next run puts the old folder back before anything else.
Only a folder that infopt made (its manifest says so) is ever overwritten: `-o ~ --overwrite` deletes nothing.

Files inside appear by rename too (`atomic_file`), so a file that has its name is whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from infopt.checkpoint import contained
from infopt.errors import BadInput, OutOfResources, UsageError, VerificationFailed
from infopt.header import look, open_regular, read_into, read_json, show
from infopt.writer import (
    CHUNK,
    PARTIAL,
    atomic_file,
    free_space_check,
    merge_shards,
    os_errors,
    sync,
    write_json,
    write_safetensors,
)

__all__ = [
    "MANIFEST",
    "OutputFolder",
    "atomic_file",
    "check_manifest",
    "free_space_check",
    "merge_shards",
    "update_manifest",
    "write_json",
    "write_manifest",
    "write_safetensors",
]

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "infopt-manifest-1"


class OutputFolder:
    """The place where a run writes, and the one step that makes its result visible (see the module).

    `resumed` tells whether an earlier run left something in `work`. Raises UsageError (OUT is in use, in the way, or
    overlaps the input) and OutOfResources (locked by another run, no permission, disk full).
    """

    def __init__(self, out: Path, overwrite: bool = False, source: Path | None = None) -> None:
        self.out = Path(os.path.realpath(out))
        self.overwrite = overwrite
        self.resumed = False
        if not self.out.name or os.path.ismount(self.out):
            why = "It is the root or a mount point, which a rename cannot replace."
            raise UsageError(
                f"{out} cannot be the output", why, f"Choose a new folder in it: -o {quote(str(self.out / 'model'))}"
            )
        if source is not None:
            _check_apart(self.out, Path(os.path.realpath(source)))
        self.work = self.out.with_name(self.out.name + ".infopt-work")
        self.stage = self.work / "out"
        self._old = self.work / "old"
        self._lock_path = self.work / "lock"
        self._clearing = self.work / "clearing"
        self._lock: int | None = None

    def __enter__(self) -> OutputFolder:
        if not os.path.lexists(self.work):
            self._check_free()  # before anything is created
        with os_errors(self.work):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            try:
                self._recover()
                self._check_free()
                self.stage.mkdir(exist_ok=True)
                self.resumed = not self._nothing_left()
                for path in self.work.rglob("*" + PARTIAL):
                    path.unlink()
            except BaseException:
                self._release()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def commit(self) -> None:
        """Make the stage the output: manifest, sync, rename; then remove the work folder.

        On failure the old output is where it was, the new one is kept in `stage`, and an InfoptError says so.
        """
        if self._lock is None:
            raise RuntimeError("commit() belongs inside `with OutputFolder(...)`, once")
        with os_errors(self.out):
            write_manifest(self.stage)
            _sync_tree(self.stage)
            self._check_free()
            moved = self.out.is_dir() and any(self.out.iterdir())
            if moved:
                os.rename(self.out, self._old)
            try:
                os.rename(self.stage, self.out)
            except OSError as err:
                if moved:
                    os.rename(self._old, self.out)
                if err.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                fix = f"mv -T {quote(str(self.stage))} {quote(str(self.out) + '-2')}"
                raise UsageError(f"{self.out} appeared during the run", f"The result is in {self.stage}.", fix) from err
            sync(self.out.parent)
        with os_errors(self.work, f"{self.out} is complete, but its work folder remains"):
            self._clear()
            self._release()

    def discard(self) -> None:
        """Remove the work folder with everything that a resume would have used."""
        with os_errors(self.work):
            self._clear()
            self._release()

    def _check_free(self) -> None:
        if not os.path.lexists(self.out):
            return
        other = f"-o {quote(str(self.out) + '-2')}"
        if not self.out.is_dir():
            raise UsageError(
                f"{self.out} exists and is not a folder", "The output is a folder.", f"Choose another: {other}"
            )
        with os_errors(self.out):
            if not any(self.out.iterdir()):
                return
        if not self.overwrite:
            why = "Nothing is overwritten unless asked."
            raise UsageError(f"{self.out} exists and is not empty", why, f"Choose another ({other}) or add --overwrite")
        try:
            _read_manifest(self.out)
        except VerificationFailed as err:
            why = f"It has no {MANIFEST} of infopt, so infopt did not make it and will not delete it."
            raise UsageError(f"{self.out} will not be overwritten", why, f"Choose another: {other}") from err

    def _take_lock(self) -> None:
        while self._lock is None:
            with suppress(FileExistsError):
                self.work.mkdir(mode=0o700)
            status = self.work.lstat()
            if not stat.S_ISDIR(status.st_mode) or os.geteuid() not in (0, status.st_uid):
                raise UsageError(f"{self.work} is not yours", "Its state will not be trusted.", look(self.work))
            try:
                fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:
                continue  # another run has just finished and removed the folder
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip()
                os.close(fd)
                why = f"Process {holder or 'unknown'} holds {self._lock_path}."
                fix = f"Wait for it, or choose another output: -o {quote(str(self.out) + '-2')}"
                raise OutOfResources(f"{self.out} is being written by another run", why, fix) from err
            except OSError:
                os.close(fd)
                raise
            if _same_file(fd, self._lock_path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                self._lock = fd
            else:
                os.close(fd)  # the run that held this lock has finished and removed it

    def _recover(self) -> None:
        """Finish what a crash inside `commit` left: before its second rename undo, after it complete."""
        if self._clearing.exists():
            self._clear()
        if self._old.exists():
            if not os.path.lexists(self.out):
                os.rename(self._old, self.out)
            elif self.stage.exists():
                why = f"The former result is in {self._old}, and something else has taken its name since."
                raise UsageError(f"{self.out} changed while a commit was interrupted", why, look(self._old))
        if self.out.is_dir() and not self.stage.exists():
            self._clear()

    def _clear(self) -> None:
        """Empty the work folder. The mark makes it one step: half of a state is never taken for a state."""
        self._clearing.touch()
        for path in self.work.iterdir():
            if path in (self._lock_path, self._clearing):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._clearing.unlink()

    def _nothing_left(self) -> bool:
        rest = set(self.work.iterdir()) - {self._lock_path, self.stage}
        return not rest and not (self.stage.exists() and any(self.stage.iterdir()))

    def _release(self) -> None:
        """Unlock; where nothing is left to resume from, remove the work folder, the lock with it while it is held."""
        if self._lock is None:
            return
        with suppress(OSError):  # a folder that cannot be removed stays, which harms nothing
            if self._nothing_left():
                if self.stage.exists():
                    self.stage.rmdir()
                self._lock_path.unlink()
                self.work.rmdir()
        os.close(self._lock)
        self._lock = None


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and sha256 of every file below `folder` that is not hidden.

    BadInput for a link out of the folder, a pipe and the like.
    """
    names = [name for name in _files_below(folder) if name != MANIFEST]
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "files": {name: _digest(folder, name) for name in names}})


def update_manifest(folder: Path, name: str) -> None:
    """Enter one file anew, after it was rewritten on purpose; the others are neither read nor re-blessed."""
    files = _read_manifest(folder)
    files[name] = _digest(folder, name)
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))})


def check_manifest(folder: Path) -> None:
    """Compare every file with `manifest.json`: VerificationFailed names the first that is missing, changed or added.

    Hidden files and Markdown may be added (a download or a person leaves them; no loader reads them).
    """
    files = _read_manifest(folder)
    for name, entry in files.items():
        try:
            actual = _digest(folder, name)
        except BadInput as err:
            raise VerificationFailed(f"{folder / name} cannot be read", str(err), look(folder)) from err
        for key in ("size", "sha256"):
            if actual[key] != entry.get(key):
                why = f"Its {key} is {actual[key]}, the manifest says {show(entry.get(key))}."
                raise VerificationFailed(
                    f"{folder / name} was changed after it was written", why, "Quantize or fetch it again."
                )
    for name in _files_below(folder):
        if name not in files and name != MANIFEST and not name.endswith(".md"):
            why = "It is not in the manifest, so infopt did not write it."
            raise VerificationFailed(f"{folder / name} was added", why, f"rm {quote(str(folder / name))}")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    try:
        manifest = read_json(contained(folder, MANIFEST))
    except BadInput as err:
        raise VerificationFailed(f"{path} cannot be read", str(err), look(folder)) from err
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") == MANIFEST_FORMAT else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise VerificationFailed(
            f"{path} is not a manifest of infopt", f"Its format is not {MANIFEST_FORMAT}.", look(path)
        )
    return files


def _digest(folder: Path, name: str) -> dict[str, Any]:
    digest, offset = hashlib.sha256(), 0
    path = contained(folder, name)
    with open_regular(path) as fd:
        size = os.fstat(fd).st_size
        buffer = memoryview(bytearray(min(CHUNK, size)))
        while offset < size:
            chunk = buffer[: min(CHUNK, size - offset)]
            read_into(fd, path, chunk, offset)
            digest.update(chunk)
            offset += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _files_below(folder: Path) -> list[str]:
    """Relative names of all files that are not hidden, sorted."""
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [name for name in folders if (Path(root) / name).is_symlink()]  # walk lists it, but does not enter
        found += [str((Path(root) / name).relative_to(folder)) for name in files if not name.startswith(".")]
    return sorted(found)


def _check_apart(out: Path, source: Path) -> None:
    if out == source:
        raise UsageError(f"{out} is also the input", "An input is never changed.", f"-o {quote(str(out) + '-2')}")
    if out.is_relative_to(source) or source.is_relative_to(out):
        inner, outer = ("output", "input") if out.is_relative_to(source) else ("input", "output")
        place = quote(str(source.parent / (source.name + "-out")))
        raise UsageError(f"the {inner} lies in the {outer}", f"{out} and {source} must be apart.", f"-o {place}")


def _same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(root) / name)
        sync(Path(root))

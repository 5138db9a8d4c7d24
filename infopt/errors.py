"""Every failure that a user can cause or meet, with its exit code.

An error says three things: *what* is wrong (naming the file, tensor or flag), *why*, and *fix*, the next thing to type.
Anything that is not an `InfoptError` is a bug and shows a traceback.
"""

from __future__ import annotations


class InfoptError(Exception):
    """A failure with a documented exit code; `str()` gives its three parts on up to three lines."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__("\n".join(part for part in (what, why, fix) if part))


class UsageError(InfoptError):
    """A flag, recipe or argument that makes no sense (exit 2)."""

    exit_code = 2


class BadInput(InfoptError):
    """A file, folder or dataset that is missing, malformed or unsafe (exit 3)."""

    exit_code = 3


class Unsupported(InfoptError):
    """A valid request that infopt cannot carry out (exit 4)."""

    exit_code = 4


class OutOfResources(InfoptError):
    """Not enough disk, memory or device, or the output is held by another run (exit 5)."""

    exit_code = 5


class VerificationFailed(InfoptError):
    """The written bytes are not what was meant to be written (exit 6)."""

    exit_code = 6


class GateFailed(InfoptError):
    """The result is intact, but worse than a gate that the user set (exit 7)."""

    exit_code = 7

"""The `infopt` command: one thin file per sub-command, and the one place where errors become exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from infopt.errors import BadInput, InfoptError, OutOfResources

#: sub-command -> (module in this folder, function, the line that `infopt --help` shows). Modules are imported when used.
COMMANDS = {
    "quantize": ("quantize", "quantize", "Quantize a model: awq, gptq, rtn, awq+gptq, or a recipe of your own."),
    "calibrate": ("calibrate", "calibrate", "Count what layers are given on calibration data, for later runs."),
    "verify": (
        "verify",
        "verify",
        "Prove that a quantized folder holds what it should, and compare it with its original.",
    ),
    "eval": ("evaluate", "evaluate", "Perplexity of a model, quantized or not."),
    "generate": ("generate", "generate", "Text from a model, quantized or not."),
    "bench": ("bench", "bench", "Tokens per second, memory and share of the bandwidth of a model on this machine."),
    "inspect": ("inspect", "inspect", "Show a model's layers, and its topology as found and proven."),
    "convert": ("convert", "convert", "Convert a model to another format, its codes carried over bit for bit."),
    "rewrite": (
        "rewrite",
        "rewrite",
        "Fewer key-value heads (MHA to GQA or MQA), a sliding window; healed and verified.",
    ),
    "shard": ("shard", "shard", "Cut a model into one folder per tensor- and pipeline-parallel rank."),
    "assemble": ("assemble", "assemble", "Put shards back together, byte for byte."),
    "lint": ("lint", "lint", "Find what is wrong with a checkpoint, whichever tool made it."),
    "recipe": ("recipe", "recipe", "List the recipes, or show one."),
    "doctor": ("doctor", "doctor", "Versions, processor, memory, disk and GPU of this machine."),
}
#: What a write to stdout may meet. Such an error names no file.
_FULL = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EBADF)


class _Lazy(TyperGroup):
    """Lists the commands without importing them, so that `infopt --help` answers at once."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and turn every failure that a user can cause into a message and its exit code. Here, because typer
        would end what reaches it in its own way: an interrupt without a word, a closed pipe as an error."""
        try:
            done = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
            return done
        except InfoptError as error:
            _fail(error)
        except MemoryError:
            _fail(OutOfResources("out of memory", "", "close other programs, or try a smaller --seqlen"))
        except KeyboardInterrupt:
            print("interrupted: run the same command again to go on", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            _silence()
            sys.exit(141)
        except OSError as error:
            if error.filename is None and error.errno not in _FULL:
                raise
            _fail(_refused(error))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function, summary = COMMANDS[cmd_name]
        if not ctx.args and ctx.invoked_subcommand is None and _listing():
            return typer.main.get_command(_one(cmd_name, _summary_only, summary))
        loaded = importlib.import_module(f"infopt.cli.{module}")
        return typer.main.get_command(_one(cmd_name, getattr(loaded, function), None))


def _one(name: str, function, summary: str | None) -> typer.Typer:
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=summary)(function)
    return single


def _summary_only() -> None:
    """Stands for a command while the list of commands is printed."""


def _listing() -> bool:
    """Whether `infopt --help` (or bare `infopt`) is asked, as opposed to a command or a command's help."""
    return not any(word in COMMANDS for word in sys.argv[1:])


app = typer.Typer(cls=_Lazy, add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback(
    epilog="Example: infopt quantize ./model --method awq --bits 4 --group-size 64 -o ./model-w4   "
    "Exit codes: 0 done, 2 usage, 3 bad or unsafe input, 4 unsupported, 5 resources, 6 verification failed, "
    "7 a quality gate failed, 130 interrupted (run the same command again to go on)."
)
def _root() -> None:
    """Compress and convert large language models, and prove each result."""


def main() -> None:
    """Entry point."""
    # Models come from the folder or hub id that was named; nothing else may be fetched, and nothing may be reported home.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


def _refused(error: OSError) -> InfoptError:
    """What the system did not allow, where nothing nearer to it had a better word for it."""
    why, fix = error.strerror or str(error), "Check its permissions, and the space that is left."
    if error.filename is None:
        _silence()
        return OutOfResources("stdout cannot be written", why, fix)
    kind = BadInput if isinstance(error, PermissionError | FileNotFoundError) else OutOfResources
    return kind(f"{error.filename} cannot be used", why, fix)


def _silence() -> None:
    """Let what is still to be written to stdout go nowhere: Python flushes it once more at the end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _fail(error: InfoptError) -> NoReturn:
    lines = [f"error: {error.what}"]
    lines += [f"  because: {error.why}"] if error.why else []
    lines += [f"  try: {error.fix}"] if error.fix else []
    print("\n".join(lines), file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""The `moetool` command: a Typer app with one-line errors and documented exit codes."""

from __future__ import annotations

import errno
import functools
import gc
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException
from typer.main import get_command

from moetool import __version__, launch
from moetool.checkpoint.folder import cache_root
from moetool.commands.analyze_routing import analyze_routing
from moetool.commands.average import average
from moetool.commands.convert import convert
from moetool.commands.cpt import cpt
from moetool.commands.densify import densify
from moetool.commands.eval import evaluate
from moetool.commands.grow import grow
from moetool.commands.inspect import inspect
from moetool.commands.options import OpenPlaces, typer_command
from moetool.commands.plan import plan
from moetool.commands.prune import prune
from moetool.commands.quickstart import quickstart
from moetool.commands.sample import sample
from moetool.commands.tokenize import tokenize
from moetool.commands.upcycle import upcycle
from moetool.commands.verify import verify
from moetool.commands.watch import watch
from moetool.errors import MoetoolError, in_one_line, out_of_memory
from moetool.outside import printable

app = typer.Typer(
    name="moetool",
    help="Convert a dense language model to a Mixture of Experts, continue its pretraining, analyse its routing and"
    " evaluate the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
)

# The order of --help: the journey, then its tools.
COMMANDS: dict[str, Callable[..., Any]] = {
    "quickstart": quickstart,
    "plan": plan,
    "upcycle": upcycle,
    "inspect": inspect,
    "verify": verify,
    "convert": convert,
    "tokenize": tokenize,
    "sample": sample,
    "cpt": cpt,
    "watch": watch,
    "average": average,
    "grow": grow,
    "prune": prune,
    "densify": densify,
    "analyze-routing": analyze_routing,
    "eval": evaluate,
}
for _name, _command in COMMANDS.items():
    # Join the lines of each paragraph of a docstring, so that the help text is as wide as the terminal.
    _help = [" ".join(paragraph.split()) for paragraph in (_command.__doc__ or "").split("\n\n")]
    app.command(_name, cls=OpenPlaces, help="\n\n".join(_help))(typer_command(_command))


def _version(value: bool) -> None:
    if value:
        typer.echo(f"moetool {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """The options of `moetool` itself."""


MAX_LINE = 2000  # characters of an error, which may quote text of any length
EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 70, 130, 143

# Failures of the machine, not bugs: reported in one line, like any error about a named file.
_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EIO,
    errno.EFBIG,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
}
_ADVICE = {
    errno.ENOMEM: "free some memory, then run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n), then run the same command again",
    errno.ENOSPC: "free some space or choose another folder, then run the same command again",
    errno.EDQUOT: "free some space or choose another folder, then run the same command again",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "check the permissions or choose another path",
    errno.EPERM: "check the permissions or choose another path",
}


# Parts of the messages with which gloo and NCCL report that another process has ended.
_NO_PEER = ("by peer", "gloo/transport", "NCCL error", "remote process exited", "Broken pipe")
_LESS_MEMORY = {
    "upcycle": "use fewer --workers, with a text a smaller --batch-size or --seq-len",
    "verify": "use fewer --workers",
    "convert": "use fewer --workers",
    "average": "use fewer --workers",
    "grow": "use fewer --workers, with a text a smaller --batch-size or --seq-len, or --dtype bfloat16",
    "prune": "use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device-map auto",
    "densify": "use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device-map auto",
    "sample": "use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device-map auto",
    "cpt": "use a smaller --micro-batch-size or --gradient-checkpointing, or shard the weights (docs/multi-gpu.md)",
    "analyze-routing": "use a smaller --batch-size or --seq-len, --dtype bfloat16, or --device-map auto",
    "eval": "use a smaller --batch-size, --dtype bfloat16, or --device-map auto",
}


def _terminate(signum: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second signal ends the process at once
    raise SystemExit(EXIT_TERMINATED)


def _fail(message: str, code: int) -> int:
    line = printable(" ".join(message.split()))
    line = line if len(line) <= MAX_LINE else line[:MAX_LINE] + "..."
    try:
        print(f"moetool: {line}", file=sys.stderr, flush=True)
    except OSError:  # only the exit code is left to report it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return code


# Made once, though a process may run several command lines.
_command = functools.cache(get_command)


def run(arguments: list[str]) -> int:
    """Run one command line; return its exit code."""
    for talkative in ("torchao", "torch.utils._pytree"):  # they report on kernels and types that moetool does not use
        logging.getLogger(talkative).setLevel(logging.ERROR)
    try:
        outcome = _command(app)(arguments, standalone_mode=False, prog_name="moetool")
        if outcome == EXIT_INTERRUPTED:  # Typer returns this after Ctrl-C
            return _fail("interrupted", EXIT_INTERRUPTED)
        return outcome if isinstance(outcome, int) else 0
    except MoetoolError as error:
        return _fail(str(error), error.exit_code)
    except TyperException as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "moetool")
        message = error.format_message() or "give a command"  # without one, help has been printed
        message = message.replace("Value error, ", "").removesuffix(".")  # pydantic's words
        return _fail(f"{message} (see {where} --help)", EXIT_USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): not an error, and nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _ENVIRONMENT and not error.filename:
            traceback.print_exc()
            return EXIT_BUG
        where = f"{error.filename}: " if error.filename else ""
        advice = _ADVICE.get(error.errno or 0, "fix this and run the same command again")
        if error.filename and cache_root() in (path := Path(str(error.filename)), *path.parents):
            advice = "set MOETOOL_CACHE to a folder that can be written and has room"
        return _fail(f"{where}{os.strerror(error.errno or 0).lower()}; {advice}", 1)
    except Exception as error:
        if out_of_memory(error):
            reason = in_one_line(error) if str(error) else ""
            estimate = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
            advice = _LESS_MEMORY.get(next(iter(arguments), ""), "use a machine with more memory")
            return _fail(f"out of memory{reason and f' ({reason})'}{estimate}; {advice}", 1)
        if launch.num_processes() > 1 and any(sign in str(error) for sign in _NO_PEER):
            return _fail("another process of this launch has ended; fix the cause, then run the same command again", 1)
        traceback.print_exc()
        print("moetool: this is a bug in moetool; please report it with the lines above", file=sys.stderr)
        return EXIT_BUG


def main() -> NoReturn:
    """Run the process's command line and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    # After a shell's `>&-` there is no stream at all, and a name that is not UTF-8 must not break the message about it.
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the life of the process)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Torch's threads (OpenMP) spin while they wait. On cores that they share with other programs that
    # made training four times slower; on free cores a short spin is as fast. Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Messages of libraries about their internals do not concern the user, with or without --quiet.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    try:
        code = _flushed(run(sys.argv[1:]))
        # Exiting takes a moment. A signal now is ignored if the work is done; otherwise it ends the process at once.
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_DFL if code else signal.SIG_IGN)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if isinstance(leaving.__context__, BrokenPipeError):  # raised by Typer while it printed --help
            code = 0
        if code == EXIT_TERMINATED:
            _fail("terminated", code)
    except KeyboardInterrupt:  # while the last error was printed
        code = _fail("interrupted", EXIT_INTERRUPTED)
    gc.freeze()  # nor is everything searched for garbage before it goes with the process
    sys.exit(code)


def _flushed(code: int) -> int:
    """Flush standard output; if that fails, the exit code is 1."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if code == 0:  # otherwise an error has been printed
            code = _fail(f"standard output: {os.strerror(error.errno or 0).lower()}", 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code

"""The command line: picks the verb, and turns what goes wrong into one sentence and an exit code.

0: done. 2: a mistake of the person, told in one sentence. 1: a fault of ours. 130: Ctrl-C. 143: SIGTERM.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from selective_ssm.errors import UserError, nearest

VERBS = {
    "train": "train a language model as a recipe or a config file says",
    "evaluate": "measure a checkpoint's loss, perplexity and bits per byte on whole documents",
    "generate": "write on from a prompt",
    "info": "show a checkpoint's or a preset's parameters, state and memory",
    "recipes": "list the shipped recipes, or print one",
    "doctor": "show versions, devices, what can run here and how exact it is",
    "bench": "time the scan, the convolution, the step or whole models",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal cannot show is no reason to stop
    try:
        with _sigterm_leaves():
            _run(words)
            sys.stdout.flush()
        return 0
    except SystemExit as leaving:
        return _code(leaving)
    except BrokenPipeError:
        return _reader_has_left()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _told(error)


def _run(words: list[str]) -> None:
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        from selective_ssm.bench.versions import version

        print(f"selective-ssm {version('selective-ssm')}")
    elif verb not in VERBS:
        raise UserError(f"unknown command '{verb}'{nearest(verb, VERBS)}: choose one of {', '.join(VERBS)}")
    else:
        module = importlib.import_module(f"selective_ssm.cli.{verb}")
        from selective_ssm.cli.parser import Parser

        parser = Parser(verb, VERBS[verb])
        module.add_arguments(parser)
        module.run(parser.parse_args(words[1:]))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items())
    return (
        "usage: selective-ssm COMMAND …\n\nSelective state space models (Mamba) for PyTorch.\n\n"
        f"commands:\n{verbs}\n\n'selective-ssm COMMAND --help' explains a command; --version prints the version."
    )


def _code(leaving: SystemExit) -> int:
    """The exit code that Python itself would give, the text of a `SystemExit` shown."""
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    print(leaving.code, file=sys.stderr)
    return 1


def _told(error: Exception) -> int:
    """Say what went wrong, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        print(f"selective-ssm: {text}", file=sys.stderr)
        return 2
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    print(f"selective-ssm: internal error, {what} (the same command with --debug shows where)", file=sys.stderr)
    return 1


def _reader_has_left() -> int:
    """Whoever read our output wants no more of it, as in ``| head``: done, and nothing more is to be flushed."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def _sigterm_leaves() -> Generator[None]:
    """Within the block SIGTERM unwinds the program, so that files half written are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)

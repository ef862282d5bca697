"""The command line: picks the verb, and turns what goes wrong into one sentence and an exit code.

0: done. 2: a mistake of the person, told in one sentence. 1: a fault of ours. 130: Ctrl-C. 143: SIGTERM.
"""

from __future__ import annotations

import errno
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
from typing import NoReturn, TextIO

from selective_ssm.errors import UserError, nearest

VERBS = {
    "train": "train a language model, or adapters beside one, as a recipe or a config file says",
    "merge": "add a checkpoint's LoRA adapters to its weights",
    "evaluate": "measure a checkpoint's perplexity on whole documents, or what it reaches in tasks of lm_eval",
    "generate": "write on from a prompt",
    "convert": "write a checkpoint in another library's format: transformers, mamba_ssm, llama.cpp",
    "reproduce": "make the paper's tables of synthetic tasks again, run by run",
    "info": "show a checkpoint's or a preset's parameters, state and memory",
    "recipes": "list the shipped recipes, or print one",
    "doctor": "show versions, devices, what can run here and how exact it is",
    "bench": "time operators, blocks and whole models, beside floors and peers",
}


_OUTPUT_REFUSED = (errno.ENOSPC, errno.EFBIG, errno.EBADF)


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
    if sys.stdout is None:
        return _told(UserError("the standard output is closed: there is nowhere to write to"))
    try:
        with _sigterm_leaves():
            code = _run_to_its_code(words)
            sys.stdout.flush()
        return code
    except SystemExit as leaving:
        return _code(leaving)
    except BrokenPipeError:  # the reader wants no more, as in ``| head``
        _discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return _told(error)


def _run_to_its_code(words: list[str]) -> int:
    try:
        _run(words)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # how rich leaves when its reader has left
            raise leaving.__context__ from None
        return _code(leaving)
    return 0


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
        module.run(parser.parse_words(words[1:]))


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
    _say(str(leaving.code))
    return 1


def _told(error: Exception) -> int:
    """Say what went wrong, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        _say(f"selective-ssm: {text}")
        return 2
    if isinstance(error, OSError) and error.errno in _OUTPUT_REFUSED and error.filename is None:
        _discard(sys.stdout)
        _say(f"selective-ssm: cannot write to the standard output: {(error.strerror or text).lower()}")
        return 2
    if _is_lack_of_memory(error):
        _say("selective-ssm: there is not enough memory for this: take a smaller model, batch or row length")
        return 2
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    _say(f"selective-ssm: internal error, {what} (the same command with --debug shows where)")
    return 1


def _is_lack_of_memory(error: Exception) -> bool:
    """Also in torch's way of saying so, without importing torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _say(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:  # nobody reads
        _discard(sys.stderr)


def _discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, since writing it at the end of the process would fail too."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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

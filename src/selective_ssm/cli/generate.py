"""``selective-ssm generate``: write on from a prompt, each piece as soon as it is there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from selective_ssm.cli.device import add_device, add_dtype, placement
from selective_ssm.errors import UserError
from selective_ssm.generation import load, stream

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    add = parser.add_argument
    add("checkpoint", type=str, help="a checkpoint's folder")
    add("--prompt", type=str, default="", help="the text to go on from; - reads it from the standard input")
    add("--max-new-tokens", type=int, default=256, help="the most tokens to write")
    add("--temperature", type=float, default=1.0, help="0 always takes the most likely token")
    add("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0: among all")
    add("--top-p", type=float, default=1.0, help="choose among the most likely tokens that make up this probability")
    add("--min-p", type=float, default=0.0, help="choose among tokens at least this many times as likely as the best")
    add("--seed", type=int, default=0, help="the same seed gives the same text")
    add("--stop", type=str, action="append", default=[], help="end before this string; may be given several times")
    add_device(parser)
    add_dtype(parser)


def run(options: Namespace) -> None:
    """Write the text, or the ids of a checkpoint that has no tokenizer, to the standard output."""
    prompt = _prompt(options.prompt)
    model, tokenizer = load(options.checkpoint, **placement(options))
    wishes: dict[str, Any] = {name: options[name] for name in _SAMPLING}
    wishes |= {"max_new_tokens": options.max_new_tokens, "stop": options.stop}
    if tokenizer is not None:
        _show(stream(model, prompt, tokenizer=tokenizer, **wishes))
        return
    ids = stream(model, _ids(prompt), **wishes)
    print(f"'{options.checkpoint}' has no tokenizer: prompt and answer are token ids", file=sys.stderr)
    _show(f"{one} " for one in ids)


def _prompt(words: str) -> str:
    """The prompt as text, from the command line or from the standard input."""
    content = sys.stdin.buffer.read() if words == "-" else os.fsencode(words)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: its byte {error.start} cannot be decoded") from error


def _ids(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"the checkpoint has no tokenizer: give token ids such as '12 7 3', got '{prompt}'") from error


def _show(pieces: Iterator[str]) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()

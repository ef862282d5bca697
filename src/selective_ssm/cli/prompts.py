"""What ``selective-ssm generate`` is asked for: a prompt from the command line, or a file of them, one a line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

from selective_ssm.config import Config, from_tagged
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import read_text

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Wish(Config):
    """A prompt, and what `generation.Engine.submit` takes beside it: the keys of a JSON line."""

    kind: ClassVar[str] = "a line"

    prompt: str | tuple[int, ...]
    max_new_tokens: int = 256
    stop: str | tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All but the prompt, and a seed only where one was given."""
        return {name: value for name, value in vars(self).items() if name != "prompt" and value is not None}


class Line(NamedTuple):
    """A wish, and where it stands, for a sentence on what is wrong with it."""

    place: str
    wish: Wish


def read_lines(path: str, options: Mapping[str, Any]) -> list[Line]:
    """Read a file of prompts, one a line: all before the first is worked on, so that a bad one is told at once.

    A line is a prompt as it stands; or, in a file that ends in ``.jsonl``, an object with the fields of `Wish`, and
    empty lines are left out. What a line does not say is as in ``options``.

    Args:
        path: the file; ``-`` is the standard input, of JSON lines if it begins with ``{``.
        options: other fields of `Wish`.

    Raises:
        UserError: the file cannot be read or holds no prompt; a line is no JSON, or has a field that is unknown or of
            another type.
    """
    text = decoded(sys.stdin.buffer.read()) if path == STDIN else read_text(path)
    text = text.removeprefix("\ufeff")
    is_json = text.startswith("{") if path == STDIN else path.lower().endswith(".jsonl")
    lines = list(_json_lines(path, text, options) if is_json else _plain_lines(path, text, options))
    if not lines:
        raise FileProblem(f"'{path}' holds no prompts")
    return lines


def prompt_of(words: str) -> str:
    """The prompt that the command line gives: the words themselves, or with ``-`` the standard input."""
    return decoded(sys.stdin.buffer.read() if words == STDIN else os.fsencode(words))


def decoded(content: bytes) -> str:
    """UTF-8 as text.

    Raises:
        UserError: it is none.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text: its byte {error.start} cannot be decoded") from error


def _plain_lines(path: str, text: str, options: Mapping[str, Any]) -> Iterator[Line]:
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        yield Line(f"{path}:{number}", Wish(prompt=line.removesuffix("\r"), **options))


def _json_lines(path: str, text: str, options: Mapping[str, Any]) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Line(place, _wish(line, place, options))


def _wish(line: str, place: str, options: Mapping[str, Any]) -> Wish:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not a JSON line: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{place} must be a JSON object with a field 'prompt', got {type(fields).__name__}")
    try:
        return cast("Wish", from_tagged({"kind": Wish.kind, **options, **fields}, {Wish.kind: Wish}))
    except UserError as error:
        raise UserError(f"{place}: {error}") from error

"""``selective-ssm generate``: write on from a prompt, each piece as soon as it is there, or from a file of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from jsonargparse.typing import PositiveInt

from selective_ssm.cli.device import add_device, add_dtype, placement
from selective_ssm.cli.prompts import Line, Wish, prompt_of, read_lines
from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError
from selective_ssm.files import check_place, replacing
from selective_ssm.generation import Bookmark, Completion, Engine, Request, load, load_state, save_state
from selective_ssm.generation.stream import engine_for
from selective_ssm.models import LanguageModel
from selective_ssm.training.signals import StopSignals

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from selective_ssm.cli.parser import Parser

_COMMON = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Options that a line of `--prompts` may have of its own."""


def add_arguments(parser: Parser) -> None:
    """Declare the verb's arguments."""
    add = parser.add_argument
    add("checkpoint", type=str, help="a checkpoint's folder")
    add("--prompt", type=str, default="", help="the text to go on from; - reads it from the standard input")
    add("--prompts", type=str, help="a file of prompts, one a line, or a .jsonl; - reads them from the standard input")
    add("--output", type=str, help="where the answers to --prompts go, as JSON lines; by default the standard output")
    add("--batch", type=PositiveInt, default=8, help="how many prompts are worked on at once; a GPU takes many more")
    add("--logprobs", action="store_true", help="tell the log-probability of each token of the answers to --prompts")
    add("--state", type=str, help="go on from where --save-state stopped")
    add("--save-state", type=str, help="the file to keep the end of the text in, to go on from; Ctrl-C keeps it too")
    add("--max-new-tokens", type=int, default=256, help="the most tokens to write")
    add("--temperature", type=float, default=1.0, help="0 always takes the most likely token")
    add("--top-k", type=int, default=0, help="choose among the k most likely tokens; 0: among all")
    add("--top-p", type=float, default=1.0, help="choose among the most likely tokens that make up this probability")
    add("--min-p", type=float, default=0.0, help="choose among tokens at least this many times as likely as the best")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely")
    add("--seed", type=int, help="the same seed gives the same text; by default that of --state, or 0")
    add("--stop", type=str, action="append", default=[], help="end before this string; may be given several times")
    add("--stop-id", type=str, action="append", default=[], help="end with this token; may be given several times")
    add_device(parser)
    add_dtype(parser)


class _Writer(NamedTuple):
    """What writes, and where from."""

    model: LanguageModel
    tokenizer: Tokenizer | None
    state: Bookmark | None

    def ask(self, engine: Engine, wish: Wish, **others: Any) -> Request:
        """Submit a wish; a text that there is no tokenizer for must be ids."""
        prompt = _ids(wish.prompt) if self.tokenizer is None and isinstance(wish.prompt, str) else wish.prompt
        return engine.submit(prompt, state=self.state, **wish.options, **others)


def run(options: Namespace) -> None:
    """Write the text, or the ids of a checkpoint that has no tokenizer, to the standard output; or answer a file."""
    _check_what_goes_together(options)
    common = {name: options[name] for name in _COMMON}
    common |= {"stop": tuple(options.stop), "stop_ids": _stop_ids(options.stop_id)}
    if options.prompts is None:
        wish = Wish(prompt=prompt_of(options.prompt), **common)
        _write(_loaded(options), wish, options)
    else:
        lines = read_lines(options.prompts, common)
        _answer(_loaded(options), lines, options)


def _check_what_goes_together(options: Namespace) -> None:
    for name in ("output", "logprobs") if options.prompts is None else ():
        if options[name]:
            raise UserError(f"--{name} is for the answers to --prompts: give a file of prompts too")
    for name in ("prompt", "save_state") if options.prompts is not None else ():
        if options[name]:
            raise UserError(f"--{name.replace('_', '-')} is for one text, --prompts for many: leave one of them out")


def _stop_ids(words: Sequence[str]) -> tuple[int, ...]:
    """The options' words as numbers; jsonargparse cannot collect other things than words."""
    try:
        return tuple(map(int, words))
    except ValueError as error:
        raise UserError(f"--stop-id must be a token id, got '{' '.join(words)}'") from error


def _loaded(options: Namespace) -> _Writer:
    model, tokenizer = load(options.checkpoint, **placement(options))
    state = None if options.state is None else load_state(options.state, model)
    return _Writer(model, tokenizer, state)


def _write(writer: _Writer, wish: Wish, options: Namespace) -> None:
    """Show a text as it comes; its end is kept where that is wanted, also of one that a signal has ended."""
    keeps = options.save_state is not None
    if keeps:
        check_place(options.save_state)
    request = writer.ask(Engine(writer.model, writer.tokenizer, slots=1), wish, keep_state=keeps)
    if writer.tokenizer is None:
        print(f"'{options.checkpoint}' has no tokenizer: prompt and answer are token ids", file=sys.stderr)
    if not keeps:
        _show(request.items(forget=True))
        return
    with StopSignals(request.cancel) as signals:
        _show(request.items())
    bookmark = request.result().state
    if bookmark is None:
        raise UserError("the prompt was not read to its end: there is no state to save")
    save_state(options.save_state, bookmark, writer.model)
    signals.leave()


def _show(pieces: Iterator[str | int]) -> None:
    for piece in pieces:
        sys.stdout.write(piece if isinstance(piece, str) else f"{piece} ")
        sys.stdout.flush()
    print()


def _answer(writer: _Writer, lines: Sequence[Line], options: Namespace) -> None:
    """Write a JSON line for each prompt, in their order, as soon as it and all before it are there."""
    engine = engine_for([line.wish.prompt for line in lines], writer.model, writer.tokenizer, options.batch)
    requests = [_asked(writer, engine, line, logprobs=options.logprobs) for line in lines]
    with _opened(options.output) as output:
        for line, request in zip(lines, requests, strict=True):
            answer = _described(line.wish, request.result())
            output.write(f"{json.dumps(answer, ensure_ascii=False)}\n".encode())
            output.flush()


def _asked(writer: _Writer, engine: Engine, line: Line, **others: Any) -> Request:
    try:
        return writer.ask(engine, line.wish, **others)
    except UserError as error:
        raise UserError(f"{line.place}: {error}") from error


@contextmanager
def _opened(path: str | None) -> Generator[BinaryIO]:
    """The file to write to, which is there only when all is written, or the standard output."""
    if path is None:
        yield sys.stdout.buffer
        return
    with replacing(path) as temporary, open(temporary, "wb") as file:
        yield file


def _described(wish: Wish, completion: Completion) -> dict[str, Any]:
    """What an answer's line says; a log-probability says nothing without its token."""
    answer: dict[str, Any] = {"prompt": wish.prompt}
    if completion.text is not None:
        answer["text"] = completion.text
    if completion.text is None or completion.logprobs is not None:
        answer["ids"] = completion.ids
    answer |= {"finish": completion.finish, "tokens": len(completion.ids)}
    return answer if completion.logprobs is None else answer | {"logprobs": completion.logprobs}


def _ids(prompt: str) -> list[int]:
    try:
        return [int(word) for word in prompt.replace(",", " ").split()]
    except ValueError as error:
        raise UserError(f"the checkpoint has no tokenizer: give token ids such as '12 7 3', got '{prompt}'") from error

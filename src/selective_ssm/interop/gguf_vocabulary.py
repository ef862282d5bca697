"""A tokenizer as the vocabulary of a GGUF file: a byte-level BPE, which cuts texts into words as GPT-2's does."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from selective_ssm.data import ByteTokenizer, Tokenizer, TokenizersTokenizer
from selective_ssm.data.tokenizers import byte_of_character
from selective_ssm.errors import UserError


class TokenType(IntEnum):
    """What llama.cpp does with a token, as the specification counts."""

    NORMAL = 1
    CONTROL = 3
    """Never read out of a text, never written into one."""
    USER_DEFINED = 4
    """Found in a text before anything else is."""
    UNUSED = 5


class Vocabulary(NamedTuple):
    """What the file says of a tokenizer.

    Attributes:
        tokens: the token of each id.
        types: the `TokenType` of each id.
        merges: pairs of tokens that become one, the most urgent first.
        end: the id of the boundary.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int


_UNLIKE_GPT_2 = (
    "byte_fallback",
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "ignore_merges",
)
_NEVER = "\u2400 \u2400"
"""A merge of two characters that stand for no byte, since a file without merges is none to llama.cpp."""


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, filled up to a model's number of tokens.

    Args:
        tokenizer: bytes, or a byte-level BPE whose words are cut as GPT-2's are. Where it brings texts into Unicode's
            normal form C, as GPT-NeoX's does, a text that is not in it has other tokens in llama.cpp.
        size: how many tokens the model knows.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has more tokens than the model knows.
    """
    if tokenizer.vocab_size > size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, but the model knows only {size}")
    if isinstance(tokenizer, ByteTokenizer):
        known = {byte: (character, TokenType.NORMAL) for character, byte in byte_of_character().items()}
        known[tokenizer.end] = ("<|endoftext|>", TokenType.CONTROL)
        return _filled(known, size, [_NEVER], tokenizer.end)
    if not isinstance(tokenizer, TokenizersTokenizer):
        raise UserError(f"a tokenizer of the kind {type(tokenizer).__name__} cannot be written as GGUF")
    definition = tokenizer.definition
    _check(definition)
    model = definition["model"]
    known = {id: (token, TokenType.NORMAL) for token, id in model["vocab"].items()}
    for added in definition["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    known[tokenizer.end] = (known[tokenizer.end][0], TokenType.CONTROL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]] or [_NEVER]
    return _filled(known, size, merges, tokenizer.end)


def _filled(known: Mapping[int, tuple[str, TokenType]], size: int, merges: list[str], end: int) -> Vocabulary:
    whole = [known.get(id, (f"[PAD{id}]", TokenType.UNUSED)) for id in range(size)]
    return Vocabulary([token for token, _ in whole], [int(kind) for _, kind in whole], merges, end)


def _check(definition: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that llama.cpp would apply in another way."""
    model, normalizer, words = definition["model"], definition["normalizer"], definition["pre_tokenizer"]
    if model["type"] != "BPE":
        raise _unlike(f"is of the kind {model['type']}")
    for field in _UNLIKE_GPT_2:
        if model.get(field):
            raise _unlike(f"has {field} = {model[field]!r}")
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _unlike(f"normalises texts by {normalizer['type']}")
    if words is None or words["type"] != "ByteLevel" or words["add_prefix_space"] or not words.get("use_regex", True):
        raise _unlike("cuts texts into words in another way")
    for added in definition["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _unlike(f"looks at what stands around the token '{added['content']}'")


def _unlike(what: str) -> UserError:
    return UserError(f"the tokenizer cannot be written as GGUF, as a byte-level BPE like GPT-2's can: it {what}")

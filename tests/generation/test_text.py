"""Text from tokens: whole characters, stop strings across borders."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from selective_ssm.data import ByteTokenizer, TokenizersTokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation.text import StopGate, TextStream

BYTES = ByteTokenizer()


def streamed(text: TextStream, ids: Iterable[int]) -> list[str]:
    """The pieces, until the text stops."""
    given = []
    for one in ids:
        given.append(text.feed(one))
        if text.is_stopped:
            break
    return [piece for piece in (*given, text.rest()) if piece]


def pieces(content: bytes, *stop: str) -> list[str]:
    return streamed(TextStream(BYTES, stop, after=BYTES.end), BYTES.encode(content))


@given(st.text())
def test_pieces_join_to_the_text(text: str) -> None:
    assert "".join(pieces(text.encode())) == text


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert pieces("aé€🐍".encode()) == ["a", "é", "€", "🐍"]


def test_bytes_that_are_no_character_are_replaced_also_at_the_end() -> None:
    assert "".join(pieces(b"a\xffb\xe2\x82")) == "a\ufffdb\ufffd"


@given(st.text(alphabet="ab"), st.lists(st.text(alphabet="ab", min_size=1), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    """Fed letter by letter, the gate closes at the letter that completes a stop string, the earliest to begin then."""
    ends = [len(text[:n]) for n in range(len(text) + 1) if any(text[:n].endswith(one) for one in stops)]
    read = text[: ends[0]] if ends else text
    expected = read[: min(read.find(one) for one in stops if one in read)] if ends else text
    assert "".join(pieces(text.encode(), *stops)) == expected


def test_nothing_is_held_back_longer_than_needed() -> None:
    gate = StopGate(["\n\n", "END"])
    assert [gate.feed(one) for one in ("x", "\n", "y", "E", "N", "x")] == ["x", "", "\ny", "", "", "ENx"]
    assert not gate.closed


def test_a_stop_string_is_noticed_with_its_last_token_and_nothing_comes_after() -> None:
    text = TextStream(BYTES, ["cd"], after=BYTES.end)
    assert [(text.feed(one), text.is_stopped) for one in b"abcd"] == [
        ("a", False),
        ("b", False),
        ("", False),
        ("", True),
    ]
    assert text.feed(ord("e")) + text.rest() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UserError, match="must not be empty"):
        StopGate([""])


def test_spaces_between_the_tokens_of_a_word_level_tokenizer_are_kept() -> None:
    """Its decoder writes a space before a word, except at the beginning of what it decodes."""
    backend = Backend(models.WordLevel({"<|endoftext|>": 0, "▁one": 1, "▁two": 2}, unk_token="<|endoftext|>"))
    backend.add_special_tokens(["<|endoftext|>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = TokenizersTokenizer(backend)
    assert streamed(TextStream(tokenizer, after=1), [2, 1]) == [" two", " one"]
    assert streamed(TextStream(tokenizer, after=tokenizer.end), [2, 1]) == ["two", " one"]


def test_characters_spelt_by_the_byte_tokens_of_a_vocabulary_come_whole() -> None:
    """As Llama's does with what it has no token for."""
    vocabulary = {"<|endoftext|>": 0, "▁one": 1, "▁two": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.add_special_tokens(["<|endoftext|>"])
    spaces = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = TokenizersTokenizer(backend)
    spelt = [3 + byte for byte in "€é".encode()]
    ids = [1, *spelt, 2, 1, *spelt]
    pieces = streamed(TextStream(tokenizer, after=tokenizer.end), ids)
    assert pieces == ["one", "€", "é", " two", " one", "€", "é"]
    assert tokenizer.decode(ids).decode() == "".join(pieces) == backend.decode(ids)
    assert tokenizer.decode([tokenizer.end, *spelt[:2]]) == "€".encode()[:2]

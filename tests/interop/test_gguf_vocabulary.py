"""Tokenizers as llama.cpp holds them, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from selective_ssm.data import ByteTokenizer, TokenizersTokenizer
from selective_ssm.errors import UserError
from selective_ssm.interop.gguf_vocabulary import TokenType, vocabulary


def bpe(**options: Any) -> Tokenizer:
    """A byte-level BPE of all bytes, "th" and "the", and three added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id for id, token in enumerate([*letters, "th", "the"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    backend.add_tokens(["   "])
    return backend


def test_bytes_are_the_characters_that_stand_for_them() -> None:
    words = vocabulary(ByteTokenizer(), 260)
    text = "".join(map(chr, range(0xD800))) + "\U0001f600\U000f0000\U00100000"
    assert decoders.ByteLevel().decode([words.tokens[byte] for byte in text.encode()]) == text
    assert set(words.tokens[:256]) == set(pre_tokenizers.ByteLevel.alphabet())
    assert words.tokens[256:] == ["<|endoftext|>", "[PAD257]", "[PAD258]", "[PAD259]"]
    assert words.types == [TokenType.NORMAL] * 256 + [TokenType.CONTROL] + [TokenType.UNUSED] * 3
    assert words.end == 256


def test_the_merge_that_bytes_have_never_happens() -> None:
    words = vocabulary(ByteTokenizer(), 257)
    assert len(words.merges) == 1, "a file without merges is refused there"
    assert not set(words.merges[0].split(" ")) & set(words.tokens)


def test_a_bpe_keeps_its_ids_and_merges() -> None:
    words = vocabulary(TokenizersTokenizer(bpe()), 263)
    assert words.tokens[256:] == ["th", "the", "<|endoftext|>", "<|padding|>", "   ", "[PAD261]", "[PAD262]"]
    kinds = [TokenType.NORMAL] * 2 + [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED] + [TokenType.UNUSED] * 2
    assert words.types[256:] == kinds
    assert words.merges == ["t h", "th e"]
    assert words.end == 258


def test_the_tokenizer_of_gpt_neox(data: Path) -> None:
    path = data / "gpt_neox_tokenizer" / "20B_tokenizer.json"
    words = vocabulary(TokenizersTokenizer.from_file(path), 50280)
    assert (len(words.tokens), len(set(words.tokens)), words.end) == (50280, 50280, 0)
    assert words.tokens[12092] == "Hello"
    assert words.merges[0] == "Ġ Ġ"
    assert words.types[:2] == [TokenType.CONTROL] * 2
    assert words.types[50254:50277] == [TokenType.USER_DEFINED] * 23
    assert words.types[50277:] == [TokenType.UNUSED] * 3


def with_words_cut_by(pre_tokenizer: Any) -> Tokenizer:
    backend = bpe()
    backend.pre_tokenizer = pre_tokenizer
    return backend


def with_texts_brought_into(normalizer: Any) -> Tokenizer:
    backend = bpe()
    backend.normalizer = normalizer
    return backend


def with_token(token: AddedToken) -> Tokenizer:
    backend = bpe()
    backend.add_tokens([token])
    return backend


def of_words() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "?": 1}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        (of_words(), "it is of the kind WordLevel"),
        (bpe(byte_fallback=True), "it has byte_fallback = True"),
        (bpe(ignore_merges=True), "it has ignore_merges = True"),
        (with_words_cut_by(None), "it cuts texts into words in"),
        (with_words_cut_by(pre_tokenizers.Digits()), "it cuts texts into words in"),
        (with_words_cut_by(pre_tokenizers.ByteLevel(add_prefix_space=True)), "it cuts texts into words in"),
        (
            with_words_cut_by(pre_tokenizers.ByteLevel(False, use_regex=False)),
            "it cuts texts into words in",
        ),
        (with_texts_brought_into(normalizers.Lowercase()), "it normalises texts by Lowercase"),
        (with_token(AddedToken("<x>", lstrip=True)), "it looks at what stands around the token '<x>'"),
    ],
)
def test_what_llama_cpp_would_apply_otherwise_is_refused(backend: Tokenizer, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        vocabulary(TokenizersTokenizer(backend), 1000)


def test_normal_form_c_is_let_pass() -> None:
    assert vocabulary(TokenizersTokenizer(with_texts_brought_into(normalizers.NFC())), 300).end == 258


def test_more_tokens_than_the_model_knows_are_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has 257 ids, but the model knows only 256"):
        vocabulary(ByteTokenizer(), 256)

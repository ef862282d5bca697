from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from selective_ssm.data import ByteTokenizer, Tokenizer, TokenizersTokenizer, load_tokenizer, tokenizer_from
from selective_ssm.errors import FileProblem, UserError


def words(*vocabulary: str) -> Backend:
    backend = Backend(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


@given(st.binary())
def test_bytes_come_back_whatever_they_are(text: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.end not in ids
    assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]) == text


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TokenizersTokenizer(words("?", "<|endoftext|>", "a"))])
def test_an_array_holds_the_same_ids_in_little_memory(tokenizer: Tokenizer) -> None:
    for text in ("", "a é a", b"a\xff"):
        ids = tokenizer.encode_array(text)
        assert ids.tolist() == tokenizer.encode(text)
        assert ids.itemsize <= 4


def test_a_byte_tokenizer_lies_in_a_folder(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["kind"] == "bytes"
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert isinstance(tokenizer_from(str(tmp_path)), ByteTokenizer)


def test_saving_bytes_over_another_tokenizer_replaces_it(tmp_path: Path) -> None:
    TokenizersTokenizer(words("?", "<|endoftext|>")).save(tmp_path)
    ByteTokenizer().save(tmp_path)
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


@pytest.mark.parametrize("id", [-1, 257])
def test_foreign_ids_are_refused(id: int) -> None:
    with pytest.raises(UserError, match=f"id {id} is outside of the tokenizer's vocabulary, 0 to 256"):
        ByteTokenizer().decode([97, id])


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TokenizersTokenizer(words("?", "<|endoftext|>"))])
def test_half_a_surrogate_pair_is_refused_in_words(tokenizer: ByteTokenizer) -> None:
    with pytest.raises(UserError, match="cannot be encoded as UTF-8: character 2"):
        tokenizer.encode("ab\udcff")


def test_the_boundary_is_endoftext_before_the_named_eos(tmp_path: Path) -> None:
    words("?", "</s>", "<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert tokenizer_from(str(tmp_path)).end == 2


@pytest.mark.parametrize("eos", ['"</s>"', '{"content": "</s>", "lstrip": false}'])
def test_the_boundary_may_be_named_beside_the_tokenizer(tmp_path: Path, eos: str) -> None:
    words("?", "a", "</s>").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": {eos}}}')
    tokenizer = tokenizer_from(str(tmp_path / "tokenizer.json"))
    assert tokenizer.end == 2
    tokenizer.save(tmp_path / "copy")
    copy = tokenizer_from(str(tmp_path / "copy"))
    assert (copy.end, copy.encode("a b a"), copy.identity) == (2, [1, 0, 1], tokenizer.identity)


def test_a_tokenizer_without_a_boundary_is_refused(tmp_path: Path) -> None:
    words("?", "a").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no token '<|endoftext|>' to begin and end documents with: name another"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no token 'b'"):
        TokenizersTokenizer(words("?", "a"), end_token="b")


def test_a_vocabulary_that_is_not_of_bytes_decodes_through_the_package() -> None:
    assert TokenizersTokenizer(words("?", "<|endoftext|>", "a")).decode([2, 2]) == b"a a"


def test_texts_are_never_truncated_or_padded() -> None:
    backend = words("?", "<|endoftext|>", "a")
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert TokenizersTokenizer(backend).encode("a a a a") == [2] * 4


def test_every_byte_comes_back_from_a_byte_level_vocabulary() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate([*alphabet, "<|endoftext|>", "▁"])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = TokenizersTokenizer(backend)
    every = [tokenizer.decode([id]) for id in range(256)]
    assert sorted(every) == [bytes([byte]) for byte in range(256)]
    assert tokenizer.decode([257]) == "▁".encode()
    assert tokenizer.decode([tokenizer.end]) == b""
    text = "é☃𝄞 \n"
    assert b"".join(map(every.__getitem__, tokenizer.encode(text))).decode() == text


def test_what_is_no_tokenizer_is_told_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match="holds no tokenizer: it has no tokenizer.json"):
        tokenizer_from(str(tmp_path))
    with pytest.raises(FileProblem, match="no such file or folder"):
        tokenizer_from(str(tmp_path / "absent.json"))
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(FileProblem, match="tokenizer.json' is not a file of the package 'tokenizers'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FileProblem, match="must hold a JSON object, got list"):
        load_tokenizer(tmp_path)


def test_gpt_neox(data: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_from(str(data / "gpt_neox_tokenizer" / "20B_tokenizer.json"))
    assert tokenizer.encode("Hello world!") == [12092, 1533, 2]
    assert (tokenizer.vocab_size, tokenizer.end) == (50277, 0)
    tokenizer.save(tmp_path)
    copy = load_tokenizer(tmp_path)
    assert copy is not None
    assert (copy.encode("Hello world!"), copy.end, copy.identity) == ([12092, 1533, 2], 0, tokenizer.identity)

    text = "naïve ☃ 𝄞\n\n        x <|endoftext|> y\u00a0\x00 "
    ids = tokenizer.encode(text)
    assert tokenizer.end not in ids
    assert b"".join(tokenizer.decode([id]) for id in ids).decode() == text
    assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]).decode() == text
    assert tokenizer.decode(tokenizer.encode(b"a\xff")).decode() == "a\ufffd"

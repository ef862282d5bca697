"""The tokenizers of checkpoints, as transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from selective_ssm import LanguageModel, LanguageModelConfig
from selective_ssm.data import ByteTokenizer, TokenizersTokenizer, load_tokenizer
from selective_ssm.interop.convert import convert
from selective_ssm.interop.transformers import register

TEXT = "Aé☃ and\n<|endoftext|> 'tis  \x00 "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register()
    folder = tmp_path_factory.mktemp("model")
    LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=257)).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_bytes(tokenizer: Any) -> None:
    assert tokenizer(TEXT, split_special_tokens=True).input_ids == ByteTokenizer().encode(TEXT)
    assert tokenizer("a<|endoftext|>b").input_ids == [97, 256, 98]
    assert tokenizer.decode([97, 256, 195, 169]) == "a<|endoftext|>é"
    assert tokenizer.decode([97, 256, 195, 169], skip_special_tokens=True) == "aé"
    assert tokenizer.decode([195]) == "\ufffd"
    assert len(tokenizer) == len(tokenizer.get_vocab()) == ByteTokenizer.vocab_size
    batch = tokenizer(["a", "bcd"], padding=True, padding_side="left")
    assert batch.input_ids == [[256, 256, 97], [98, 99, 100]]
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, split_special_tokens=True).input_ids
    assert ids == ByteTokenizer().encode(text)
    assert tokenizer.decode(ids) == text


def test_saved_by_transformers_either_library_reads_it(folder: Path, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is not None
    assert AutoTokenizer.from_pretrained(tmp_path)("é").input_ids == [195, 169]


def test_a_tokenizer_json_is_read_by_transformers_own_class(data: Path, tmp_path: Path) -> None:
    register()
    LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=50277)).save_pretrained(tmp_path)
    ours = TokenizersTokenizer.from_file(data / "gpt_neox_tokenizer" / "20B_tokenizer.json")
    ours.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer(TEXT, split_special_tokens=True).input_ids == ours.encode(TEXT)
    assert tokenizer.eos_token_id == ours.end


def test_bytes_beside_a_model_of_their_own_class(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "hf", "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("é").input_ids == [195, 169]


def test_no_id_is_added_to_those_that_the_model_knows(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.add_special_tokens(["<|endoftext|>"])
    ours = TokenizersTokenizer(backend)
    ours.save(tmp_path)
    LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=3)).save_pretrained(tmp_path, model_type="mamba")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == ours.vocab_size
    assert tokenizer(["a", "ba"], padding=True).input_ids == [[0, ours.end], [1, 0]]

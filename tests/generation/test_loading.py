"""A checkpoint's folder gives the model and, where there is one, the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selective_ssm.data import ByteTokenizer
from selective_ssm.errors import UserError
from selective_ssm.generation import load
from selective_ssm.models import LanguageModel, LanguageModelConfig


def test_a_folder_gives_the_model_and_the_tokenizer_if_it_has_one(model: LanguageModel, tmp_path: Path) -> None:
    model.float().train().save_pretrained(tmp_path)
    loaded, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert not loaded.training
    ids = torch.randint(257, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    ByteTokenizer().save(tmp_path)
    loaded, tokenizer = load(tmp_path, dtype=torch.bfloat16)
    assert tokenizer is not None
    assert tokenizer.end == 256
    assert loaded.embedding.weight.dtype == torch.bfloat16


def test_a_tokenizer_with_more_ids_than_the_model_knows_is_refused(tmp_path: Path) -> None:
    LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=256)).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    with pytest.raises(UserError, match="has 257 ids, but the model knows only 256"):
        load(tmp_path)

"""A device that cannot be used is the device's fault, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.device import usable_device


def test_a_name_becomes_the_device() -> None:
    assert usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "meta:0", "vulkan"])
def test_what_is_no_device_or_not_here_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=f"the device '{name.partition(':')[0]}") as told:
        usable_device(name)
    assert len(str(told.value)) < 400
    assert "\n" not in str(told.value)


def test_a_model_s_file_is_not_blamed_for_the_device(tmp_path: Path) -> None:
    LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=8)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the device 'gpu' cannot be used") as told:
        LanguageModel.from_pretrained(tmp_path, device="gpu")
    assert not isinstance(told.value, FileProblem)

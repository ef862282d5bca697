"""The batches of a run, whoever prepares them."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from selective_ssm.data import TextBatches
from selective_ssm.errors import UserError
from selective_ssm.training.data import ResumableBatches
from tests.training.conftest import MakeConfig


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_after_the_consumed_ones(make_config: MakeConfig, workers: int) -> None:
    batches = TextBatches(make_config().data)
    data = ResumableBatches(batches, workers=workers)
    data.load_state_dict({"consumed": 5, "identity": batches.identity})
    before = torch.get_rng_state()
    for number, batch in enumerate(islice(data.train_dataloader(), 4), start=5):
        assert torch.equal(batch.ids, batches[number].ids)
        assert torch.equal(batch.targets, batches[number].targets)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_counts_is_what_the_loop_has_consumed(make_config: MakeConfig) -> None:
    data = ResumableBatches(TextBatches(make_config().data), workers=0)
    data.trainer = SimpleNamespace(fit_loop=SimpleNamespace(total_batch_idx=6))
    assert data.state_dict()["consumed"] == 7


def test_other_data_is_refused(make_config: MakeConfig) -> None:
    state = {"consumed": 1, "identity": TextBatches(make_config(data={"row_length": 8}).data).identity}
    with pytest.raises(UserError, match="cannot go on"):
        ResumableBatches(TextBatches(make_config().data), workers=0).load_state_dict(state)

"""The paper's figures, held to what else it says of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from selective_ssm.evaluation.published import COLUMNS, TABLE_3, published
from selective_ssm.layers import MLPConfig
from selective_ssm.models import preset


@pytest.mark.parametrize(("name", "average"), [("mamba-130m", 0.447), ("mamba-1.4b", 0.597), ("mamba-2.8b", 0.633)])
def test_the_averages_are_those_that_the_paper_names(name: str, average: float) -> None:
    """Of 370M and 790M it names 50.0 and 57.1, which are not the means of their rows."""
    accuracies = [value for (_, metric), value in published(preset(name)).items() if metric != "perplexity"]
    assert len(accuracies) == 6
    assert round(sum(accuracies) / 6, 3) == average


def test_larger_models_are_better_in_every_column() -> None:
    for (_, metric), column in zip(COLUMNS, zip(*TABLE_3.values(), strict=True), strict=True):
        assert list(column) == sorted(column, reverse=metric == "perplexity")


def test_a_size_is_known_by_its_shape() -> None:
    config = preset("mamba-370m")
    assert published(replace(config, vocab_size=config.padded_vocab_size)) == published(config) != {}
    assert published(replace(config, n_layer=24)) == {}
    assert published(replace(config, pattern=(*config.pattern, MLPConfig()))) == {}

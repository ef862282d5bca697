from __future__ import annotations

from typing import Any

import pytest

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.data import DataConfig
from selective_ssm.errors import UserError


def test_it_survives_json() -> None:
    config = DataConfig(source="books/*.txt", packing="packed", held_out_bytes=1000, held_out_document_bytes=10)
    assert from_tagged(to_tagged(config), {"text": DataConfig}) == config


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="source must name a file"):
        DataConfig(source="")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"packing": "pack"}, "packing must be one of 'joined', 'packed', got 'pack'"),
        ({"row_length": 0}, "row_length must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"held_out_bytes": -5}, "held_out_bytes must be at least 0"),
        ({"held_out_document_bytes": 0}, "held_out_document_bytes must be at least 1 or null"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DataConfig(source="python_stdlib", **wrong)

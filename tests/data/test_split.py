from __future__ import annotations

import json
from pathlib import Path

import pytest

from selective_ssm.data import DataConfig, held_out_documents
from selective_ssm.errors import UserError


def lines(folder: Path, texts: list[str]) -> str:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_nothing_is_held_out_unless_asked_for(tmp_path: Path) -> None:
    assert held_out_documents(DataConfig(source=lines(tmp_path, ["one"]))) == []


def test_other_documents_do_not_change_whether_one_is_held_out(tmp_path: Path) -> None:
    texts = [f"text {number:03}" for number in range(100)]
    few = held_out_documents(DataConfig(source=lines(tmp_path, texts), held_out_bytes=50))
    more = held_out_documents(DataConfig(source=lines(tmp_path, texts), held_out_bytes=80))
    assert len(few) == 7  # 8 bytes each
    assert few == more[: len(few)]


def test_a_split_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    source = lines(tmp_path, ["one", "two"])
    with pytest.raises(UserError, match="no document of '.*' has at most 2 bytes, so none can be held out"):
        held_out_documents(DataConfig(source=source, held_out_bytes=3, held_out_document_bytes=2))
    with pytest.raises(UserError, match="would leave no document to train on"):
        held_out_documents(DataConfig(source=source, held_out_bytes=4))

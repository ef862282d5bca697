"""Pickles give tensors by name, or are refused before anything in them runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from selective_ssm.errors import FileProblem
from selective_ssm.models.pickles import read_pickled, write_pickled


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def test_tensors_come_back(path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b.c": torch.randn(2).bfloat16(), "none": torch.zeros(0)}
    write_pickled(path, tensors)
    back = read_pickled(path)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_what_old_versions_of_torch_wrote_is_read(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickled(path)["a"], torch.ones(3))


class Malice:
    """What unpickling it runs: a command that leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_is_refused_and_not_run(path: Path, is_zip: bool, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": torch.ones(3), "b": Malice(trace)}, path, _use_new_zipfile_serialization=is_zip)
    torch.load(path, weights_only=False)
    assert trace.exists(), "the file would have done harm"
    trace.unlink()
    with pytest.raises(FileProblem, match=r"loading it would call '\w+.system', and weights need no code"):
        read_pickled(path)
    assert not trace.exists()


def test_a_pickle_that_torch_did_not_write_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Malice(tmp_path / "trace")}))
    with pytest.raises(FileProblem, match="no file of tensors by torch.save; nothing of it was run"):
        read_pickled(path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("length", [0, 1, 300, -1])
def test_truncated_files_are_refused(path: Path, length: int) -> None:
    write_pickled(path, {"a": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileProblem, match="is empty" if length == 0 else "truncated or foreign|no file of tensors"):
        read_pickled(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.zeros(2)], "must hold tensors by name, got list"),
        ({"a": 3}, "but 'a' is none"),
        ({3: torch.zeros(2)}, "but 3 is none"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "but 'a' is none"),
    ],
)
def test_what_is_no_weight_is_refused(content: Any, sentence: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(FileProblem, match=sentence):
        read_pickled(path)


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(FileProblem, match="pytorch_model.bin': there is no such file"):
        read_pickled(path)

"""Weights in files of ``torch.save``, which are pickles: read as tensors and nothing else, whatever they hold."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm.errors import FileProblem
from selective_ssm.files import in_words, replacing


def read_pickled(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read the named tensors of a file that ``torch.save`` wrote; nothing in the file is executed.

    On the CPU the tensors are the file itself, mapped into memory: what is not looked at is not read.

    Args:
        path: the file.
        device: where the tensors go.

    Returns:
        The tensors by name.

    Raises:
        FileProblem: the file is missing, unreadable, empty, truncated or of another format; or it holds anything but
            named tensors, such as code.
    """
    with in_words("read", path), open(path, "rb") as file:
        is_empty = not file.read(1)
    if is_empty:
        raise FileProblem(f"'{path}' is empty, a file of torch.save was expected")
    content = _loaded(Path(path), device)
    if not isinstance(content, Mapping):
        raise FileProblem(f"'{path}' must hold tensors by name, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise FileProblem(f"'{path}' must hold tensors by name, but {name!r} is none")
    return dict(content)


def _loaded(path: Path, device: str | torch.device) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of foreign origin, which are refused anyway
            is_mappable = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
            return torch.load(path, map_location=device, weights_only=True, mmap=is_mappable)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"loading it would call '{found[1]}', and weights need no code; nothing of it was run"
            raise FileProblem(f"'{path}' is refused: {reason}") from error
        raise FileProblem(f"'{path}' is no file of tensors by torch.save; nothing of it was run") from error
    except Exception as error:  # a damaged file may fail in any way
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise FileProblem(f"'{path}' is not a whole file of torch.save (truncated or foreign): {reason}") from error


def write_pickled(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as ``torch.save`` does, atomically (see `files.replacing`); one memory is stored once."""
    with replacing(path) as temporary:
        torch.save(dict(tensors), temporary)

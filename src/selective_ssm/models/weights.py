"""The files of a checkpoint that hold its weights: safetensors, whole or in shards; or those of ``torch.save``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import in_words, read_json, read_tensors, write_json, write_tensors
from selective_ssm.models.pickles import read_pickled, write_pickled

SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"
INDEX = ".index.json"
SHARD_BYTES = 4_000_000_000

Weights = dict[str, Tensor]


def write(
    folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype | None = None
) -> None:
    """Write safetensors, in shards past a size (a larger tensor has one to itself), and remove what was there before.

    Args:
        folder: where to write; it is made if absent.
        tensors: what to write. No more of them than a shard is copied at a time.
        shard_bytes: the size.
        dtype: what to write them in; None keeps each one's own.

    Raises:
        UserError: a value is beyond what the dtype can hold.
    """
    shards = _shards(tensors, shard_bytes, dtype)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    names = [SAFE] if len(shards) == 1 else names
    for name, shard in zip(names, shards, strict=True):
        write_tensors(
            folder / name, {one: cast(one, tensors[one], dtype).contiguous() for one in shard}, {"format": "pt"}
        )
    if len(shards) > 1:
        total = sum(_nbytes(tensor, dtype) for tensor in tensors.values())
        places = {one: name for name, shard in zip(names, shards, strict=True) for one in shard}
        write_json(folder / (SAFE + INDEX), {"metadata": {"total_size": total}, "weight_map": places})
        names.append(SAFE + INDEX)
    _remove_others(folder, set(names))


def write_as_pickle(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of ``torch.save``, and remove the weights that were there before."""
    write_pickled(folder / PICKLED, tensors)
    _remove_others(folder, {PICKLED})


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in another dtype; None keeps its own.

    Raises:
        UserError: a value is beyond what the dtype can hold.
    """
    converted = tensor if dtype is None else tensor.to(dtype)
    if converted is not tensor and not is_finite(converted):
        raise UserError(f"'{name}' holds values beyond what {str(dtype).removeprefix('torch.')} can hold")
    return converted


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, by a look at it that takes no memory."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in torch.aminmax(tensor))


def read(folder: Path, device: torch.device | str) -> Weights:
    """Read every tensor under the name that it has in the files. Safetensors go before pickles.

    Raises:
        FileProblem: a file is missing, truncated or foreign, or holds more than tensors.
    """
    for whole, reader in ((SAFE, read_tensors), (PICKLED, read_pickled)):
        if (folder / whole).exists():
            return reader(folder / whole, device)
        if (folder / (whole + INDEX)).exists():
            weights: Weights = {}
            for shard in _shards_of(folder / (whole + INDEX)):
                weights |= reader(folder / shard, device)
            return weights
    raise FileProblem(f"'{folder}' is not a whole checkpoint: it has neither {SAFE} nor {SAFE}{INDEX} nor {PICKLED}")


def _shards_of(index: Path) -> list[str]:
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
        raise FileProblem(f"'{index}' is not the index of a checkpoint: its weight_map must name files")
    return sorted(set(places.values()))


def _is_file_name(name: object) -> bool:
    """Whether it stays inside the folder."""
    return isinstance(name, str) and name == Path(name).name


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int, dtype: torch.dtype | None) -> list[list[str]]:
    """The names in order, cut so that each part stays within the size where it can."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = _nbytes(tensor, dtype)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _nbytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Remove the weights of the model that was here before, where they lay in other files."""
    for whole in (SAFE, PICKLED):
        shards = folder.glob(f"{Path(whole).stem}-*-of-*{Path(whole).suffix}")
        for path in (folder / whole, folder / (whole + INDEX), *shards):
            if path.name not in keep:
                with in_words("remove", path):
                    path.unlink(missing_ok=True)

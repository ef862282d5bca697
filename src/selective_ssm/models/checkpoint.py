"""A checkpoint is a folder: config.json, and the weights in one safetensors file or in shards with an index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm.errors import FileProblem, UserError, choice
from selective_ssm.files import in_words, read_json, read_tensors, write_json, write_tensors
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats import FORMATS, Format

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4_000_000_000

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Weights = dict[str, Tensor]


def save(
    folder: str | Path,
    config: LanguageModelConfig,
    weights: Mapping[str, Tensor],
    model_type: str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's config and weights in the format that `model_type` names.

    Args:
        folder: where to write; it is made if absent.
        config: the model's config.
        weights: its state dict.
        model_type: a key of `FORMATS`.
        shard_bytes: past this size the weights are written in shards of at most so many bytes (a larger tensor has a
            shard to itself).
    """
    choice("model_type", model_type, FORMATS)
    form, folder = FORMATS[model_type], Path(folder)
    written = form.write_config(config)
    named = {theirs: tensor.contiguous() for theirs, tensor in form.write_weights(weights, config).items()}
    shards = _shards(named, shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, named, {"format": "pt"})
        keep = {WEIGHTS}
    else:
        keep = {INDEX, *_write_shards(folder, shards)}
    write_json(folder / CONFIG, written)
    _remove_others(folder, keep)


def read(folder: str | Path, device: torch.device | str = "cpu") -> tuple[LanguageModelConfig, Weights]:
    """Read a model's config, and its weights under this library's names, from any format in `FORMATS`.

    Raises:
        FileProblem: a file is missing, truncated or foreign.
        UserError: the config is of another kind of model, or holds what is not understood; or the weights hold what is
            no weight.
    """
    config, form = _read_config(Path(folder))
    tensors = _read_weights(Path(folder), device)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            expected = "floating-point numbers of at least 16 bits"
            raise UserError(f"the weights in '{folder}': '{name}' holds {tensor.dtype}, expected {expected}")
    try:
        return config, form.read_weights(tensors, config)
    except UserError as error:
        raise UserError(f"the weights in '{folder}': {error}") from error


def read_config(folder: str | Path) -> LanguageModelConfig:
    """Read a model's config without its weights, from any format in `FORMATS`.

    Raises:
        FileProblem: the folder or its config.json is missing or not what it should be.
        UserError: the config is of another kind of model, or holds what is not understood.
    """
    return _read_config(Path(folder))[0]


def _read_config(folder: Path) -> tuple[LanguageModelConfig, Format]:
    with in_words("read a model from", folder):
        names = {path.name for path in folder.iterdir()}
    if CONFIG not in names:
        last = folder / "last"  # in the folder of a training run
        hint = f" (did you mean '{last}'?)" if (last / CONFIG).exists() else ""
        raise FileProblem(f"'{folder}' is not a checkpoint: it has no {CONFIG}{hint}")
    written = read_json(folder / CONFIG)
    if not isinstance(written, dict) or written.get("model_type") not in list(FORMATS):
        known = ", ".join(f"'{name}'" for name in FORMATS)
        raise UserError(
            f"'{folder / CONFIG}' describes no model this library reads: its model_type must be one of {known}"
        )
    form = FORMATS[written["model_type"]]
    try:
        return form.read_config(written), form
    except UserError as error:
        raise UserError(f"'{folder / CONFIG}': {error}") from error


def check_depth(weights: Mapping[str, Tensor], config: LanguageModelConfig, folder: str | Path) -> None:
    """Refuse a config of more layers than there are weights, before a model of that many is built.

    Raises:
        UserError: there are more layers.
    """
    if config.n_layer > len(weights):
        found = f"{len(weights)} tensors cannot be {config.n_layer} layers"
        raise UserError(f"the weights in '{folder}' do not fit its {CONFIG}: {found}")


def check(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: str | Path) -> None:
    """Refuse weights whose names, shapes or values cannot be the model's.

    Args:
        weights: what was read.
        expected: the state dict of the model that the config describes; only names and shapes matter.
        folder: where they came from, for the sentence.

    Raises:
        UserError: something is missing, left over, of another shape, or not finite.
    """
    where = f"the weights in '{folder}' do not fit its {CONFIG}"
    if missing := _few(name for name in expected if name not in weights):
        raise UserError(f"{where}: {missing} is missing")
    if unexpected := _few(name for name in weights if name not in expected):
        raise UserError(f"{where}: {unexpected} is not part of the model")
    for name, tensor in weights.items():
        shape = tuple(expected[name].shape)
        if tensor.shape != shape:
            raise UserError(f"{where}: '{name}' has the shape {tuple(tensor.shape)}, expected {shape}")
        if not torch.isfinite(tensor).all():
            raise UserError(f"the weights in '{folder}' are damaged: '{name}' holds NaN or infinite values")


def _read_weights(folder: Path, device: torch.device | str) -> Weights:
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS, device)
    if not (folder / INDEX).exists():
        raise FileProblem(f"'{folder}' is not a whole checkpoint: it has neither {WEIGHTS} nor {INDEX}")
    index = read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(_is_file_name(name) for name in places.values()):
        raise FileProblem(f"'{folder / INDEX}' is not the index of a checkpoint: its weight_map must name files")
    weights: Weights = {}
    for shard in sorted(set(places.values())):
        weights |= read_tensors(folder / shard, device)
    return weights


def _is_file_name(name: object) -> bool:
    """Whether it stays inside the folder."""
    return isinstance(name, str) and name == Path(name).name


def _shards(weights: Weights, shard_bytes: int) -> list[Weights]:
    """The weights in order, cut so that each part stays within the size where it can."""
    shards: list[Weights] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_shards(folder: Path, shards: list[Weights]) -> list[str]:
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, {"format": "pt"})
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return names


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Remove the weights of the model that was here before, where they lay in other files."""
    for path in (folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        if path.name not in keep:
            with in_words("remove", path):
                path.unlink(missing_ok=True)


def _few(names: Iterable[str]) -> str:
    """The first three of the names and how many more there are, or nothing."""
    listed = list(names)
    more = f" (and {len(listed) - 3} more)" if len(listed) > 3 else ""
    return ", ".join(f"'{name}'" for name in listed[:3]) + more

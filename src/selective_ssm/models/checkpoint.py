"""A checkpoint is a folder: config.json and the weights, in one of several libraries' formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from selective_ssm.errors import FileProblem, UserError, choice
from selective_ssm.files import in_words, read_json, write_json
from selective_ssm.models import weights as files
from selective_ssm.models.card import Card, write_card
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.formats import FORMATS, Format, format_of
from selective_ssm.models.weights import SHARD_BYTES, Weights

CONFIG = "config.json"

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def save(
    folder: str | Path,
    config: LanguageModelConfig,
    weights: Mapping[str, Tensor],
    model_type: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    card: Card | None = None,
) -> None:
    """Write a model's config and weights in the format that `model_type` names.

    Args:
        folder: where to write; it is made if absent, and a model that is there is replaced.
        config: the model's config.
        weights: its state dict. No more of it than a shard is copied at a time, but for formats of one file, into
            another dtype.
        model_type: a key of `FORMATS`.
        shard_bytes: past this size safetensors are written in shards of at most so many bytes (a larger tensor has a
            shard to itself).
        dtype: what to write the weights in; None keeps each one's own.
        card: what to say of the model in its README.md, but in one that is not of this library.

    Raises:
        FileProblem: the folder cannot be written to.
        UserError: the format cannot express this model, or the dtype cannot hold a value.
    """
    choice("model_type", model_type, FORMATS)
    form, folder = FORMATS[model_type], Path(folder)
    written = form.write_config(config)
    if form.is_pickled:
        converted = {name: files.cast(name, tensor, dtype) for name, tensor in weights.items()}
        files.write_as_pickle(folder, form.write_weights(converted, config))
    else:
        files.write(folder, form.write_weights(weights, config), shard_bytes=shard_bytes, dtype=dtype)
    write_json(folder / CONFIG, written)
    write_card(folder, card or Card(), config, sum(tensor.numel() for tensor in weights.values()))


def read(folder: str | Path, device: torch.device | str = "cpu") -> tuple[LanguageModelConfig, Weights]:
    """Read a model's config, and its weights under this library's names, from any format in `FORMATS`.

    Raises:
        FileProblem: a file is missing, truncated or foreign.
        UserError: the config is of another kind of model, or holds what is not understood; or the weights hold what is
            no weight.
    """
    config, form = _read_config(Path(folder))
    tensors = files.read(Path(folder), device)
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
    try:
        form = format_of(written)
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
        if not files.is_finite(tensor):
            raise UserError(f"the weights in '{folder}' are damaged: '{name}' holds NaN or infinite values")


def _few(names: Iterable[str]) -> str:
    """The first three of the names and how many more there are, or nothing."""
    listed = list(names)
    more = f" (and {len(listed) - 3} more)" if len(listed) > 3 else ""
    return ", ".join(f"'{name}'" for name in listed[:3]) + more

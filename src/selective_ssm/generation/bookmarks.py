"""A text's present as a value: what a model needs to write on from where it stopped, without reading it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr

import torch
from torch import Tensor

from selective_ssm.config import from_tagged, to_tagged
from selective_ssm.errors import FileProblem, UserError
from selective_ssm.files import read_metadata, read_tensors, write_tensors
from selective_ssm.models import CONFIG_KINDS, LanguageModel, LanguageModelConfig, ModelState
from selective_ssm.models.fingerprint import fingerprint

FORMAT = 1
"""The number of the file's format."""

_KIND = "selective_ssm state"


@dataclass(frozen=True, eq=False)
class Bookmark:
    """A text between two tokens: the model has read all of it but the last token.

    Attributes:
        state: of one slot, after all tokens but the last.
        pending: the last token, which a step from the state reads next.
        digest: of all tokens, the pending one too (`generation.digest`).
        seed: with which the text was sampled.
    """

    state: ModelState
    pending: int
    digest: bytes
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Label:
    """What a state file says beside the tensors."""

    config: LanguageModelConfig
    dtype: str
    weights: str
    """Their fingerprint."""
    state: str
    """That of the tensors."""
    pending: int
    digest: bytes
    seed: int


def save_state(path: str | Path, bookmark: Bookmark, model: LanguageModel) -> None:
    """Write a bookmark as one safetensors file, whole or not at all, with what tells the model from others.

    Args:
        path: the file to write or replace.
        bookmark: where a text stopped.
        model: the one that read the text; its weights are read once for their fingerprint.

    Raises:
        FileProblem: the file cannot be written.
        UserError: the state does not fit the model.

    Example:
        >>> import tempfile
        >>> from selective_ssm.generation import generate
        >>> model = LanguageModel(LanguageModelConfig(d_model=8, n_layer=1, vocab_size=16))
        >>> stopped = generate(model, [1, 2, 3], max_new_tokens=4, keep_state=True)[0].state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(f"{folder}/book.safetensors", stopped, model)
        ...     again = load_state(f"{folder}/book.safetensors", model)
        >>> (again.pending, int(again.state.position)) == (stopped.pending, 6)
        True
    """
    tensors = bookmark.state.tensors()
    if misfit := _misfit(tensors, model.init_state(1).tensors()):
        raise UserError(f"the bookmark's state is of another model: {misfit}")
    metadata = {
        "kind": _KIND,
        "format": str(FORMAT),
        "config": json.dumps(to_tagged(model.config)),
        "dtype": _name(model.embedding.weight.dtype),
        "weights": fingerprint(model.state_dict()),
        "state": fingerprint(tensors),
        "pending": str(bookmark.pending),
        "digest": bookmark.digest.hex(),
        "seed": str(bookmark.seed),
    }
    write_tensors(path, tensors, metadata)


def load_state(path: str | Path, model: LanguageModel) -> Bookmark:
    """Read what `save_state` wrote with the same model; its text then goes on as if it had never stopped.

    Args:
        path: the file.
        model: the one that read the text, in the same dtype, on any device.

    Returns:
        The bookmark, where the model is.

    Raises:
        FileProblem: the file is missing, truncated, damaged, of a newer format or no state.
        UserError: it is of another model: other configuration, dtype or weights.
    """
    label = _label(path, read_metadata(path))
    if reason := _difference(label, model):
        raise UserError(f"the state in '{path}' is of another model: {reason}")
    tensors, state = read_tensors(path), model.init_state(1)
    own = state.tensors()
    if misfit := _misfit(tensors, own):
        raise FileProblem(f"'{path}' is damaged: {misfit}")
    if fingerprint(tensors) != label.state:
        raise FileProblem(f"'{path}' is damaged: its numbers are not those that were written")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return Bookmark(state, label.pending, label.digest, label.seed)


def _label(path: str | Path, metadata: Mapping[str, str]) -> _Label:
    if metadata.get("kind") != _KIND:
        raise FileProblem(f"'{path}' holds no state: name a file that save_state or generate --save-state wrote")
    if (found := metadata.get("format")) != str(FORMAT):
        raise FileProblem(f"'{path}' is a state of the format {found}, this version of selective-ssm reads {FORMAT}")
    try:
        return _Label(
            config=_config(json.loads(metadata["config"])),
            dtype=metadata["dtype"],
            weights=metadata["weights"],
            state=metadata["state"],
            pending=int(metadata["pending"]),
            digest=bytes.fromhex(metadata["digest"]),
            seed=int(metadata["seed"]),
        )
    except (KeyError, ValueError, RecursionError) as error:
        raise FileProblem(f"'{path}' is damaged: what it says of the state cannot be read ({error})") from error


def _config(written: object) -> LanguageModelConfig:
    config = from_tagged(written, CONFIG_KINDS)
    if not isinstance(config, LanguageModelConfig):
        raise UserError(f"a config of the kind '{LanguageModelConfig.kind}' was expected, got '{config.kind}'")
    return config


def _difference(label: _Label, model: LanguageModel) -> str:
    """Why a model is not the one that a label tells of, or nothing."""
    there, here, dtype = to_tagged(label.config), to_tagged(model.config), _name(model.embedding.weight.dtype)
    for key in here:
        if there[key] != here[key]:
            return f"its {key} is {repr(there[key])}, that of this one is {repr(here[key])}"
    if label.dtype != dtype:
        return f"its weights were in {label.dtype}, those of this one are in {dtype}; load it in the same dtype"
    if label.weights != fingerprint(model.state_dict()):
        return "its weights were others, though the configuration is the same; load the checkpoint that read the text"
    return ""


def _misfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is wrong with a state's tensors, or nothing."""
    found, wanted = _outline(tensors), _outline(expected)
    return "" if found == wanted else f"it has {found}, expected {wanted}"


def _outline(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {_name(one.dtype)} {tuple(one.shape)}" for name, one in sorted(tensors.items()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Where a checkpoint is: a folder, or a name on the Hugging Face hub, of which a copy is kept."""

from __future__ import annotations

import re
from pathlib import Path

from selective_ssm.errors import FileProblem, MissingPackage, require

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_ALL_BUT_WEIGHTS = [
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE*",
    "tokenizer*.json",
    "special_tokens_map.json",
]
_SAFE = ["model*.safetensors", "model.safetensors.index.json"]
_PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def located(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint.

    Args:
        checkpoint: the folder; or, as a ``str`` that names no folder here, an id such as ``state-spaces/mamba-130m`` of
            the hub. Its files are fetched through ``huggingface_hub`` into its cache, once; weights as pickles only
            where there are no others.

    Returns:
        The folder, which need not be there where `checkpoint` cannot be an id.

    Raises:
        MissingPackage: it can only be an id, and the package ``huggingface_hub`` is not installed.
        FileProblem: the hub has no such model or cannot be reached, and the cache does not hold it.

    Example:
        >>> located("runs/first/last").parts
        ('runs', 'first', 'last')
    """
    folder = Path(checkpoint)
    if not isinstance(checkpoint, str) or folder.exists() or not _ID.fullmatch(checkpoint):
        return folder
    try:
        hub = require("huggingface_hub", extra="hub")
    except MissingPackage as error:
        reason = f"there is no folder '{checkpoint}'; if it is a model's name on the Hugging Face hub, {error}"
        raise MissingPackage(reason) from error
    try:
        folder = Path(hub.snapshot_download(checkpoint, allow_patterns=[*_ALL_BUT_WEIGHTS, *_SAFE]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(hub.snapshot_download(checkpoint, allow_patterns=[*_ALL_BUT_WEIGHTS, *_PICKLED]))
    except (OSError, ValueError) as error:
        raise FileProblem(f"there is no folder '{checkpoint}', and {_reason(error)}") from error
    return folder


def _reason(error: Exception) -> str:
    """Why the hub gave nothing."""
    errors = require("huggingface_hub.errors", extra="hub")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "the Hugging Face hub cannot be reached from here for a model of that name, which its cache lacks"
    if isinstance(error, errors.GatedRepoError):
        return "the model of that name on the Hugging Face hub is for those who asked for it: run 'hf auth login'"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hugging Face hub has no model of that name, or a private one (run 'hf auth login')"
    return f"the Hugging Face hub gave no model of that name: {str(error).partition(chr(10))[0]}"

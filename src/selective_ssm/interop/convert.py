"""Checkpoints from any format that is read to any that is written, on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from selective_ssm.data import Tokenizer, load_tokenizer
from selective_ssm.errors import FileProblem, UserError, choice
from selective_ssm.files import check_place, in_words, replacing, write_json
from selective_ssm.interop.gguf import write_gguf
from selective_ssm.models import LanguageModel, LanguageModelConfig, checkpoint
from selective_ssm.models.card import CARD
from selective_ssm.models.formats import hf
from selective_ssm.models.hub import located
from selective_ssm.models.weights import SHARD_BYTES

TARGETS = ("ours", "hf", "state-spaces", "gguf")
_TERMS = (CARD, "LICENSE*")
_GENERATION = "generation_config.json"  # transformers' own, which names ids of the tokenizer
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", _GENERATION)


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a checkpoint in another format. It appears whole or not at all; the tokenizer and the card go along.

    No more of the weights than a shard is in memory at a time, but for "state-spaces" in another dtype: what that
    format's one file holds is converted whole. Without `dtype` every weight keeps its bits.

    Args:
        source: a checkpoint's folder in any format that is read, or a name on the Hugging Face hub.
        target: the folder to write, which must not hold anything yet; for "gguf" the file to write or replace.
        to: "ours"; "hf", for MambaForCausalLM or, where B, C and Δ are normalised, FalconMambaForCausalLM;
            "state-spaces", for the package mamba_ssm; or "gguf", for llama.cpp.
        dtype: of the weights; None for what each has, for "gguf" see `write_gguf`.
        tokenizer: to write beside the model, in place of the source's.
        shard_bytes: past this size safetensors are written in shards.

    Raises:
        FileProblem: the source cannot be read or the target not written.
        UserError: the format cannot express the model, or the dtype cannot hold a weight.
        MissingPackage: for "gguf" or the hub a package is not installed.
    """
    choice("to", to, TARGETS)
    folder, target = located(source), Path(target)
    _check_target(target, is_folder=to != "gguf")
    model = LanguageModel.from_pretrained(folder)
    if to == "gguf":
        tokenizer = tokenizer or load_tokenizer(folder)
        if tokenizer is None:
            raise UserError(f"'{source}' holds no tokenizer, which llama.cpp needs: name one (--tokenizer)")
        return write_gguf(model, target, tokenizer, dtype=dtype)
    with replacing(target) as temporary:
        model_type = _model_type(to, model.config)
        weights = model.state_dict()
        checkpoint.save(temporary, model.config, weights, model_type, dtype=dtype, shard_bytes=shard_bytes)
        for pattern in (*_TERMS, *_TOKENIZER) if tokenizer is None else _TERMS:
            for path in filter(Path.is_file, folder.glob(pattern)):
                shutil.copyfile(path, temporary / path.name)
        if tokenizer is not None:
            tokenizer.save(temporary)
        if to == "hf" and not (temporary / _GENERATION).exists():
            _write_ends(temporary)


def _write_ends(folder: Path) -> None:
    """Tell transformers which token begins and ends a text, as their `generate` would else never end one."""
    try:
        tokenizer = load_tokenizer(folder)
    except UserError:  # one for transformers alone
        return
    if tokenizer is not None:
        ends = ("bos_token_id", "eos_token_id", "pad_token_id")
        write_json(folder / _GENERATION, dict.fromkeys(ends, tokenizer.end))


def _model_type(to: str, config: LanguageModelConfig) -> str:
    return {"ours": "selective_ssm", "hf": hf.class_for(config).model_type}.get(to, to)


def _check_target(target: Path, *, is_folder: bool) -> None:
    """Tell before the work that its result could not be written, or would take the place of something."""
    if not is_folder or not target.exists():
        return check_place(target)
    with in_words("write", target):
        if not target.is_dir() or any(target.iterdir()):
            raise FileProblem(f"there is something in '{target}' already: choose a new folder")

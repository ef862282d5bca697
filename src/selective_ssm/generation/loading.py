"""A checkpoint folder, ready to write with."""

from __future__ import annotations

from pathlib import Path

import torch

from selective_ssm.data.tokenizers import Tokenizer, load_tokenizer
from selective_ssm.errors import UserError
from selective_ssm.models import LanguageModel
from selective_ssm.models.hub import located


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[LanguageModel, Tokenizer | None]:
    """Load a checkpoint's model, in evaluation mode, and its tokenizer.

    Args:
        folder: what `LanguageModel.save_pretrained` wrote, and a tokenizer's ``save``, if there is one; or the name of
            a model on the Hugging Face hub.
        device: where the model goes.
        dtype: of the weights; None keeps the one they were saved in.

    Returns:
        The model, and the tokenizer or None: a folder without one is usable with token ids only.

    Raises:
        FileProblem: no such folder, or files that are missing, truncated or foreign.
        UserError: the tokenizer does not belong to the model.
    """
    folder = located(folder)
    model, tokenizer = LanguageModel.from_pretrained(folder, device=device, dtype=dtype), load_tokenizer(folder)
    known = model.config.vocab_size
    if tokenizer is not None and tokenizer.vocab_size > known:
        raise UserError(f"the tokenizer in '{folder}' has {tokenizer.vocab_size} ids, but the model knows only {known}")
    return model.eval(), tokenizer

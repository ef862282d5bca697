"""Models of transformers, newly drawn, of the sizes of ours. Its module is an argument, as it may not be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selective_ssm.models import LanguageModelConfig
from selective_ssm.tasks.language import next_token_loss

_WIDE = 2048  # from which on Pythia's heads are of 128


def mamba(transformers: Any, config: LanguageModelConfig, **options: Any) -> Any:
    """Its `MambaForCausalLM` of the same shape."""
    theirs = transformers.MambaConfig(
        vocab_size=config.padded_vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layer, **options
    )
    return transformers.MambaForCausalLM(theirs)


def transformer(transformers: Any, config: LanguageModelConfig, positions: int) -> Any:
    """Its `GPTNeoXForCausalLM` as Pythia has it beside a Mamba: a layer for every two of Mamba's, of the same width.

    Source: Biderman et al., "Pythia" (arXiv 2304.01373), Table 1.

    Args:
        transformers: the module.
        config: of the Mamba.
        positions: the longest text.
    """
    width = config.d_model
    theirs = transformers.GPTNeoXConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=width,
        num_hidden_layers=config.n_layer // 2,
        num_attention_heads=max(1, width // (64 if width < _WIDE else 128)),
        intermediate_size=4 * width,
        max_position_embeddings=positions,
        attn_implementation="sdpa",
    )
    return transformers.GPTNeoXForCausalLM(theirs)


Call = Callable[[], object]


def _prefill(model: Any, ids: Tensor) -> Call:
    return torch.no_grad()(partial(model.eval(), ids, use_cache=True, logits_to_keep=1))


def _decode(model: Any, ids: Tensor) -> Call:
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).cache_params
    return torch.no_grad()(partial(model, ids[:, :1], cache_params=cache, use_cache=True))


def _training(model: Any, ids: Tensor) -> Call:
    def train() -> None:
        model.zero_grad()
        next_token_loss(model(ids, use_cache=False).logits, ids).backward()

    model.train()
    return train


TASKS: Mapping[str, Callable[[Any, Tensor], Call]] = {"prefill": _prefill, "decode": _decode, "training": _training}
"""What a Mamba of theirs does with ids (B, L), as a call that is timed."""

"""Models of transformers, newly drawn, of the sizes of ours. Its module is an argument, as it may not be installed."""

from __future__ import annotations

from typing import Any

from selective_ssm.models import LanguageModelConfig

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

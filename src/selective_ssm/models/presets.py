"""Models of known sizes, by name: the released ones of Mamba, and the Transformers that it was compared with."""

from __future__ import annotations

from selective_ssm.errors import choice
from selective_ssm.layers import AttentionConfig, MLPConfig
from selective_ssm.models.config import LanguageModelConfig

_GPT_NEOX_VOCABULARY = 50277


def _mamba(n_layer: int, d_model: int) -> LanguageModelConfig:
    return LanguageModelConfig(d_model=d_model, n_layer=n_layer, vocab_size=_GPT_NEOX_VOCABULARY)


def _transformer(blocks: int, d_model: int, n_heads: int) -> LanguageModelConfig:
    """GPT-3's: learned positions, LayerNorm, GELU, biases everywhere."""
    return LanguageModelConfig(
        d_model=d_model,
        n_layer=2 * blocks,
        vocab_size=_GPT_NEOX_VOCABULARY,
        pattern=(
            AttentionConfig(n_heads=n_heads, bias=True),
            MLPConfig(expansion=4.0, activation="gelu", gated=False, bias=True),
        ),
        norm="layer",
        max_positions=2048,
    )


def _transformer_pp(blocks: int, d_model: int, n_heads: int) -> LanguageModelConfig:
    """PaLM's and LLaMA's: rotations, RMSNorm, SwiGLU, no biases."""
    return LanguageModelConfig(
        d_model=d_model,
        n_layer=2 * blocks,
        vocab_size=_GPT_NEOX_VOCABULARY,
        pattern=(AttentionConfig(n_heads=n_heads, positions="rope"), MLPConfig()),
    )


_MAMBA = {"130m": (24, 768), "370m": (48, 1024), "790m": (48, 1536), "1.4b": (48, 2048), "2.8b": (64, 2560)}
_TRANSFORMER = {"125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 16), "1.3b": (24, 2048, 32)}

PRESETS: dict[str, LanguageModelConfig] = {
    **{f"mamba-{name}": _mamba(*sizes) for name, sizes in _MAMBA.items()},
    **{f"transformer-{name}": _transformer(*sizes) for name, sizes in _TRANSFORMER.items()},
    **{f"transformer++-{name}": _transformer_pp(*sizes) for name, sizes in _TRANSFORMER.items()},
}


def preset(name: str) -> LanguageModelConfig:
    """The config of a model of a known size.

    All have the vocabulary of GPT-NeoX's tokenizer and a head that is the embedding, so that only what lies between
    differs. A Transformer's block is two entries of the pattern, attention and MLP.

    Args:
        name: "mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b" or "mamba-2.8b"; "transformer-" or "transformer++-"
            and "125m", "350m", "760m" or "1.3b".

    Raises:
        UserError: there is no preset of that name; the nearest one is named.

    Source: Gu & Dao, "Mamba" (arXiv 2312.00752), Table 12 and section 4.2.1; Brown et al., "Language Models are
    Few-Shot Learners" (arXiv 2005.14165), Table 2.1, but for the heads of the largest: 24 of 128 do not make 2,048.

    Example:
        >>> preset("mamba-1.4b").d_model
        2048
        >>> [layer.kind for layer in preset("transformer++-125m").layers[:3]]
        ['attention', 'mlp', 'attention']
    """
    choice("preset", name, PRESETS)
    return PRESETS[name]

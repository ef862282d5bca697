"""The released sizes of Mamba, by name."""

from __future__ import annotations

from selective_ssm.errors import choice
from selective_ssm.models.config import LanguageModelConfig

_GPT_NEOX_VOCABULARY = 50277

PRESETS: dict[str, LanguageModelConfig] = {
    f"mamba-{name}": LanguageModelConfig(d_model=d_model, n_layer=n_layer, vocab_size=_GPT_NEOX_VOCABULARY)
    for name, n_layer, d_model in (
        ("130m", 24, 768),
        ("370m", 48, 1024),
        ("790m", 48, 1536),
        ("1.4b", 48, 2048),
        ("2.8b", 64, 2560),
    )
}


def preset(name: str) -> LanguageModelConfig:
    """The config of a released size.

    Args:
        name: "mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b" or "mamba-2.8b".

    Raises:
        UserError: there is no preset of that name; the nearest one is named.

    Source: Gu & Dao, "Mamba" (arXiv 2312.00752), Table 12.

    Example:
        >>> preset("mamba-1.4b").d_model
        2048
    """
    choice("preset", name, PRESETS)
    return PRESETS[name]

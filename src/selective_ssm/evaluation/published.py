"""What the paper's released models reached in its zero-shot table, to stand beside one's own figures."""

from __future__ import annotations

from selective_ssm.models import LanguageModelConfig
from selective_ssm.models.presets import PRESETS

COLUMNS = (
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("hellaswag", "acc_norm"),
    ("piqa", "acc"),
    ("arc_easy", "acc"),
    ("arc_challenge", "acc_norm"),
    ("winogrande", "acc"),
)
"""The task and metric of each column of Table 3, but for the Pile's perplexity and the average."""

TABLE_3: dict[str, tuple[float, ...]] = {
    "mamba-130m": (16.07, 0.443, 0.353, 0.645, 0.480, 0.243, 0.519),
    "mamba-370m": (8.14, 0.556, 0.465, 0.695, 0.551, 0.280, 0.553),
    "mamba-790m": (6.02, 0.627, 0.551, 0.721, 0.612, 0.295, 0.561),
    "mamba-1.4b": (5.04, 0.649, 0.591, 0.742, 0.655, 0.328, 0.615),
    "mamba-2.8b": (4.23, 0.692, 0.661, 0.752, 0.697, 0.363, 0.635),
}
"""Gu & Dao, "Mamba" (arXiv 2312.00752), Table 3: the models of 300 B tokens of the Pile."""


def published(config: LanguageModelConfig) -> dict[tuple[str, str], float]:
    """The figures of Table 3 for the released model of this size, by task and metric; none for other sizes.

    Example:
        >>> from selective_ssm.models import preset
        >>> published(preset("mamba-130m"))["hellaswag", "acc_norm"]
        0.353
    """
    for name, known in PRESETS.items():
        if _size(known) == _size(config):
            return dict(zip(COLUMNS, TABLE_3[name], strict=True))
    return {}


def _size(config: LanguageModelConfig) -> tuple[object, ...]:
    return config.d_model, config.padded_vocab_size, [mixer.kind for mixer in config.layers]

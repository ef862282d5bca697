"""What a language model is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from selective_ssm.config import Config
from selective_ssm.errors import UserError, choice
from selective_ssm.layers import KINDS, MambaConfig, MixerConfig
from selective_ssm.layers.checks import require_positive
from selective_ssm.layers.norm import Norm


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(Config):
    """What a language model is made of: an embedding, n_layer residual branches, a norm and a head.

    Args:
        d_model: width of the residual stream.
        n_layer: number of residual branches.
        vocab_size: number of tokens V.
        pattern: the branches in order, repeated until there are n_layer of them; a hybrid is a longer pattern.
        norm: "rms" or "layer", before each branch and at the end.
        norm_eps: what the norms add to a variance.
        tie_embeddings: whether the head is the embedding.
        residual_in_fp32: whether the residual stream is fp32 in a model of bf16 or fp16 weights.
        pad_vocab_multiple: the embedding has rows for a multiple of this many tokens.
        max_positions: number of learned absolute positions; None is none, which a recurrent model needs not.

    Example:
        >>> LanguageModelConfig(d_model=768, n_layer=24, vocab_size=50277).padded_vocab_size
        50280
    """

    kind: ClassVar[str] = "language_model"

    d_model: int
    n_layer: int
    vocab_size: int
    pattern: tuple[MixerConfig, ...] = (MambaConfig(),)
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_fp32: bool = True
    pad_vocab_multiple: int = 8
    max_positions: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "n_layer", "vocab_size", "norm_eps", "pad_vocab_multiple", "max_positions")
        choice("norm", self.norm, ("rms", "layer"))
        if isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        if not isinstance(self.pattern, tuple) or not all(isinstance(one, MixerConfig) for one in self.pattern):
            raise UserError(f"language_model: pattern must be a tuple of mixers' configs, got {self.pattern!r}")
        if not self.pattern:
            raise UserError("language_model: pattern must hold at least one mixer's config")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size, rounded up to a multiple of pad_vocab_multiple."""
        return math.ceil(self.vocab_size / self.pad_vocab_multiple) * self.pad_vocab_multiple

    @property
    def layers(self) -> tuple[MixerConfig, ...]:
        """The config of each of the n_layer branches."""
        return tuple(self.pattern[index % len(self.pattern)] for index in range(self.n_layer))


CONFIG_KINDS: dict[str, type[Config]] = {**KINDS, LanguageModelConfig.kind: LanguageModelConfig}
"""The config class of every kind that a saved language model may name."""

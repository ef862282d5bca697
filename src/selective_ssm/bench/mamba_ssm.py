"""The released package's language model, newly drawn, of the sizes of ours."""

from __future__ import annotations

import torch
from torch import nn

from selective_ssm.bench.contenders import imported
from selective_ssm.models import LanguageModelConfig


def language_model(config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
    """It, of the same size; None where it is not installed."""
    module, configs = (imported(f"mamba_ssm.models.{name}") for name in ("mixer_seq_simple", "config_mamba"))
    if module is None or configs is None:
        return None
    theirs = configs.MambaConfig(d_model=config.d_model, n_layer=config.n_layer, vocab_size=config.vocab_size)
    return module.MambaLMHeadModel(theirs, device=device, dtype=dtype)

"""Selective state space models (Mamba) for PyTorch: the scan, the block, the language model, and writing with it.

This is the stable surface; data, tasks, training, evaluation and the command line are imported by their own names.

>>> import torch
>>> from selective_ssm import LanguageModel, LanguageModelConfig, generate
>>> model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257))
>>> logits = model(torch.randint(257, (1, 100))).logits
>>> ids = generate(model, [1, 2, 3], max_new_tokens=5)[0].ids
"""

from selective_ssm.generation import Bookmark, Completion, Engine, Request, Sampling, generate, load, stream
from selective_ssm.layers import (
    MIXERS,
    MLP,
    RWKV,
    S4D,
    S6,
    SSMS,
    InnerSSM,
    Mamba,
    MambaConfig,
    Mixer,
    MixerConfig,
    MLPConfig,
    RWKVChannel,
    RWKVChannelConfig,
    RWKVConfig,
    S4DConfig,
    S6Config,
    SSMConfig,
)
from selective_ssm.models import (
    PRESETS,
    LanguageModel,
    LanguageModelConfig,
    LanguageModelOutput,
    ModelState,
    preset,
)
from selective_ssm.ops import (
    causal_conv1d,
    causal_conv1d_step,
    selective_scan,
    selective_scan_fn,
    selective_scan_step,
)

__all__ = [
    "MIXERS",
    "MLP",
    "PRESETS",
    "RWKV",
    "S4D",
    "S6",
    "SSMS",
    "InnerSSM",
    "Bookmark",
    "Completion",
    "Engine",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "MLPConfig",
    "Mamba",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "ModelState",
    "RWKVChannel",
    "RWKVChannelConfig",
    "RWKVConfig",
    "Request",
    "S4DConfig",
    "S6Config",
    "SSMConfig",
    "Sampling",
    "causal_conv1d",
    "causal_conv1d_step",
    "generate",
    "load",
    "preset",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_step",
    "stream",
]

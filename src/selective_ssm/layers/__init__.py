"""Modules that act on a sequence: mixers, one residual branch each, and the inner SSMs that stand inside blocks."""

from selective_ssm.layers.attention import Attention, AttentionConfig
from selective_ssm.layers.gau import GAU, GAUConfig
from selective_ssm.layers.mamba import Mamba, MambaConfig
from selective_ssm.layers.mixer import Mixer, MixerConfig, State
from selective_ssm.layers.mlp import MLP, MLPConfig
from selective_ssm.layers.norm import LayerNorm, RMSNorm
from selective_ssm.layers.retnet import RetNet, RetNetConfig
from selective_ssm.layers.s4d import S4D, S4DConfig
from selective_ssm.layers.s6 import S6, S6Config
from selective_ssm.layers.ssm import InnerSSM, SSMConfig
from selective_ssm.layers.table import KINDS, MIXERS, SSMS, build_mixer

__all__ = [
    "KINDS",
    "GAU",
    "MIXERS",
    "SSMS",
    "MLP",
    "S4D",
    "S6",
    "Attention",
    "AttentionConfig",
    "GAUConfig",
    "InnerSSM",
    "LayerNorm",
    "MLPConfig",
    "Mamba",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "RMSNorm",
    "RetNet",
    "RetNetConfig",
    "S4DConfig",
    "S6Config",
    "SSMConfig",
    "State",
    "build_mixer",
]

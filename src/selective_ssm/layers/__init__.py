"""Modules that act on a sequence: mixers, one residual branch each, and the inner SSMs that stand inside blocks."""

from selective_ssm.layers.attention import Attention, AttentionConfig
from selective_ssm.layers.gau import GAU, GAUConfig
from selective_ssm.layers.h3 import H3, H3Config
from selective_ssm.layers.hyena import Hyena, HyenaConfig
from selective_ssm.layers.hyena_filter import HyenaFilter, HyenaFilterConfig
from selective_ssm.layers.mamba import Mamba, MambaConfig
from selective_ssm.layers.mixer import Mixer, MixerConfig, State
from selective_ssm.layers.mlp import MLP, MLPConfig
from selective_ssm.layers.norm import LayerNorm, RMSNorm
from selective_ssm.layers.plain import Plain, PlainConfig
from selective_ssm.layers.retnet import RetNet, RetNetConfig
from selective_ssm.layers.rwkv import RWKV, RWKVChannel, RWKVChannelConfig, RWKVConfig
from selective_ssm.layers.s4 import S4, S4Config
from selective_ssm.layers.s4d import S4D, S4DConfig
from selective_ssm.layers.s6 import S6, S6Config
from selective_ssm.layers.shift import Shift, ShiftConfig
from selective_ssm.layers.ssm import InnerSSM, SSMConfig
from selective_ssm.layers.table import KINDS, MIXERS, SSMS, build_mixer

__all__ = [
    "KINDS",
    "MIXERS",
    "SSMS",
    "Attention",
    "AttentionConfig",
    "GAU",
    "GAUConfig",
    "H3",
    "H3Config",
    "Hyena",
    "HyenaConfig",
    "HyenaFilter",
    "HyenaFilterConfig",
    "InnerSSM",
    "LayerNorm",
    "Mamba",
    "MambaConfig",
    "Mixer",
    "MixerConfig",
    "MLP",
    "MLPConfig",
    "Plain",
    "PlainConfig",
    "RetNet",
    "RetNetConfig",
    "RMSNorm",
    "RWKV",
    "RWKVChannel",
    "RWKVChannelConfig",
    "RWKVConfig",
    "S4",
    "S4Config",
    "S4D",
    "S4DConfig",
    "S6",
    "S6Config",
    "Shift",
    "ShiftConfig",
    "SSMConfig",
    "State",
    "build_mixer",
]

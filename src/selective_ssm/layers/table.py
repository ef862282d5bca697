"""Every kind of mixer and of inner SSM, with the class of its config and of its module."""

from __future__ import annotations

from selective_ssm.config import Config
from selective_ssm.layers.attention import Attention, AttentionConfig
from selective_ssm.layers.gau import GAU, GAUConfig
from selective_ssm.layers.h3 import H3, H3Config
from selective_ssm.layers.hyena import Hyena, HyenaConfig
from selective_ssm.layers.mamba import Mamba, MambaConfig
from selective_ssm.layers.mixer import Mixer, MixerConfig
from selective_ssm.layers.mlp import MLP, MLPConfig
from selective_ssm.layers.plain import Plain, PlainConfig
from selective_ssm.layers.retnet import RetNet, RetNetConfig
from selective_ssm.layers.rwkv import RWKV, RWKVChannel, RWKVChannelConfig, RWKVConfig
from selective_ssm.layers.ssm_table import SSMS

MIXERS: dict[str, tuple[type[MixerConfig], type[Mixer]]] = {
    "mamba": (MambaConfig, Mamba),
    "h3": (H3Config, H3),
    "plain": (PlainConfig, Plain),
    "hyena": (HyenaConfig, Hyena),
    "attention": (AttentionConfig, Attention),
    "rwkv": (RWKVConfig, RWKV),
    "rwkv_channel": (RWKVChannelConfig, RWKVChannel),
    "retnet": (RetNetConfig, RetNet),
    "gau": (GAUConfig, GAU),
    "mlp": (MLPConfig, MLP),
}

KINDS: dict[str, type[Config]] = {kind: config for table in (MIXERS, SSMS) for kind, (config, _) in table.items()}


def build_mixer(config: MixerConfig, d_model: int) -> Mixer:
    """The mixer that a config describes, in a model of width `d_model`."""
    return MIXERS[config.kind][1](config, d_model)

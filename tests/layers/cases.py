"""Every mixer and inner SSM, with each of its switches: who sits the exam."""

from __future__ import annotations

from dataclasses import replace

import torch

from selective_ssm.layers import (
    AttentionConfig,
    GAUConfig,
    H3Config,
    HyenaConfig,
    HyenaFilterConfig,
    MambaConfig,
    Mixer,
    MixerConfig,
    MLPConfig,
    PlainConfig,
    RetNetConfig,
    RWKVChannelConfig,
    RWKVConfig,
    S4Config,
    S4DConfig,
    S6Config,
    ShiftConfig,
    SSMConfig,
    build_mixer,
)

D_MODEL = 3  # odd, and the width of the block not a power of two

_FILTER = HyenaFilterConfig(filter_length=40, bands=2, hidden=4, depth=3, sine_frequency=1.0)


def _around(**ssm: object) -> MambaConfig:
    return MambaConfig(ssm=S6Config(**({"d_state": 4} | ssm)))  # pyright: ignore[reportArgumentType]


CASES: dict[str, MixerConfig] = {
    "mamba": MambaConfig(),
    "fixed delta": _around(selective_delta=False),
    "fixed B": _around(selective_B=False),
    "fixed C": _around(selective_C=False),
    "nothing selective": _around(selective_delta=False, selective_B=False, selective_C=False),
    "full rank": _around(dt_rank=2 * D_MODEL),
    "one state": _around(d_state=1),
    "random A": _around(a_init="random"),
    "complex A": _around(a_init="s4d_lin", dt_rank=2),
    "complex A, fixed B": _around(a_init="s4d_lin", selective_B=False),
    "zoh": _around(discretization="zoh"),
    "complex zoh": _around(a_init="s4d_lin", discretization="zoh"),
    "norms of B, C and delta": _around(norm_eps=1e-6),
    "norm of C alone": _around(norm_eps=1e-2, selective_delta=False, selective_B=False),
    "complex A, norms": _around(norm_eps=1e-6, a_init="s4d_lin"),
    "no skip": _around(skip=False),
    "norm after the ssm": MambaConfig(ssm_norm=True, ssm=S6Config(d_state=4)),
    "biases": MambaConfig(bias=True, conv_bias=False, ssm=S6Config(d_state=4)),
    "convolution of one": MambaConfig(d_conv=1, expand=1, ssm=S6Config(d_state=4)),
    "no ssm": MambaConfig(ssm=None),
    "s4d": MambaConfig(ssm=S4DConfig(d_state=8)),
    "s4d inv": MambaConfig(ssm=S4DConfig(d_state=8, a_init="inv", discretization="euler"), ssm_norm=True),
    "s4d real": MambaConfig(ssm=S4DConfig(d_state=4, a_init="real", skip=False)),
    "s4d of both directions": PlainConfig(ssm=S4DConfig(d_state=8, bidirectional=True)),
    "s4d real of both directions": MambaConfig(ssm=S4DConfig(d_state=4, a_init="real", skip=False, bidirectional=True)),
    "s4": MambaConfig(ssm=S4Config(d_state=8)),
    "s4 without a skip": MambaConfig(ssm=S4Config(d_state=2, skip=False), expand=1),
    "h3": H3Config(d_shift=4, ssm=S4DConfig(d_state=8)),
    "h3 around s6": H3Config(d_shift=1, ssm=S6Config(d_state=4), bias=False),
    "plain": PlainConfig(ssm=S4Config(d_state=4)),
    "plain around s6": PlainConfig(expand=2, d_conv=4, bias=False, ssm=S6Config(d_state=4)),
    "shift": PlainConfig(ssm=ShiftConfig(d_state=5)),
    "hyena filter": MambaConfig(ssm=_FILTER, expand=1),
    "hyena filter without a skip": H3Config(d_shift=2, ssm=replace(_FILTER, skip=False)),
    "hyena": HyenaConfig(filter=_FILTER),
    "hyena of order 3": HyenaConfig(order=3, d_conv=1, filter=_FILTER, bias=False),
    "rwkv": RWKVConfig(),
    "rwkv channel": RWKVChannelConfig(expansion=3.5),
    "mlp": MLPConfig(multiple_of=8),
    "mlp of gpt": MLPConfig(expansion=4.0, multiple_of=1, gated=False, activation="gelu", bias=True),
    "attention": AttentionConfig(n_heads=3),
    "attention with biases": AttentionConfig(n_heads=2, head_dim=5, bias=True),
    "grouped attention, rope": AttentionConfig(n_heads=4, n_kv_heads=2, head_dim=2, positions="rope"),
    "multi-query attention, xpos": AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=4, positions="xpos"),
    "retnet": RetNetConfig(n_heads=2, head_dim=4, chunk=8),
    "retnet of one chunk": RetNetConfig(n_heads=3, head_dim=2, expand=1, bias=True),
    "gau": GAUConfig(head_dim=4),
    "gau without positions": GAUConfig(head_dim=3, expand=1, positions="none", bias=True),
}


def build(case: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """The mixer of a case, its parameters moved off the values that they start with."""
    mixer = build_mixer(CASES[case], D_MODEL).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


def is_causal(config: MixerConfig) -> bool:
    """Whether no output depends on what follows, and so there is a state."""
    ssm = config.ssm if isinstance(config, MambaConfig | PlainConfig | H3Config) else None
    return not (isinstance(ssm, S4DConfig) and ssm.bidirectional)


def state_bytes(config: MixerConfig, *, tokens: int = 0, activation: int = 4) -> int:
    """Bytes of the state of one sequence.

    `tokens` is the room it has where it grows, `activation` the size of a number in the model's dtype; what accumulates
    over the length is in fp32.
    """
    match config:
        case MambaConfig() | PlainConfig():
            width = config.expand * D_MODEL
            history = width * ((config.d_conv or 1) - 1) * activation
            return history + _ssm_bytes(config.ssm, width, tokens, activation)
        case H3Config():
            history = D_MODEL * (config.d_shift - 1) * activation
            return history + _ssm_bytes(config.ssm, D_MODEL, tokens, activation)
        case HyenaConfig():
            history = (config.order + 1) * D_MODEL * (config.d_conv - 1) * activation
            return history + config.order * _ssm_bytes(config.filter, D_MODEL, tokens, activation)
        case RWKVConfig():
            return D_MODEL * (activation + 3 * 4)
        case RWKVChannelConfig():
            return D_MODEL * activation
        case MLPConfig():
            return 0
        case AttentionConfig():
            return 2 * tokens * (config.n_kv_heads or config.n_heads) * config.width(D_MODEL) * activation + 8
        case RetNetConfig():
            return config.n_heads * config.width(D_MODEL) ** 2 * config.expand * 4 + 8
        case GAUConfig():
            return tokens * (config.head_dim + config.expand * D_MODEL) * activation + 8
        case _:
            raise NotImplementedError(f"what does a state of {config.kind} take?")


def _ssm_bytes(config: SSMConfig | None, width: int, tokens: int, activation: int) -> int:
    match config:
        case None:
            return 0
        case S6Config() | S4DConfig() | S4Config():
            return width * config.d_state * 4
        case ShiftConfig():
            return width * (config.d_state - 1) * activation
        case HyenaFilterConfig():
            return width * tokens * activation + 8
        case _:
            raise NotImplementedError(f"what does a state of {config.kind} take?")

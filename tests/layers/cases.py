"""Every mixer and inner SSM, with each of its switches: who sits the exam."""

from __future__ import annotations

import torch

from selective_ssm.layers import (
    AttentionConfig,
    GAUConfig,
    MambaConfig,
    Mixer,
    MixerConfig,
    MLPConfig,
    RetNetConfig,
    S4DConfig,
    S6Config,
    build_mixer,
)

D_MODEL = 3  # odd, and the width of the block not a power of two


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
    "no skip": _around(skip=False),
    "norm after the ssm": MambaConfig(ssm_norm=True, ssm=S6Config(d_state=4)),
    "biases": MambaConfig(bias=True, conv_bias=False, ssm=S6Config(d_state=4)),
    "convolution of one": MambaConfig(d_conv=1, expand=1, ssm=S6Config(d_state=4)),
    "no ssm": MambaConfig(ssm=None),
    "s4d": MambaConfig(ssm=S4DConfig(d_state=8)),
    "s4d inv": MambaConfig(ssm=S4DConfig(d_state=8, a_init="inv", discretization="euler"), ssm_norm=True),
    "s4d real": MambaConfig(ssm=S4DConfig(d_state=4, a_init="real", skip=False)),
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


def state_bytes(config: MixerConfig, *, tokens: int = 0, activation: int = 4) -> int:
    """Bytes of the state of one sequence.

    `tokens` is the room it has where it grows, `activation` the size of a number in the model's dtype; what accumulates
    over the length is in fp32.
    """
    match config:
        case MambaConfig():
            inside = 0 if config.ssm is None else config.ssm.d_state * 4
            return config.expand * D_MODEL * ((config.d_conv - 1) * activation + inside)
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

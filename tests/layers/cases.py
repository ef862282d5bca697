"""Every mixer and inner SSM, with each of its switches: who sits the exam."""

from __future__ import annotations

import torch

from selective_ssm.layers import MambaConfig, Mixer, MixerConfig, MLPConfig, S4DConfig, S6Config, build_mixer

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
    "norms of B, C and delta": _around(norm_eps=1e-6),
    "norm of C alone": _around(norm_eps=1e-2, selective_delta=False, selective_B=False),
    "complex A, norms": _around(norm_eps=1e-6, a_init="s4d_lin"),
    "no skip": _around(skip=False),
    "norm after the ssm": MambaConfig(ssm_norm=True, ssm=S6Config(d_state=4)),
    "biases": MambaConfig(bias=True, conv_bias=False, ssm=S6Config(d_state=4)),
    "convolution of one": MambaConfig(d_conv=1, expand=1, ssm=S6Config(d_state=4)),
    "s4d": MambaConfig(ssm=S4DConfig(d_state=8)),
    "s4d inv": MambaConfig(ssm=S4DConfig(d_state=8, a_init="inv", discretization="euler"), ssm_norm=True),
    "s4d real": MambaConfig(ssm=S4DConfig(d_state=4, a_init="real", skip=False)),
    "mlp": MLPConfig(multiple_of=8),
    "mlp of gpt": MLPConfig(expansion=4.0, multiple_of=1, gated=False, activation="gelu", bias=True),
}


def build(case: str, dtype: torch.dtype = torch.float64) -> Mixer:
    """The mixer of a case, its parameters moved off the values that they start with."""
    mixer = build_mixer(CASES[case], D_MODEL).to(dtype)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer

"""Small models of transformers, of every kind that its configs allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

VOCABULARY = 50
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": None}
_OTHER = {
    "state_size": 8,
    "conv_kernel": 3,
    "use_bias": True,
    "time_step_rank": 3,
    "tie_word_embeddings": False,
    "residual_in_fp32": False,
}

CASES: dict[str, tuple[type[Any], Any]] = {
    "mamba": (MambaForCausalLM, MambaConfig(**_SMALL)),
    "mamba, biases": (MambaForCausalLM, MambaConfig(**_SMALL, **_OTHER)),
    "mamba, no biases": (MambaForCausalLM, MambaConfig(**_SMALL, use_conv_bias=False, conv_kernel=3)),
    "mamba, tanh": (MambaForCausalLM, MambaConfig(**_SMALL, hidden_act="tanh", state_size=8)),
    "mamba, narrow": (MambaForCausalLM, MambaConfig(**_SMALL, conv_kernel=1, state_size=1, expand=1)),
    "falcon": (FalconMambaForCausalLM, FalconMambaConfig(**_SMALL)),
    "falcon, biases": (FalconMambaForCausalLM, FalconMambaConfig(**_SMALL, **_OTHER, mixer_rms_eps=1e-3)),
}


def model_of(case: str) -> Any:
    """One of them, whose every parameter matters."""
    torch.manual_seed(0)
    kind, config = CASES[case]
    model = kind(config).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move norms and biases away from one and zero."""
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)


def some_ids(*shape: int) -> torch.Tensor:
    """Tokens, the same each time."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))

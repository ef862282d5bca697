"""What ours is timed beside on a CPU: Hugging Face's Mamba in plain torch, and mambapy's parallel scan.

Legend: B batch, L length, D channels, N state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from selective_ssm.bench import huggingface
from selective_ssm.bench.contenders import Contender, absent, imported
from selective_ssm.bench.cpu.cases import TaskCase
from selective_ssm.models import LanguageModelConfig

PEERS = ("transformers", "mambapy")


def mambapy_scan(inputs: Mapping[str, Tensor]) -> Contender:
    """Its parallel scan, between the same operations of plain torch as in its block."""
    module = imported("mambapy.pscan")
    if module is None:
        return absent("mambapy")
    return Contender("mambapy", partial(_parallel_scan, module.pscan, **inputs), list(inputs.values()))


def transformers_models(case: TaskCase, config: LanguageModelConfig, names: tuple[str, ...]) -> Iterator[Contender]:
    """Hugging Face's model at a task, in each way that it can run here.

    With its loop over tokens, compiled (layer by layer) with an associative scan, and with mambapy's parallel scan.
    """
    if case.task == "update":
        return
    transformers = imported("transformers")
    for who, peer, options in (
        ("transformers", "transformers", {}),
        ("transformers, compiled", "transformers", {"use_associative_scan": True}),
        ("transformers, mambapy", "mambapy", {"use_mambapy": True}),
    ):
        if peer not in names:
            continue
        if transformers is None or imported(peer) is None:
            yield absent(who)
            continue
        model = huggingface.mamba(transformers, config, **options).to(case.dtype)
        call = huggingface.TASKS[case.task](model, torch.randint(config.vocab_size, (case.batch, case.length)))
        if who.endswith("compiled"):
            # A layer knows its number, for which its code is compiled anew; what comes of it is the same, and cached.
            imported("torch._dynamo.config").recompile_limit = 4 * config.n_layer
            for layer in model.backbone.layers:
                layer.compile()
        yield Contender(who, call, [])


def _parallel_scan(
    pscan: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    delta = F.softplus(delta + delta_bias)
    decay = torch.exp(delta[..., None] * A)
    states = pscan(decay, (delta * u)[..., None] * B[:, :, None])
    return ((states @ C[..., None].to(states.dtype)).squeeze(3) + D * u) * F.silu(z)

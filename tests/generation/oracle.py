"""What ought to be written, in the plainest way: all is read anew for each token, and drawn in Python's own numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch

from selective_ssm.generation import Sampling
from selective_ssm.layers import MambaConfig, MLPConfig
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.ops.sample.reference import stream_of, uniform

VOCABULARY = 257


def untrained_model(d_model: int = 16, n_layer: int = 3) -> LanguageModel:
    """In float64, with a head large enough for the next token to be anything but even."""
    pattern = (MambaConfig(), MLPConfig())
    config = LanguageModelConfig(
        d_model=d_model, n_layer=n_layer, vocab_size=VOCABULARY, pattern=pattern, tie_embeddings=False
    )
    made = LanguageModel(config).double().eval()
    assert made.head is not None
    torch.nn.init.normal_(made.head.weight)
    torch.nn.init.normal_(made.embedding.weight)
    return made


@cache
def shared_model() -> LanguageModel:
    """One that tests only read."""
    torch.manual_seed(0)
    return untrained_model()


def candidates(logits: Sequence[float], sampling: Sampling, seen: set[int]) -> dict[int, float]:
    """What may be drawn, and how probable it is."""
    penalty, temperature = sampling.repetition_penalty, sampling.temperature
    scores = [(x / penalty if x > 0 else x * penalty) if id in seen else x for id, x in enumerate(logits)]
    ranked = sorted(range(len(scores)), key=lambda id: (-scores[id], id))
    if temperature == 0:
        return {ranked[0]: 1.0}
    weight = {id: math.exp((scores[id] - scores[ranked[0]]) / temperature) for id in ranked}
    kept = ranked[: sampling.top_k or None]
    total, before = sum(weight[id] for id in kept), 0.0
    nucleus: list[int] = []
    for id in kept:
        if sampling.top_p < 1 and before >= sampling.top_p * total:
            break
        nucleus.append(id)
        before += weight[id]
    likely = [id for id in nucleus if weight[id] >= sampling.min_p]
    total = sum(weight[id] for id in likely)
    return {id: weight[id] / total for id in sorted(likely)}


def drawn(logits: Sequence[float], sampling: Sampling, position: int, seen: set[int]) -> int:
    """The token."""
    return drawn_with_margin(logits, sampling, position, seen)[0]


def drawn_with_margin(logits: Sequence[float], sampling: Sampling, position: int, seen: set[int]) -> tuple[int, float]:
    """The token, and how far the number was from where another would be drawn; greedy, the gap to the next logit."""
    if sampling.temperature == 0:
        best = next(iter(candidates(logits, sampling, seen)))
        return best, logits[best] - max(x for id, x in enumerate(logits) if id != best)
    number = uniform(torch.tensor([stream_of(sampling.seed)]), torch.tensor([position])).item() / 2**24
    reached, margin, found = 0.0, math.inf, None
    for id, probability in candidates(logits, sampling, seen).items():
        reached += probability
        margin = min(margin, abs(reached - number))
        if found is None and reached >= number * (1 - 1e-15):
            found = id
    assert found is not None
    return found, margin


@torch.no_grad()
def written_alone(model: LanguageModel, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
    """The answer to a prompt."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids])).logits[0, -1].tolist()
        ids.append(drawn(logits, sampling, len(ids), set(ids)))
    return ids[len(prompt) :]

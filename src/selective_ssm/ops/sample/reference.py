"""The choice of tokens in plain torch: the specification that the kernel is held against.

What is compared and added are whole numbers, so that neither the order in which a device adds nor the rows beside it
change a token: probabilities are weights in units of 2⁻³⁴ of the most likely token's, shares of them in units of 2⁻²⁴.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE_BITS = 24
"""A share is a whole number of 2⁻²⁴."""

_WEIGHT_BITS = 34
# Constants of the splitmix64 generator (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def forward(
    logits: Tensor,
    real: Tensor,
    whole: Tensor,
    position: Tensor,
    seen: Tensor | None,
    rows: Tensor | None,
    draws: bool,
    ranked: int,
    likely: bool,
    logprobs: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the tokens (B,) int64, and their log-probabilities (B,) in fp32 at least, or none, of size zero."""
    if rows is not None:
        real, whole, position, seen = real[rows], whole[rows], position[rows], None if seen is None else seen[rows]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature, penalty = real.unbind(1)
    stream, top_k, top_p, min_p = whole.unbind(1)
    scores = logits if seen is None else penalised(logits, seen, penalty)
    tokens = scores.argmax(dim=-1)
    if draws:
        weights = weights_of(scores, temperature)
        if ranked:
            weights = keep_best(weights, top_k, top_p, ranked)
        if likely:
            weights = keep_likely(weights, min_p)
        tokens = torch.where(temperature > 0, draw(weights, uniform(stream, position)), tokens)
    return tokens, log_probabilities(logits, tokens) if logprobs else logits.new_empty(0)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithm of each token's probability, (B,), by the model alone: no setting changes it."""
    return logits.log_softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(-1)


def penalised(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide the positive logits of seen tokens by the row's penalty, and multiply the others."""
    by = penalty[:, None]
    return torch.where(seen, torch.where(logits > 0, logits / by, logits * by), logits)


def weights_of(logits: Tensor, temperature: Tensor) -> Tensor:
    """exp((x − max x) / temperature) as whole numbers (B, V), the most likely token's 2³⁴; 0 is below 6e-11 of it."""
    temperature = temperature.to(logits.dtype).clamp_min(torch.finfo(logits.dtype).tiny)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    return (shifted.exp() * 2.0**_WEIGHT_BITS).long()


def keep_best(weights: Tensor, k: Tensor, p: Tensor, ranked: int) -> Tensor:
    """Keep the k best tokens, and of these the fewest that have a share p of the k's weight; the others' become 0.

    Args:
        weights: (B, V).
        k: (B,).
        p: (B,) in units of 2⁻²⁴.
        ranked: at least the k of every row that keeps not all; V or more where such a row has no k, but a p.
    """
    vocabulary = weights.shape[-1]
    id_bits = vocabulary.bit_length()
    backwards = vocabulary - 1 - torch.arange(vocabulary, device=weights.device)
    keys = (weights << id_bits) | backwards  # no two are equal, so that every way to rank them gives one order
    if ranked < vocabulary:
        keys = keys.topk(ranked, dim=-1).values
    else:
        keys = keys.sort(dim=-1, descending=True).values
    best, order = keys >> id_bits, vocabulary - 1 - (keys & (2**id_bits - 1))
    best = best * (torch.arange(best.shape[-1], device=best.device) < k[:, None])
    sums = best.cumsum(dim=-1)
    best = best * (sums - best < part(sums[:, -1], p)[:, None])
    keeps_all = (k >= vocabulary) & (p == 2**SHARE_BITS)
    return torch.where(keeps_all[:, None], weights, torch.zeros_like(weights).scatter(-1, order, best))


def keep_likely(weights: Tensor, p: Tensor) -> Tensor:
    """Keep the weights that are at least a share p, in units of 2⁻²⁴, of the largest there can be; others become 0."""
    least = p << (_WEIGHT_BITS - SHARE_BITS)
    return weights * (weights >= least[:, None])


def stream_of(seed: int) -> int:
    """Where a seed's numbers begin; neighbouring seeds are far from each other. Both are integers of 64 bits."""
    return int(_mixed(torch.tensor(seed)))


def uniform(stream: Tensor, position: Tensor) -> Tensor:
    """Give each position of a stream its own whole number from 1 to 2²⁴, by hashing both with splitmix64.

    Only 64-bit integer arithmetic is used, so that every device gives the same number.

    Args:
        stream: int64, any shape, `stream_of` a seed.
        position: int64, the same shape.

    Returns:
        int64 of that shape.

    Example:
        >>> streams = torch.tensor([stream_of(5), stream_of(5), stream_of(6)])
        >>> numbers = uniform(streams, torch.tensor([1, 1, 1]))
        >>> bool(numbers[0] == numbers[1]), bool(numbers[1] == numbers[2])
        (True, False)
    """
    return _shifted(_mixed(stream + _GOLDEN * position), 64 - SHARE_BITS) + 1


def draw(weights: Tensor, number: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token at which it reaches a share ``number`` of its end.

    As the number is above 0, the token found has a weight above 0.

    Args:
        weights: (B, V) int64.
        number: (B,) int64 from 1 to 2²⁴, in units of 2⁻²⁴.

    Returns:
        (B,) int64 ids.
    """
    sums = weights.cumsum(dim=-1)
    found = torch.searchsorted(sums, part(sums[:, -1], number)[:, None]).squeeze(-1)
    return found.clamp_max(weights.shape[-1] - 1)  # where logits are no numbers there are no sums, and an id still


def part(total: Tensor, share: Tensor) -> Tensor:
    """That share of a total, rounded up: ⌈total · share / 2²⁴⌉, exact where total · share / 2²⁴ is an int64."""
    mask = 2**SHARE_BITS - 1
    return (total >> SHARE_BITS) * share + (((total & mask) * share + mask) >> SHARE_BITS)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; products wrap round at 64 bits."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

"""Sampling: from logits to the next token, as pure functions that give the same answer on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from selective_ssm.errors import UserError

# Constants of the splitmix64 generator (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class SamplingOptions(TypedDict, total=False):
    """What `Sampler` takes, as the keywords of a function that makes one."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws the next token of each row: ``sampler(logits, position)``.

    The logits are divided by the temperature, then cut by top-k, top-p and min-p in this order, then one token is
    drawn. The draw depends on ``seed`` and ``position`` only, so that a text can be cut anywhere and gone on with.

    Args:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest tokens, most likely first, that together have at least this probability (Holtzman et
            al., 2020, section 3.1); 1 keeps all.
        min_p: keep the tokens at least this many times as likely as the most likely one (Nguyen et al., 2024,
            section 3); 0 keeps all.
        seed: any integer of 64 bits.

    Raises:
        UserError: a setting is out of its range.

    Example:
        >>> Sampler(temperature=0)(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([7]))
        tensor([1])
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must be an integer of 64 bits, got {self.seed}")

    def __call__(self, logits: Tensor, position: Tensor) -> Tensor:
        """Draw a token for each row.

        Args:
            logits: (B, V), floating.
            position: (B,) int64, the number of tokens before the one that is drawn.

        Returns:
            (B,) int64, the ids of the tokens.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        logits = with_temperature(logits, self.temperature)
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p:
            logits = keep_min_p(logits, self.min_p)
        return draw(logits, uniform(self.seed, position))


def with_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, in fp32, with the largest logit moved to 0 so that no temperature overflows."""
    logits = logits.float()
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Set all but the k largest logits to −inf; of equal ones, torch's ``topk`` decides."""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities sum to at least p, at least one; the rest is −inf."""
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    mass_before[..., 0] = 0
    kept = ordered.masked_fill(mass_before >= p, float("-inf"))
    return torch.empty_like(logits).scatter(-1, order, kept)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens whose probability is at least p times the largest one; the rest is −inf."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), float("-inf"))


def uniform(seed: int, position: Tensor) -> Tensor:
    """Give each position its own number in (0, 1], by hashing (seed, position) with splitmix64.

    Only 64-bit integer arithmetic is used, so that every device gives the same number.

    Args:
        seed: any integer of 64 bits.
        position: int64, any shape.

    Returns:
        fp32 multiples of 2⁻²⁴, in ``position``'s shape.

    Example:
        >>> bool((uniform(1, torch.arange(3)) == uniform(1, torch.arange(3))).all())
        True
    """
    stream = _mixed(torch.full_like(position, seed))
    bits = _shifted(_mixed(stream + _GOLDEN * position), 40)
    return (bits + 1).float() * 2.0**-24


def draw(logits: Tensor, number: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token at which it reaches ``number``, in (0, 1], of its end.

    As the number is above 0, the token found has a probability above 0.

    Args:
        logits: (B, V) fp32.
        number: (B,) fp32 in (0, 1].

    Returns:
        (B,) int64 ids.
    """
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    reached = number[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, reached).squeeze(-1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; products wrap round at 64 bits."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

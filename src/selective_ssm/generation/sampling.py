"""Choosing the next token: pure functions, each row by its own settings, with the same answer on every device.

What is compared and added are whole numbers, so that neither the order in which a device adds nor the rows beside it
change a token: probabilities are weights in units of 2⁻³⁴ of the most likely token's, shares of them in units of 2⁻²⁴.

Legend: B rows, V vocabulary, K the most likely tokens of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from selective_ssm.errors import UserError

ALL = 2**62
"""More tokens than any vocabulary has."""

_WEIGHT_BITS = 34
_SHARE_BITS = 24
# Constants of the splitmix64 generator (Steele, Lea and Flood, 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class SamplingOptions(TypedDict, total=False):
    """What `Sampling` takes, as the keywords of a function that makes one."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token of one row is chosen.

    The repetition penalty changes the logits, the temperature divides them, top-k, top-p and min-p cut in this order,
    then one token is drawn. The draw depends on ``seed`` and the token's position only, so that a text can be cut
    anywhere and gone on with, and never depends on the rows beside it.

    Args:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens, of equal ones those with the lower ids; 0 keeps all.
        top_p: keep the fewest tokens, most likely first, that together have at least this probability (Holtzman et
            al., 2020, section 3.1); 1 keeps all.
        min_p: keep the tokens at least this many times as likely as the most likely one (Nguyen et al., 2024,
            section 3); 0 keeps all.
        repetition_penalty: divides the positive logits of tokens that prompt and answer hold, and multiplies the
            negative ones (Keskar et al., 2019, section 4.1); 1 changes nothing.
        seed: any integer of 64 bits.

    Raises:
        UserError: a setting is out of its range.

    Example:
        >>> Sampling(temperature=0.7, top_k=50).needs
        Needs(draw=True, ranked=64, likely=False, penalty=False, logprobs=False)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 or more and finite, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be between 0 and 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed must be an integer of 64 bits, got {self.seed}")

    @property
    def needs(self) -> Needs:
        """The work that these settings ask for."""
        penalty = self.repetition_penalty != 1
        if self.temperature == 0:
            return Needs(penalty=penalty)
        ranked = 1 << (self.top_k - 1).bit_length() if self.top_k else ALL if self.top_p < 1 else 0
        return Needs(draw=True, ranked=ranked, likely=self.min_p > 0, penalty=penalty)


class Needs(NamedTuple):
    """What some row of a batch needs: all rows go through the same work, and through no more than that.

    A row's token is the same whatever its neighbours need.

    Attributes:
        draw: whether a token is drawn, and not always the most likely one taken.
        ranked: how many of the most likely tokens are put in order, for top-k and top-p.
        likely: whether unlikely tokens are cut by min-p.
        penalty: whether tokens that were there before are made less likely.
        logprobs: whether log-probabilities are wanted.
    """

    draw: bool = False
    ranked: int = 0
    likely: bool = False
    penalty: bool = False
    logprobs: bool = False

    @classmethod
    def of_all(cls, needs: Iterable[Needs]) -> Needs:
        """What rows need together."""
        return cls(*map(max, zip(*needs, strict=True)))


class Settings(NamedTuple):
    """The settings of rows as tensors, where the logits are.

    Attributes:
        real: (B, 2) fp32: temperature, repetition penalty.
        whole: (B, 4) int64: the seed's stream (`streams`), top-k, and the shares of top-p and min-p.
    """

    real: Tensor
    whole: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Settings:
        """The settings of each row, on the CPU."""
        real = [(one.temperature, one.repetition_penalty) for one in rows]
        seeds = torch.tensor([one.seed for one in rows], dtype=torch.int64)
        cuts = [(one.top_k or ALL, _share(one.top_p), _share(one.min_p)) for one in rows]
        whole = torch.cat([streams(seeds)[:, None], torch.tensor(cuts, dtype=torch.int64)], dim=1)
        return cls(torch.tensor(real, dtype=torch.float32), whole)

    def rows(self, index: Tensor) -> Settings:
        """Those of some rows; a negative index counts from the end."""
        return Settings(self.real[index], self.whole[index])


def sample(logits: Tensor, settings: Settings, position: Tensor, needs: Needs, seen: Tensor | None = None) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: (B, V), floating; computed with in fp32 at least.
        settings: of each row.
        position: (B,) int64, the number of tokens before the one that is chosen.
        needs: what some row needs; the work is of fixed shape and never waits for the device.
        seen: (B, V) bool, the tokens that were there before; needed for a penalty.

    Returns:
        (B,) int64, the ids of the tokens.

    Example:
        >>> greedy = Sampling(temperature=0)
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), Settings.of([greedy]), torch.tensor([7]), greedy.needs)
        tensor([1])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    temperature, penalty = settings.real.unbind(1)
    stream, top_k, top_p, min_p = settings.whole.unbind(1)
    if needs.penalty:
        assert seen is not None
        logits = penalised(logits, seen, penalty)
    best = logits.argmax(dim=-1)
    if not needs.draw:
        return best
    weights = weights_of(logits, temperature)
    if needs.ranked:
        weights = keep_best(weights, top_k, top_p, needs.ranked)
    if needs.likely:
        weights = keep_likely(weights, min_p)
    return torch.where(temperature > 0, draw(weights, uniform(stream, position)), best)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithm of each token's probability, (B,), by the model alone: no setting changes it."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
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
        ranked: at least the k of every row that keeps not all; `ALL` where a row has no k, but a p.
    """
    vocabulary = weights.shape[-1]
    id_bits = vocabulary.bit_length()
    ids = torch.arange(vocabulary, device=weights.device)
    keys = (weights << id_bits) | (
        vocabulary - 1 - ids
    )  # no two are equal, so that every way to rank them gives one order
    if ranked < vocabulary:
        keys = keys.topk(ranked, dim=-1).values
    else:
        keys = keys.sort(dim=-1, descending=True).values
    best, order = keys >> id_bits, vocabulary - 1 - (keys & (2**id_bits - 1))
    best = best * (torch.arange(best.shape[-1], device=best.device) < k[:, None])
    sums = best.cumsum(dim=-1)
    best = best * (sums - best < _part(sums[:, -1], p)[:, None])
    keeps_all = (k >= vocabulary) & (p == 2**_SHARE_BITS)
    return torch.where(keeps_all[:, None], weights, torch.zeros_like(weights).scatter(-1, order, best))


def keep_likely(weights: Tensor, p: Tensor) -> Tensor:
    """Keep the weights that are at least a share p, in units of 2⁻²⁴, of the largest there can be; others become 0."""
    least = p << (_WEIGHT_BITS - _SHARE_BITS)
    return weights * (weights >= least[:, None])


def uniform(stream: Tensor, position: Tensor) -> Tensor:
    """Give each position of a stream its own whole number from 1 to 2²⁴, by hashing both with splitmix64.

    Only 64-bit integer arithmetic is used, so that every device gives the same number.

    Args:
        stream: int64, any shape, the `streams` of seeds.
        position: int64, the same shape.

    Returns:
        int64 of that shape.

    Example:
        >>> numbers = uniform(streams(torch.tensor([5, 5, 6])), torch.tensor([1, 1, 1]))
        >>> bool(numbers[0] == numbers[1]), bool(numbers[1] == numbers[2])
        (True, False)
    """
    return _shifted(_mixed(stream + _GOLDEN * position), 64 - _SHARE_BITS) + 1


def streams(seeds: Tensor) -> Tensor:
    """Where the numbers of each seed begin, int64 as the seeds: neighbouring seeds are far from each other."""
    return _mixed(seeds)


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
    found = torch.searchsorted(sums, _part(sums[:, -1], number)[:, None]).squeeze(-1)
    return found.clamp_max(
        weights.shape[-1] - 1
    )  # logits that are no numbers have no sums; what is drawn is an id still


def _share(fraction: float) -> int:
    """A number from 0 to 1 in units of 2⁻²⁴, rounded up: what is above 0 stays so."""
    return math.ceil(fraction * 2**_SHARE_BITS)


def _part(total: Tensor, share: Tensor) -> Tensor:
    """That share of a total, rounded up: ⌈total · share / 2²⁴⌉, exact where total · share / 2²⁴ is an int64."""
    mask = 2**_SHARE_BITS - 1
    return (total >> _SHARE_BITS) * share + (((total & mask) * share + mask) >> _SHARE_BITS)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; products wrap round at 64 bits."""
    x = (x ^ _shifted(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _shifted(x, 27)) * _MULTIPLIERS[1]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A right shift that brings in zeros; torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

"""How the next token of each row is chosen: what people ask for, and what `ops.sample` is told.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from selective_ssm import ops
from selective_ssm.errors import UserError
from selective_ssm.ops.sample.reference import SHARE_BITS, stream_of

ALL = 2**62
"""More tokens than any vocabulary has."""


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
        for name in ("top_k", "seed"):
            if not isinstance(value := getattr(self, name), Integral):
                raise UserError(f"{name} must be an integer, got {value!r}")
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
    def kept(self) -> int:
        """How many of the most likely tokens top-k keeps."""
        return min(int(self.top_k) or ALL, ALL)

    @property
    def needs(self) -> Needs:
        """The work that these settings ask for."""
        penalty = self.repetition_penalty != 1
        if self.temperature == 0:
            return Needs(penalty=penalty)
        ranked = 1 << (self.kept - 1).bit_length() if self.top_k else ALL if self.top_p < 1 else 0
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
    """The settings of slots as tensors, where the logits are.

    Attributes:
        real: (slots, 2) fp32: temperature, repetition penalty.
        whole: (slots, 4) int64: the seed's stream, top-k, and the shares of top-p and min-p.
    """

    real: Tensor
    whole: Tensor

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> Settings:
        """The settings of each slot, on the CPU."""
        real = [(one.temperature, one.repetition_penalty) for one in rows]
        whole = [(stream_of(one.seed), one.kept, _share(one.top_p), _share(one.min_p)) for one in rows]
        return cls(torch.tensor(real, dtype=torch.float32), torch.tensor(whole, dtype=torch.int64))


def sample(
    logits: Tensor,
    settings: Settings,
    position: Tensor,
    needs: Needs,
    seen: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Choose a token for each row; see `ops.sample`.

    Args:
        logits: (B, V), floating.
        settings: of each slot.
        position: (slots,) int64, the number of tokens before the one that is chosen.
        needs: what some row needs.
        seen: (slots, V) bool, the tokens that were there before; needed for a penalty.
        rows: (B,) int64, the slot of each row; by default row b has slot b.

    Returns:
        (B,) int64, the ids of the tokens, and (B,), their log-probabilities in fp32 at least, where needed.

    Example:
        >>> greedy = Sampling(temperature=0)
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), Settings.of([greedy]), torch.tensor([7]), greedy.needs)
        (tensor([1]), None)
    """
    draws, ranked, likely, penalty, logprobs = needs
    tokens, found = ops.sample(
        logits,
        *settings,
        position,
        seen if penalty else None,
        rows=rows,
        draws=draws,
        ranked=ranked,
        likely=likely,
        logprobs=logprobs,
    )
    return tokens, found if logprobs else None


def _share(fraction: float) -> int:
    """A number from 0 to 1 in units of 2⁻²⁴, rounded up: what is above 0 stays so."""
    return math.ceil(fraction * 2**SHARE_BITS)

"""The choice of the next token, as one operator: the maths, and the function people call.

Of logits x, divided or multiplied by a penalty where a token was seen before, a token has the weight

    w = exp((x − max x) / temperature);

top-k, top-p and min-p cut in this order, and what is cut has no weight any more. The token drawn is the first at which
the sum of weights, in the order of ids, reaches a share of its end, which a hash of seed and position gives. All this
is done in whole numbers: see `reference`.

Legend: B rows, V vocabulary, S rows of settings: B, or as many as are chosen from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from selective_ssm.ops import checks
from selective_ssm.ops.dispatch import Case, choose
from selective_ssm.ops.registration import call, define
from selective_ssm.ops.sample import cuda, reference


class Backend(Protocol):
    """What a module must offer to run the operator; settings lie without gaps, and strides in V are 1."""

    def forward(
        self,
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
        ...


_BACKENDS: Mapping[str, Backend] = {"cuda": cuda, "reference": reference}
_DTYPES = (*checks.LOW_AND_SINGLE, torch.float64)


def sample(
    logits: Tensor,
    real: Tensor,
    whole: Tensor,
    position: Tensor,
    seen: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    draws: bool,
    ranked: int = 0,
    likely: bool = False,
    logprobs: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses a token for each row, by settings of its own; nothing is differentiated.

    A row's token depends neither on the rows beside it nor on what these need, and equal logits are told apart by their
    ids, the lower before the higher. Of logits that are not a number nothing is said, but that an id of the vocabulary
    comes out. Weights are computed in fp32 (float64 for float64), where backends round exp in ways of their own: their
    tokens differ only where a sum of weights comes within 2⁻²⁰ of its end to the share that is drawn or kept.

    Args:
        logits: (B, V) fp32, bf16, fp16 or float64.
        real: (S, 2) fp32: temperature, 0 for the most likely token; and the repetition penalty, 1 for none.
        whole: (S, 4) int64: a stream of random numbers (`reference.stream_of` a seed); how many of the most likely
            tokens are kept, V or more for all; the share of these that the fewest kept have together; and the share of
            the most likely token's weight that a token must have. Shares are in units of 2⁻²⁴, at most 2²⁴.
        position: (S,) int64, which number of the stream is taken.
        seen: (S, V) bool, the tokens that are penalised; None where no row has a penalty.
        rows: (B,) int64, which of the settings, positions (their number may be another) and seen tokens each row of
            logits has; a negative one counts from the end. By default row b has those of row b.
        draws: whether some row has a temperature above 0.
        ranked: 0 where no row that draws is cut by top-k or top-p; else at least the k of each that is, V or more
            where one of them has a p alone.
        likely: whether some row that draws is cut by min-p.
        logprobs: whether log-probabilities are wanted.
        backend: which implementation runs it; None for the fastest that can (see `ops.dispatch`).

    Returns:
        The tokens' ids (B,) int64; the natural logarithms of their probabilities by the logits alone, (B,) fp32
        (float64 for float64), of size zero where not wanted.

    Raises:
        ValueError: a shape or device does not fit, or the backend asked for cannot run here.
        TypeError: a dtype does not fit.

    Source: top-p: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1;
    min-p: Nguyen et al. 2024, "Turning Up the Heat" (arXiv 2407.01082), section 3; penalty: Keskar et al. 2019, "CTRL"
    (arXiv 1909.05858), section 4.1.

    Example:
        >>> greedy, settings = torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 3, 2**24, 0]])
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), greedy, settings, torch.tensor([7]), draws=False)[0]
        tensor([1])
    """
    _check(logits, real, whole, position, seen, rows)
    return call(_SAMPLE, False, logits, real, whole, position, seen, rows, draws, ranked, likely, logprobs, backend)


def _check(
    logits: Tensor, real: Tensor, whole: Tensor, position: Tensor, seen: Tensor | None, rows: Tensor | None
) -> None:
    count, tokens = sizes = checks.sizes_of(logits, 2)
    checks.tensor("logits", logits, "BV", sizes, _DTYPES, logits.device)
    if tokens == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected a vocabulary of one token at least")
    letter, held, positions = "B", count, count
    if rows is not None:
        checks.tensor("rows", rows, "B", (count,), (torch.int64,), logits.device)
        letter, (held, _), (positions,) = "S", checks.sizes_of(real, 2), checks.sizes_of(position, 1)
        if count and 0 in (held, positions):
            raise ValueError(f"rows names {held} settings and {positions} positions; expected one of each at least")
    checks.tensor("real", real, (letter, "2"), (held, 2), (torch.float32,), logits.device)
    checks.tensor("whole", whole, (letter, "4"), (held, 4), (torch.int64,), logits.device)
    checks.tensor("position", position, letter, (positions,), (torch.int64,), logits.device)
    if seen is not None:
        checks.tensor("seen", seen, (letter, "V"), (held, tokens), (torch.bool,), logits.device)


def _forward(
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
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    chosen = choose(Case("sample", checks.device_type(logits), logits.dtype, complex_state=False), backend)
    seen = None if seen is None else _with_unit_stride(seen)
    settings = (real.contiguous(), whole.contiguous(), position.contiguous())
    run = _BACKENDS[chosen] if logits.numel() > 0 else reference
    rows = None if rows is None else rows.contiguous()
    return run.forward(_with_unit_stride(logits), *settings, seen, rows, draws, ranked, likely, logprobs)


def _fake_forward(
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
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    count, dtype = logits.shape[0], torch.promote_types(logits.dtype, torch.float32)
    return whole.new_empty(count), logits.new_empty(count if logprobs else 0, dtype=dtype)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


_SAMPLE = define(
    "sample(Tensor logits, Tensor real, Tensor whole, Tensor position, Tensor? seen, Tensor? rows, bool draws,"
    " int ranked, bool likely, bool logprobs, str? backend) -> (Tensor tokens, Tensor logprobs)",
    _forward,
    _fake_forward,
)

"""Who reads how much in a step of the engine."""

from __future__ import annotations

from collections.abc import Sequence


def shares(left: Sequence[int], budget: int) -> list[int]:
    """Deal a step's budget of prompt tokens out, first come, first served.

    A prompt longer than what is left of the budget reads a part and goes on in the next step, so that no step, and no
    row that is being written meanwhile, waits for a long prompt.

    Args:
        left: how many tokens each prompt still has to read, in the order of arrival.
        budget: the most tokens that all read together.

    Returns:
        How many each reads now.

    Example:
        >>> shares([3, 9, 4], budget=10)
        [3, 7, 0]
    """
    dealt: list[int] = []
    for wanted in left:
        dealt.append(min(wanted, budget))
        budget -= dealt[-1]
    return dealt

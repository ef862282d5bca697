"""When prompts are read, and who reads how much."""

from __future__ import annotations

from collections.abc import Sequence

_PATIENCE = 8
"""Steps that a prompt waits at most for others to be read with it, from when it has a slot to go to."""


def is_time_to_read(waiting: Sequence[int], budget: int, *, writing: int, waited: int) -> bool:
    """Whether prompts are read now, or wait for others: a read costs much the same for few tokens as for many.

    They are read when they fill the budget, when as many wait as are being written, or when they have waited for long.

    Args:
        waiting: how many tokens each prompt that has a slot, or could have one, still has to read.
        budget: the most tokens that all read together.
        writing: how many texts are being written.
        waited: for how many steps they have waited.

    Example:
        >>> [is_time_to_read([3], budget=10, writing=2, waited=steps) for steps in (0, 8)]
        [False, True]
        >>> [is_time_to_read(waiting, budget=10, writing=2, waited=0) for waiting in ([3, 4], [12])]
        [True, True]
    """
    return bool(waiting) and (sum(waiting) >= budget or len(waiting) >= writing or waited >= _PATIENCE)


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

"""What an engine has done, and how quickly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stats:
    """An engine's counters; times are in seconds.

    Attributes:
        queued, reading, running: how many texts wait, have their prompts read, are written.
        free_slots: how many more could be.
        tokens: how many were written since the beginning.
        tokens_per_second: of the time that was spent in steps.
        first_token_mean, first_token_max: from a text's submission to its first token.
        between_tokens_mean, between_tokens_max: from one token of a text to its next.
        prefix_hits, prefix_misses: how often the beginning of a text had, or had not, been read before.
    """

    queued: int
    reading: int
    running: int
    free_slots: int
    tokens: int
    tokens_per_second: float
    first_token_mean: float
    first_token_max: float
    between_tokens_mean: float
    between_tokens_max: float
    prefix_hits: int
    prefix_misses: int


@dataclass
class Spans:
    """Lengths of time, of which the mean and the longest are wanted."""

    count: int = 0
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a length of time, or several alike, or none."""
        if not count:
            return
        self.count += count
        self.total += seconds * count
        self.longest = max(self.longest, seconds)

    @property
    def mean(self) -> float:
        """Of all; 0 where there is none."""
        return self.total / self.count if self.count else 0.0

"""A text's present as a value: what a model needs to write on from where it stopped, without reading it again."""

from __future__ import annotations

from dataclasses import dataclass

from selective_ssm.models import ModelState


@dataclass(frozen=True, eq=False)
class Bookmark:
    """A text between two tokens: the model has read all of it but the last token.

    Attributes:
        state: of one slot, after all tokens but the last.
        pending: the last token, which a step from the state reads next.
        digest: of all tokens, the pending one too (`generation.digest`).
        seed: with which the text was sampled.
    """

    state: ModelState
    pending: int
    digest: bytes
    seed: int

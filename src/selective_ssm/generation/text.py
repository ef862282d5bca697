"""From token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError


def text_pieces(ids: Iterable[int], tokenizer: Tokenizer, gate: StopGate, *, after: int) -> Iterator[str]:
    """Decode a stream of tokens as it comes, until the gate closes.

    A character spread over several tokens comes out with its last byte; bytes that are no UTF-8 come out as U+FFFD.

    Args:
        ids: the tokens; no more are taken than needed.
        tokenizer: what makes bytes of them.
        gate: what ends the text.
        after: the token before the first one, on which its bytes may depend.

    Returns:
        An iterator over pieces, none of them empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for content in _contents(ids, tokenizer, after):
        piece = gate.feed(decoder.decode(content))
        if piece:
            yield piece
        if gate.closed:
            return
    rest = gate.feed(decoder.decode(b"", final=True)) + gate.rest()
    if rest:
        yield rest


def _contents(ids: Iterable[int], tokenizer: Tokenizer, before: int) -> Iterator[bytes]:
    """The bytes of each token: what it adds to the one before it (some tokenizers write a space between two)."""
    for one in ids:
        yield tokenizer.decode([before, one])[len(tokenizer.decode([before])) :]
        before = one


class StopGate:
    """Lets text through until a stop string has been read, across any borders between the pieces.

    Text that may be the beginning of a stop string is held back until that is settled.

    Args:
        stop: the strings that end the text; they are left out of it.

    Raises:
        UserError: one of them is empty.

    Example:
        >>> gate = StopGate(["END"])
        >>> [gate.feed(piece) for piece in ("one E", "gg, E", "ND, more")], gate.closed
        (['one ', 'Egg, ', ''], True)
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise UserError("a stop string must not be empty")
        self.closed = False
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, piece: str) -> str:
        """Take a piece in and return what can be let out."""
        text = self._held + piece
        found = [place for one in self._stop if (place := text.find(one)) >= 0]
        if found:
            self.closed, self._held = True, ""
            return text[: min(found)]
        cut = len(text) - max((_overlap(text, one) for one in self._stop), default=0)
        self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """Return what was held back, when no more will come."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

"""From token ids to text, piece by piece: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from selective_ssm.data.tokenizers import Tokenizer
from selective_ssm.errors import UserError


class TextStream:
    r"""Text out of tokens as they come, until a stop string.

    A character spread over several tokens comes out with its last byte; bytes that are no UTF-8 come out as U+FFFD.

    Args:
        tokenizer: what makes bytes of the tokens.
        stop: the strings that end the text; they are left out of it.
        after: the token before the first one, on which its bytes may depend.

    Raises:
        UserError: a stop string is empty.

    Example:
        >>> from selective_ssm.data import ByteTokenizer
        >>> text = TextStream(ByteTokenizer(), after=256)
        >>> [text.feed(byte) for byte in b"a\xc3\xa9"]
        ['a', '', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, after: int) -> None:
        self._tokenizer = tokenizer
        self._before = after
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._gate = StopGate(stop)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._gate.closed

    def feed(self, id: int) -> str:
        """Take a token in and return the text that can be let out, which may be none."""
        content = self._tokenizer.decode([self._before, id])[len(self._tokenizer.decode([self._before])) :]
        self._before = id  # what a token adds to the one before: some tokenizers write a space between two
        return self._gate.feed(self._characters.decode(content))

    def rest(self) -> str:
        """Return what was held back, when no more tokens will come."""
        return self._gate.feed(self._characters.decode(b"", final=True)) + self._gate.rest()


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
        if self.closed:
            return ""
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

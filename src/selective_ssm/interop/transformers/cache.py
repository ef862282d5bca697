"""What a model of ours has read, as transformers' `generate` carries it along."""

from __future__ import annotations

from torch import Tensor

from selective_ssm.errors import UserError
from selective_ssm.models import ModelState


class StateCache:
    """A `ModelState` where transformers expects a cache: of the same size whatever the length.

    Attributes:
        state: what the rows have read; None before the first token.
        length: how many columns of the batch were read, padding included.
    """

    is_compileable = False  # as transformers call it: whether `generate` may compile the model by itself
    is_croppable = False

    def __init__(self) -> None:
        self.state: ModelState | None = None
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many columns were read, by which `generate` tells what of a longer text is new."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row go on from the row that is named for it, as a beam search asks."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a state does not know what it was some tokens ago."""
        raise UserError("the last tokens cannot be taken back from a recurrent state: copy it before they are read")

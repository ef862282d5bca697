"""How much a model says of what a task asks for, at any length, in memory that does not grow with it."""

from __future__ import annotations

import torch

from selective_ssm.data.loader import IGNORE, Batch
from selective_ssm.models import LanguageModel, ModelState
from selective_ssm.tasks import Recall, Share, SyntheticTask, generator_of, recall

_CHUNK = 2**14
"""Tokens of one row that are read at once."""
_TOKENS, _TOKENS_ON_GPU = 2**18, 2**20
"""Tokens of all rows that are read, or kept, at once: enough to keep a device busy."""
_DRAWN, _DRAWN_ON_GPU = 2**22, 2**28
"""Tokens of rows that are drawn at once, 16 bytes each: on a CPU less than a minute's work for two small layers."""
_ROWS_DRAWN = 64
"""At most, however short they are."""
NOTHING_ASKED = Recall(tokens=Share(right=0, all=0), sequences=Share(right=0, all=0))


def drawn_together(length: int, device: torch.device) -> int:
    """How many rows are drawn at once, however many are read side by side: the steps in which a test goes on."""
    return max(1, min(_ROWS_DRAWN, (_DRAWN_ON_GPU if device.type == "cuda" else _DRAWN) // length))


@torch.no_grad()
def examined(model: LanguageModel, task: SyntheticTask, rows: int, *, first: int = 0) -> Recall:
    """Ask a model for the answers of rows that it has not learned from.

    Args:
        model: the model, on any device.
        task: the task, at the length that is asked for.
        rows: how many rows.
        first: from which batch on they are drawn; other batches are other rows.

    Returns:
        What was right; the same however many rows fit side by side, but for rows whose logits are as good as equal.
    """
    device = model.embedding.weight.device
    found = NOTHING_ASKED
    tokens = _TOKENS_ON_GPU if device.type == "cuda" else _TOKENS
    kept = task.length if model.backbone.state_grows else min(task.length, _CHUNK)
    drawn, side_by_side = drawn_together(task.length, device), max(1, tokens // kept)
    for index, start in enumerate(range(0, rows, drawn)):
        batch = task.draw(min(drawn, rows - start), generator_of(0, device, step=first + index, is_test=True))
        for part in range(0, len(batch.ids), side_by_side):
            some = Batch(batch.ids[part : part + side_by_side], batch.targets[part : part + side_by_side], None)
            found = found + _answered(model, some)
    return found


def _answered(model: LanguageModel, batch: Batch) -> Recall:
    """Read rows in chunks, for the logits of the columns in which an answer is due."""
    due = (batch.targets != IGNORE).any(0).nonzero()[:, 0]
    state: ModelState | None = None
    logits: list[torch.Tensor] = []
    for start in range(0, batch.ids.shape[1], _CHUNK):
        ids = batch.ids[:, start : start + _CHUNK]
        here = due[(due >= start) & (due < start + _CHUNK)] - start
        is_last = start + _CHUNK >= batch.ids.shape[1]
        found, state = model(ids, state, return_state=not is_last, logits_at=here)
        logits.append(found)
    return recall(torch.cat(logits, 1), batch.targets[:, due])

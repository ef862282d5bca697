"""A model as programs of `torch.export`: graphs of operators that run without the Python of its layers.

Legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from selective_ssm.errors import UserError
from selective_ssm.models.language import LanguageModel, LanguageModelOutput
from selective_ssm.models.state import ModelState

Tensors = dict[str, Tensor]
"""A state as `ModelState.tensors` gives it: its buffers and "position", by name."""


class Exported(NamedTuple):
    """A model's programs; both take (ids, state) and return (logits (B, V), state), the states as plain tensors.

    Attributes:
        prefill: reads whole sequences, ids (B, L), with L at least 1.
        step: reads one token a row, ids (B,).
    """

    prefill: ExportedProgram
    step: ExportedProgram


def export(model: LanguageModel) -> Exported:
    """Export reading and stepping, each for any batch and length.

    A program leaves the state that it is given as it is, and returns another: `ModelState.tensors` of each. That before
    a text is ``model.init_state(B).tensors()``, all zeros. No gradients flow, and ids are not checked. The scan and its
    neighbours are single operators in the graph, which pick their kernels when they run: a process that loads a program
    must have imported ``selective_ssm``.

    Args:
        model: on any device, which the programs are then for; they share its weights until they are saved.

    Returns:
        The two programs; `torch.export.save` writes one.

    Raises:
        UserError: the state of a mixer grows with the text, as attention's, or its Python depends on how long a text
            is, as that of S4, RWKV and RetNet.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=1, vocab_size=257)).eval()
        >>> prefill, step = export(model)
        >>> ids = torch.randint(257, (3, 20))
        >>> logits, state = prefill.module()(ids, model.init_state(3).tensors())
        >>> logits, state = step.module()(logits.argmax(-1), state)
        >>> state["position"].tolist()
        [21, 21, 21]
    """
    if model.backbone.state_grows:
        raise UserError("programs are for states of one size, and this model's grows with the text, as attention's")
    frozen = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in model.parameters()}
    model = copy.deepcopy(model, frozen)  # the programs must run as they were traced: where nothing has a gradient
    return Exported(_program(model, model.prefill, (2, 2)), _program(model, model.step, (2,)))


class _Flat(nn.Module):
    """One of the model's functions, with states as plain tensors."""

    def __init__(self, model: LanguageModel, function: Callable[[Tensor, ModelState], LanguageModelOutput]) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._layout = model.init_state(1)

    def forward(self, ids: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors]:
        before = self._layout.of(tensors).clone()  # a step writes to the state it is given
        logits, state = self._function(ids, before)
        assert state is not None
        return logits, state.tensors()


def _program(
    model: LanguageModel, function: Callable[[Tensor, ModelState], LanguageModelOutput], shape: tuple[int, ...]
) -> ExportedProgram:
    """Traced with ids of an example shape, of which no size stays in the program."""
    state = model.init_state(shape[0])
    ids = torch.zeros(shape, dtype=torch.int64, device=state.position.device)
    batch = {0: Dim("batch")}
    sizes = batch if ids.ndim == 1 else {**batch, 1: Dim("length", min=1)}
    tensors = state.tensors()
    dynamic = (sizes, dict.fromkeys(tensors, batch))
    try:
        with torch.no_grad():
            return torch.export.export(_Flat(model, function), (ids, tensors), dynamic_shapes=dynamic)
    except RuntimeError as error:  # torch has a class for each of many reasons, none of them public
        kinds = ", ".join(sorted({mixer.kind for mixer in model.config.layers}))
        reason = str(error).partition("\n")[0]
        raise UserError(f"mixers of {kinds} make no program for any batch and length: {reason}") from error

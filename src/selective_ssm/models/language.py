"""The language model: token ids in, logits out, whole sequences or token by token.

Legend: B batch, L length, S sequences in a pack, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from selective_ssm.errors import UserError
from selective_ssm.layers import State
from selective_ssm.layers.embedding import Embedding
from selective_ssm.layers.linear import Linear
from selective_ssm.models import checkpoint
from selective_ssm.models.backbone import Backbone
from selective_ssm.models.card import Card
from selective_ssm.models.config import LanguageModelConfig
from selective_ssm.models.decoding import Decoder
from selective_ssm.models.device import usable_device
from selective_ssm.models.fingerprint import of_others
from selective_ssm.models.hub import located
from selective_ssm.models.state import ModelState
from selective_ssm.ops import checks, linear
from selective_ssm.ops.sequences import token_positions


class LanguageModelOutput(NamedTuple):
    """What a language model answers.

    Attributes:
        logits: over the vocabulary, in its last axis.
        state: what comes after the last token, where it was asked for.
    """

    logits: Tensor
    state: ModelState | None


class LanguageModel(nn.Module):
    """A language model of residual branches over an embedding: Mamba by default, any pattern of mixers by config.

    Example:
        >>> model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257))
        >>> ids = torch.randint(257, (1, 10))
        >>> logits, state = model.prefill(ids)
        >>> logits.shape, state.position.tolist()
        (torch.Size([1, 257]), [10])
        >>> logits, state = model.step(logits.argmax(-1), state)
        >>> state.position.tolist()
        [11]
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        rows, width = config.padded_vocab_size, config.d_model
        self.embedding = Embedding(rows, width)
        self.positions = None if config.max_positions is None else nn.Embedding(config.max_positions, width)
        self.backbone = Backbone(config)
        self._decoder = Decoder()
        self.head = None if config.tie_embeddings else Linear(width, rows, bias=False)
        self._reset_embeddings()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the released code does; needed after building on the meta device."""
        self._reset_embeddings()
        self.backbone.reset_parameters()
        if self.head is not None:
            self.head.reset_parameters()

    def _reset_embeddings(self) -> None:
        for embedding in (self.embedding, self.positions):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        logits_at: Tensor | None = None,
    ) -> LanguageModelOutput:
        """Read whole sequences, in parallel over the length.

        Args:
            ids: (B, L) integers below vocab_size; B = 1 where sequences are packed.
            state: what came before, one slot a sequence; None is the start of a text. It is not changed.
            cu_seqlens: (S + 1,) int32 or int64, boundaries of packed sequences, non-decreasing from 0 to L.
            return_state: whether the state after the last token is wanted.
            logits_at: (n,) integers, the positions in L whose logits are wanted; all by default.

        Returns:
            logits (B, L, V), or (B, n, V) with `logits_at`, and the state of each sequence where asked for.

        Raises:
            UserError: ids or a state that do not fit the model or each other.
            ValueError, TypeError: cu_seqlens that are no boundaries of sequences.
        """
        x, state = self.hidden(ids, state, cu_seqlens=cu_seqlens, return_state=return_state)
        return LanguageModelOutput(self.logits(x if logits_at is None else x[:, logits_at]), state)

    def hidden(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, ModelState | None]:
        """Read whole sequences up to the head.

        Args:
            ids: as in `forward`.
            state: as in `forward`.
            cu_seqlens: as in `forward`.
            return_state: as in `forward`.

        Returns:
            What `logits` takes, (B, L, d_model), and the state of each sequence where asked for.
        """
        self._check(ids, state, cu_seqlens)
        before = self._positions_before(ids, state, cu_seqlens)
        x = self._embed(ids)
        if self.positions is not None:
            x = x + self._embed_positions(self.positions, token_positions(before, ids.shape[1], cu_seqlens, ids.device))
        layers = None if state is None else state.layers
        x, ends = self.backbone(x, layers, cu_seqlens=cu_seqlens, return_state=return_state)
        if not return_state:
            return x, None
        lengths = ids.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        return x, ModelState.from_layers(ends, before + lengths)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states (…, d_model): logits (…, V)."""
        logits = linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return logits[..., : self.config.vocab_size]

    def prefill(
        self, ids: Tensor, state: ModelState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> LanguageModelOutput:
        """Read whole sequences for what comes next: only the logits after each one's last token, and the state.

        Args:
            ids: (B, L), at least one token; otherwise as in `forward`.
            state: as in `forward`.
            cu_seqlens: as in `forward`.

        Returns:
            logits (B, V), or (S, V) where packed (NaN for an empty sequence, which has no last token), and the state.
        """
        self._check(ids, state, cu_seqlens)
        if ids.shape[1] == 0:
            raise UserError("prefill needs at least one token; the start of a text is a document boundary")
        if cu_seqlens is None:
            last = torch.full((1,), ids.shape[1] - 1, device=ids.device)
            logits, state = self(ids, state, return_state=True, logits_at=last)
            return LanguageModelOutput(logits[:, 0], state)
        last = (cu_seqlens[1:] - 1).clamp_min(0)
        logits, state = self(ids, state, cu_seqlens=cu_seqlens, return_state=True, logits_at=last)
        return LanguageModelOutput(logits[0].masked_fill((cu_seqlens.diff() == 0)[:, None], torch.nan), state)

    def read(self, ids: Tensor, state: ModelState | None = None, *, cu_seqlens: Tensor | None = None) -> ModelState:
        """Read whole sequences for the state alone: no logits are computed.

        Args:
            ids: as in `forward`.
            state: as in `forward`.
            cu_seqlens: as in `forward`.

        Returns:
            The state after the last token of each sequence.
        """
        _, state = self.hidden(ids, state, cu_seqlens=cu_seqlens, return_state=True)
        assert state is not None
        return state

    @torch.no_grad()
    def step(self, ids: Tensor, state: ModelState, *, state_indices: Tensor | None = None) -> LanguageModelOutput:
        """Read one token a row, in time and memory that do not depend on what came before where no state grows.

        No gradients are recorded, as the state is updated in place; `forward` from a state has them.

        Args:
            ids: (B,) integers below vocab_size.
            state: what came before. It is consumed: go on with the returned one, and `ModelState.clone` first to fork.
            state_indices: (B,) int32 or int64, the slot of each row; negative is padding. By default row b uses slot b.

        Returns:
            logits (B, V) after the token, and the state.

        Raises:
            UserError: ids that do not fit the model or the state, or no room for a token in a state that grows.
            ValueError, TypeError: state_indices that do not name a slot of its own for each row.
        """
        if ids.ndim != 1:
            raise UserError(f"step needs ids of the shape (B,), got {tuple(ids.shape)}")
        if state_indices is None and ids.shape[0] != state.slots:
            raise UserError(f"step got {ids.shape[0]} tokens for a state of {state.slots} slots; give state_indices")
        if state_indices is not None:
            checks.state_indices(state_indices, ids.shape[0], state.slots)
        x = self._embed(ids)
        if self.positions is not None:
            before = state.position if state_indices is None else state.position[state_indices.clamp_min(0)]
            x = x + self._embed_positions(self.positions, before)
        if torch.compiler.is_compiling():
            logits = self._advance(x, state.layers, state_indices)
        else:
            logits = self._decoder.step(self, self._advance, x, state, state_indices)
        if state_indices is None:
            state.position.add_(1)
        else:
            # As a number at once: to compare and then to convert is two launches.
            is_real = torch.ge(state_indices, 0, out=torch.empty_like(state_indices, dtype=torch.int64))
            state.position.index_add_(0, state_indices.clamp_min(0), is_real)
        return LanguageModelOutput(logits, state)

    def init_state(self, batch: int, max_length: int | None = None) -> ModelState:
        """The state before the first token of `batch` sequences.

        `max_length` is the room, in tokens, where a mixer's state grows; by default there is none, and only `forward`
        and its kin make more.
        """
        weight = self.embedding.weight
        layers = [
            layer.mixer.init_state(batch, weight.device, weight.dtype, max_length) for layer in self.backbone.layers
        ]
        return ModelState.from_layers(layers, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def num_parameters(self) -> dict[str, int]:
        """Number of parameters by part, which add up to the whole: a tied head counts once, as the embedding.

        Example:
            >>> LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257)).num_parameters()
            {'embedding': 4224, 'mamba': 6720, 'norms': 48}
        """
        counts: Counter[str] = Counter(embedding=_size(self.embedding))
        if self.positions is not None:
            counts["positions"] = _size(self.positions)
        for layer, mixer in zip(self.backbone.layers, self.config.layers, strict=True):
            counts[mixer.kind] += _size(layer.mixer)
        counts["norms"] = sum(_size(layer.norm) for layer in self.backbone.layers) + _size(self.backbone.norm_f)
        if self.head is not None:
            counts["head"] = _size(self.head)
        return dict(counts)

    def save_pretrained(
        self, folder: str | Path, *, model_type: str = "selective_ssm", card: Card | None = None
    ) -> None:
        """Write the model as a folder: config.json and model.safetensors (in shards past 4 GB), or what others read.

        A README.md tells of it, unless there is one that was not written so.

        Args:
            folder: where to write; it is made if absent, and a model that is there is replaced.
            model_type: "selective_ssm"; "mamba" or "falcon_mamba" for what Hugging Face's MambaForCausalLM or
                FalconMambaForCausalLM reads; "state-spaces" for what the package mamba_ssm reads.
            card: what the README.md is to say beside the config.

        Raises:
            FileProblem: the folder cannot be written to.
            UserError: the format cannot express this model, or it has adapters, which are no part of it.
        """
        for module in of_others(islice(self.modules(), 1, None)):
            raise UserError(
                f"the model has parts of another package ({type(module).__module__}), which its config does not tell "
                "of: merge adapters into its weights first (selective_ssm.interop.peft.merged)"
            )
        checkpoint.save(folder, self.config, self.state_dict(), model_type, card=card)

    @classmethod
    def outline(cls, config: LanguageModelConfig) -> LanguageModel:
        """The model on the meta device: every name and shape, no values.

        Raises:
            UserError: the config's parts do not fit each other, or a size is beyond what a tensor can have.
        """
        try:
            with torch.device("meta"):
                return cls(config)
        except (RuntimeError, TypeError, OverflowError) as error:  # which of them depends on the size
            reason = str(error).partition("\n")[0]
            raise UserError(f"a size in the config is beyond what a tensor can have: {reason}") from error

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> LanguageModel:
        """Read a model that `save_pretrained`, Hugging Face's Mamba or mamba_ssm wrote; nothing in it is executed.

        Args:
            folder: the folder with config.json; or, where none of that name is here, the name of a model on the
                Hugging Face hub, such as "state-spaces/mamba-130m".
            device: where the model goes.
            dtype: that of the weights; None keeps each as it was stored.

        Raises:
            FileProblem: a file is missing, truncated or foreign, or the hub gave none.
            UserError: config and weights do not make a model: names, shapes, values that are not finite; or the device
                is unknown or not here.
        """
        folder = located(folder)
        config, weights = checkpoint.read(folder, usable_device(device))
        checkpoint.check_depth(weights, config, folder)
        try:
            model = cls.outline(config)
        except UserError as error:
            raise UserError(f"the model in '{folder}' cannot be built: {error}") from error
        checkpoint.check(weights, model.state_dict(), folder)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
        return model

    def _embed(self, ids: Tensor) -> Tensor:
        known = self.config.vocab_size
        if (outside := checks.out_of_range(ids, known)) is not None:
            raise UserError(f"ids must be at least 0 and below vocab_size = {known}, got {outside}")
        return self.embedding(ids)

    def _embed_positions(self, table: nn.Embedding, positions: Tensor) -> Tensor:
        if (outside := checks.out_of_range(positions, table.num_embeddings)) is not None:
            raise UserError(f"the model has {table.num_embeddings} positions, got a text of {outside + 1} tokens")
        return table(positions)

    def _advance(self, x: Tensor, states: Sequence[State], state_indices: Tensor | None) -> Tensor:
        return self.logits(self.backbone.step(x, states, state_indices=state_indices))

    def _check(self, ids: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> None:
        if ids.ndim != 2:
            raise UserError(f"ids must have the shape (B, L), got {tuple(ids.shape)}")
        if cu_seqlens is not None:
            checks.cu_seqlens(cu_seqlens, *ids.shape)
        sequences = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if state is not None and state.slots != sequences:
            raise UserError(f"the state must have a slot for each of the {sequences} sequences, got {state.slots}")

    def _positions_before(self, ids: Tensor, state: ModelState | None, cu_seqlens: Tensor | None) -> Tensor:
        """(sequences,) how many tokens each has had."""
        if state is not None:
            return state.position
        sequences = ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return torch.zeros(sequences, dtype=torch.int64, device=ids.device)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

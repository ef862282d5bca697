"""This library's language model as one of transformers.

Legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selective_ssm.data import load_tokenizer
from selective_ssm.errors import UserError
from selective_ssm.interop.transformers.cache import StateCache
from selective_ssm.interop.transformers.config import ConfigPart
from selective_ssm.interop.transformers.padding import Padding
from selective_ssm.models import LanguageModel

_Base: Any = object  # transformers' model, not known here as it need not be installed


class _Reading(NamedTuple):
    """What is to be read."""

    ids: Tensor  # (B, L)
    padding: Padding | None
    cache: StateCache | None
    packed: Tensor | None  # (S + 1,) boundaries of sequences in one row

    @property
    def is_step(self) -> bool:
        """Whether it is one token a row, after others."""
        has_begun = self.cache is not None and self.cache.state is not None
        return has_begun and self.padding is None and self.ids.shape[1] == 1


class Body:
    """A model up to its head, as trainers ask for it that bring a loss of their own.

    Args:
        read: what it does.
    """

    _tp_plan = _pp_plan = None  # how to cut it over devices, for which transformers look

    def __init__(self, read: Callable[..., Any]) -> None:
        self._read = read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `CausalLMPart.read`."""
        return self._read(*args, **kwargs)


class CausalLMPart(_Base):
    """What stands before transformers' model in a class of both: a `LanguageModel`, asked as transformers ask.

    The parameters have the names they have in a checkpoint, so that its folder is read and written as it is.
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ("Layer",)
    _model: LanguageModel

    def __init__(self, config: ConfigPart) -> None:
        super().__init__(config)
        model = LanguageModel(config.language_model)
        object.__setattr__(self, "_model", model)  # not as a child: names would begin with its own
        self._modules = vars(model)["_modules"]  # one dict, so that what replaces a child replaces it in both
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each part has drawn its parameters when it was built."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; what ends a text is asked of the folder's tokenizer if no one has said it otherwise.

        Raises:
            UserError: weights are missing, or there are others.
        """
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[problem]:
                found = f"{problem.replace('_keys', '')}: {', '.join(map(str, sorted(report[problem])[:3]))}"
                raise UserError(f"the weights in '{pretrained_model_name_or_path}' do not fit their config; {found}")
        settings, folder = model.generation_config, Path(str(pretrained_model_name_or_path))
        tokenizer = load_tokenizer(folder) if settings.eos_token_id is None and folder.is_dir() else None
        if tokenizer is not None:
            settings.eos_token_id = tokenizer.end
            settings.pad_token_id = tokenizer.end if settings.pad_token_id is None else settings.pad_token_id
        return (model, report) if wants_report else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read token ids (B, L).

        Args:
            input_ids: (B, L) integers.
            attention_mask: (B, L) or longer, 0 where there is padding, which may stand anywhere and is left out.
            past_key_values: what was read before; it is updated.
            labels: (B, L), the tokens themselves or -100; the loss is each one's given those before it.
            use_cache: whether a cache is made where none is given; by default if the model does not train.
            logits_to_keep: how many of the last positions' logits are wanted, or which positions'; 0 is all.
            cu_seq_lens_q: (S + 1,) boundaries of sequences packed into one row, as transformers' collators name them.
            return_dict: False for a tuple.
            **kwargs: for the loss; and `position_ids`, which tell the boundaries if nothing else does.

        Returns:
            A `CausalLMOutputWithPast`; logits at padding mean nothing.

        Raises:
            UserError: arguments that do not fit the model or each other.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        reading = self._reading(input_ids, attention_mask, past_key_values, use_cache, cu_seq_lens_q, kwargs)
        if reading.is_step and not torch.is_grad_enabled():
            logits = self._step(reading)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._model.logits(self._hidden(reading)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cast("Any", reading.cache))
        return output.to_tuple() if return_dict is False else output

    def read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read token ids up to the head, for trainers that bring a head of their own.

        Args:
            input_ids: as in `forward`, and so the others.
            attention_mask: as there.
            past_key_values: as there.
            use_cache: as there.
            cu_seq_lens_q: as there.
            **kwargs: `position_ids`; others are of no use here.

        Returns:
            A `BaseModelOutputWithPast` of hidden states (B, L, d_model).
        """
        from transformers.modeling_outputs import BaseModelOutputWithPast

        reading = self._reading(input_ids, attention_mask, past_key_values, use_cache, cu_seq_lens_q, kwargs)
        hidden = self._hidden(reading)
        return BaseModelOutputWithPast(
            last_hidden_state=cast("Any", hidden), past_key_values=cast("Any", reading.cache)
        )

    def _reading(
        self,
        ids: Tensor | None,
        mask: Tensor | None,
        cache: StateCache | None,
        use_cache: bool | None,
        packed: Tensor | None,
        others: dict[str, Any],
    ) -> _Reading:
        ids = _checked(ids, others)
        packed = _boundaries(packed, others.pop("position_ids", None), mask)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache and packed is None:
            cache = StateCache()
        padding = Padding.of(mask, *ids.shape)
        if padding is not None and padding.tokens == ids.numel():
            padding = None
        return _Reading(ids, padding, cache, packed)

    def _hidden(self, reading: _Reading) -> Tensor:
        """What the head reads, (B, L, d_model); the cache is updated."""
        ids, padding, cache, packed = reading
        if padding is not None:
            ids, packed = padding.pack(ids)[:, : padding.tokens], padding.cu_seqlens[:-1]
        state = None if cache is None else cache.state
        hidden, state = self._model.hidden(ids, state, cu_seqlens=packed, return_state=cache is not None)
        if cache is not None:
            cache.state, cache.length = state, cache.length + reading.ids.shape[1]
        return hidden if padding is None else padding.unpack(hidden)

    def _step(self, reading: _Reading) -> Tensor:
        """Logits (B, 1, V) after one token a row; the cache is updated."""
        cache = reading.cache
        assert cache is not None
        assert cache.state is not None
        logits, cache.state = self._model.step(reading.ids[:, 0], cache.state)
        cache.length += 1
        return logits[:, None]

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; once the prompt is read there is no padding to leave out."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if inputs.get("past_key_values") is not None and not kwargs.get("is_first_iteration"):
            inputs["attention_mask"] = None
        return inputs

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the branches run a second time for their backward pass."""
        return self.backbone.recompute != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.backbone.recompute = "full" if enable else "none"

    def get_input_embeddings(self) -> nn.Module:
        return self._model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; a tied one is made for the asker, around the embedding's own weight."""
        if self._model.head is not None:
            return self._model.head
        rows, width = self._model.embedding.weight.shape
        head = nn.Linear(width, rows, bias=False, device="meta")
        head.weight = self._model.embedding.weight
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self._model.head is not None:
            self.head = new_embeddings

    @property
    def base_model(self) -> Body:
        """The model up to its head, called as the model is."""
        return Body(self.read)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self._model.config = self.config.language_model
        return embedding


def _checked(ids: Tensor | None, others: dict[str, Any]) -> Tensor:
    for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
        if (wish := others.pop(name, None)) is not None and wish is not False:
            raise UserError(f"a selective_ssm model knows no {name}: it reads input_ids and answers with logits")
    if ids is None or ids.dim() != 2:
        shape = None if ids is None else tuple(ids.shape)
        raise UserError(f"input_ids must have the shape (B, L), got {shape}")
    return ids


def _boundaries(given: Tensor | None, position_ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Of sequences in one row: as given, or where positions begin anew; None for one sequence a row."""
    if given is not None or position_ids is None or mask is not None or len(position_ids) > 1:
        return given
    starts = (position_ids[0, 1:] == 0).nonzero().flatten() + 1
    return F.pad(torch.cat((starts, starts.new_tensor([position_ids.shape[1]]))), (1, 0)) if len(starts) else None

"""This library's language model as one of transformers: its config, and the model itself.

Legend: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from selective_ssm.config import to_tagged
from selective_ssm.data import load_tokenizer
from selective_ssm.errors import UserError
from selective_ssm.interop.transformers.cache import StateCache
from selective_ssm.interop.transformers.padding import Padding
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.formats import ours

# What they stand before: not known here, as transformers need not be installed.
_Config: Any = object
_Model: Any = object


class ConfigPart(_Config):
    """What stands before transformers' config in a class of both: the content of a checkpoint's config.json.

    Args:
        config: the model's own config, as it is or tagged.
        format: the version of the tagged form.
    """

    model_type = ours.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    use_cache = True
    format = ours.VERSION
    config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        own = kwargs.get("config")
        if isinstance(own, LanguageModelConfig):
            kwargs["config"] = to_tagged(own)
        super().__post_init__(**kwargs)

    @property
    def language_model(self) -> LanguageModelConfig:
        """The config in this library's terms."""
        return ours.read_config({"format": self.format, "config": self.config})

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; another number, as set where embeddings are resized, leaves no rows over."""
        return self.language_model.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.config = to_tagged(replace(self.language_model, vocab_size=value, pad_vocab_multiple=1))

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.language_model.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Number of residual branches."""
        return self.language_model.n_layer

    @property
    def tie_word_embeddings(self) -> bool:
        """False: a tied head of ours is no second parameter that transformers would have to tie."""
        return False


class CausalLMPart(_Model):
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
            use_cache: whether `past_key_values` is returned; by default if the model does not train.
            logits_to_keep: how many of the last positions' logits are wanted, or which positions'; 0 is all.
            cu_seq_lens_q: (S + 1,) boundaries of sequences packed into one row, as transformers' collators name them.
            return_dict: False for a tuple.
            **kwargs: for the loss.

        Returns:
            A `CausalLMOutputWithPast`; logits at padding mean nothing.

        Raises:
            UserError: arguments that do not fit the model or each other.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        ids = self._checked(input_ids, kwargs)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache and cu_seq_lens_q is None:
            cache = StateCache()
        logits = self._logits(ids, attention_mask, cache, cu_seq_lens_q, _positions(logits_to_keep, ids))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cast("Any", cache if use_cache else None)
        )
        return output.to_tuple() if return_dict is False else output

    def _checked(self, ids: Tensor | None, others: dict[str, Any]) -> Tensor:
        for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
            if (wish := others.pop(name, None)) is not None and wish is not False:
                raise UserError(f"{type(self).__name__} knows no {name}: it reads input_ids and answers with logits")
        if ids is None or ids.dim() != 2:
            shape = None if ids is None else tuple(ids.shape)
            raise UserError(f"input_ids must have the shape (B, L), got {shape}")
        return ids

    def _logits(
        self,
        ids: Tensor,
        mask: Tensor | None,
        cache: StateCache | None,
        cu_seqlens: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """Logits (B, n, V) at n positions of L, None being all; the cache is updated."""
        batch, length = ids.shape
        state = None if cache is None else cache.state
        padding = Padding.of(mask, batch, length)
        counted = ids.numel() if padding is None else int(padding.lengths.sum())
        if counted == ids.numel():
            padding = None
        if padding is not None:
            places = padding.slot if positions is None else padding.slot[:, positions]
            ids, cu_seqlens = padding.pack(ids)[:, :counted], padding.cu_seqlens[:-1]
            positions = places.flatten().clamp_max(counted - 1)
        if state is not None and padding is None and length == 1 and not torch.is_grad_enabled():
            logits, state = self._model.step(ids[:, 0], state)
            logits = logits[:, None]
        else:
            options = {"cu_seqlens": cu_seqlens, "return_state": cache is not None, "logits_at": positions}
            logits, state = self._model(ids, state, **options)
        if cache is not None:
            cache.state, cache.length = state, cache.length + length
        return logits if padding is None else logits[0].unflatten(0, (batch, -1))

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

    def get_output_embeddings(self) -> nn.Module | None:
        return self._model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self._model.config = self.config.language_model
        return embedding


def _positions(kept: int | Tensor, ids: Tensor) -> Tensor | None:
    if isinstance(kept, Tensor):
        return kept
    return torch.arange(ids.shape[1], device=ids.device)[-kept:] if kept else None

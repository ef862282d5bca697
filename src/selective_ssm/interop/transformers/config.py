"""The config of a checkpoint as one of transformers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from selective_ssm.config import to_tagged
from selective_ssm.models import LanguageModelConfig
from selective_ssm.models.formats import ours

_Base: Any = object  # transformers' config, not known here as it need not be installed


class ConfigPart(_Base):
    """What stands before transformers' config in a class of both: the content of a checkpoint's config.json.

    Args:
        config: the model's own config, as it is or tagged.
        format: the version of the tagged form.
    """

    model_type = ours.MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    use_cache = True
    tie_word_embeddings = False  # a tied head of ours is no second parameter, which transformers would have to tie
    # Asked for, beside architectures, by trainers that load a folder themselves; there is no code in ours.
    auto_map: ClassVar[dict[str, str]] = {}
    format = ours.VERSION
    config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        own = kwargs.get("config")
        if isinstance(own, LanguageModelConfig):
            kwargs["config"] = to_tagged(own)
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["SelectiveSSMForCausalLM"]

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

"""The classes that inherit from transformers', and their entry in its tables."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from selective_ssm.errors import require
from selective_ssm.interop.transformers.causal_lm import CausalLMPart
from selective_ssm.interop.transformers.config import ConfigPart
from selective_ssm.interop.transformers.tokenizers import TokenizerPart
from selective_ssm.models.formats import ours


class Classes(NamedTuple):
    """Ours, each a subclass of one of transformers'."""

    config: type[Any]
    model: type[Any]
    tokenizer: type[Any]


_NAMES = ("SelectiveSSMConfig", "SelectiveSSMForCausalLM", "SelectiveSSMByteTokenizer")


@cache
def classes() -> Classes:
    """Make the classes.

    Raises:
        MissingPackage: transformers is not installed.
    """
    theirs = require("transformers", "transformers")
    own = {"__module__": __name__}
    config = type(_NAMES[0], (ConfigPart, theirs.PreTrainedConfig), own)
    bases = (CausalLMPart, theirs.PreTrainedModel, theirs.GenerationMixin)
    model = type(_NAMES[1], bases, {"config_class": config, **own})
    return Classes(config, model, type(_NAMES[2], (TokenizerPart, theirs.PreTrainedTokenizer), own))


def register() -> None:
    """Make this library's checkpoints known to transformers in this process, with nothing executed from a checkpoint.

    `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer` then take their folders, and with them `pipeline`,
    `Trainer` and whatever else asks those three. Calling it again changes nothing.

    Raises:
        MissingPackage: transformers is not installed.

    Example:
        >>> from transformers import AutoConfig, AutoModelForCausalLM
        >>> from selective_ssm import LanguageModelConfig
        >>> register()
        >>> config = LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257)
        >>> model = AutoModelForCausalLM.from_config(AutoConfig.for_model("selective_ssm", config=config))
        >>> type(model).__name__
        'SelectiveSSMForCausalLM'
    """
    theirs, mine = require("transformers", "transformers"), classes()
    theirs.AutoConfig.register(ours.MODEL_TYPE, mine.config, exist_ok=True)
    theirs.AutoModelForCausalLM.register(mine.config, mine.model, exist_ok=True)
    theirs.AutoTokenizer.register(mine.config, mine.tokenizer, exist_ok=True)


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle: made when first asked for, as transformers need not be installed."""
    if name in _NAMES:
        return classes()[_NAMES.index(name)]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

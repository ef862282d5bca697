"""This library's operators under models of transformers, one model at a time."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import TypeVar

from torch import nn

from selective_ssm.errors import UserError
from selective_ssm.interop.transformers.mixer import fast_mixers
from selective_ssm.layers.linear import Linear

Model = TypeVar("Model", bound=nn.Module)


def use_fast_ops(model: Model) -> Model:
    """Put this library's scan, convolution, steps and linear maps under a Mamba or FalconMamba of transformers.

    Nothing but this one instance changes: its mixers and linears become instances of subclasses of their classes, with
    the same parameters under the same names. Whatever else is done with it stays as it was: training, `generate`, its
    cache, `save_pretrained`, adapters, `torch.compile` (which comes after). Padding is left out exactly, wherever it
    stands, and several tokens go on from a cache, as they would in one whole sequence; transformers' own path does
    neither. Calling it again changes nothing.

    Args:
        model: a ``MambaForCausalLM``, ``FalconMambaForCausalLM``, their base models, or any module that holds one, such
            as one with adapters.

    Returns:
        The model.

    Raises:
        UserError: there is no mixer of either in it.
        MissingPackage: transformers is not installed.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
        >>> type(use_fast_ops(model).backbone.layers[0].mixer).__name__
        'FastMambaMixer'
    """
    return _swap(model, {nn.Linear: Linear, **fast_mixers()}, "use_fast_ops")


def restore_ops(model: Model) -> Model:
    """Undo `use_fast_ops`.

    Args:
        model: what `use_fast_ops` was given, or a part or copy of it; one that it was not given stays as it is.

    Returns:
        The model, with its own path under it.

    Raises:
        UserError: it is no Mamba or FalconMamba.
    """
    back = {fast: theirs for theirs, fast in fast_mixers().items()}
    return _swap(model, {Linear: nn.Linear, **back}, "restore_ops")


def _swap(model: Model, other: Mapping[type[nn.Module], type[nn.Module]], function: str) -> Model:
    mixers = tuple(fast_mixers())
    if not any(isinstance(module, mixers) for module in model.modules()):
        named = "a MambaForCausalLM or FalconMambaForCausalLM of transformers"
        raise UserError(f"{function} needs {named}, got a {type(model).__name__}, in which there is no mixer of either")
    for module in model.modules():
        if (into := other.get(type(module))) is not None:
            module.__class__ = into
            if "_old_forward" in vars(module):  # a hook of accelerate's holds on to the forward of the class before
                vars(module)["_old_forward"] = MethodType(into.forward, module)
    return model

"""LoRA by the package PEFT: adapters beside the linear layers of a model, and their way into its weights.

Legend: r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from selective_ssm.errors import FileProblem, UserError, choice, require
from selective_ssm.files import in_words, read_json, read_tensors, write_tensors
from selective_ssm.models import LanguageModel

M = TypeVar("M", bound=nn.Module)

TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj")
"""The linear layers of this library's models."""

TRANSFORMERS_TARGETS = ("in_proj", "x_proj")
"""Those of transformers' Mamba and FalconMamba in which an adapter takes part."""

_REFUSED = {
    "dt_proj": "transformers reads its weight past the module, so that an adapter there would get no gradient",
    "out_proj": "PEFT takes none there, since fused kernels read its weight past the module",
    "conv1d": "PEFT takes none there, since fused kernels read its weight past the module",
}
_NAME = "default"  # PEFT's, of adapters that nobody has given another
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MORE_THAN_LORA = (
    *("modules_to_save", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config"),
)
_DRAWN = (True, False, "gaussian", "orthogonal", "eva")  # ways to begin that leave the model's own weights alone
_PREFIX = "base_model.model."  # of names in PEFT's files: there a model stands within two of PEFT's own


def add_lora(model: nn.Module, *, r: int = 8, alpha: float = 16.0, targets: Sequence[str] | None = None) -> None:
    """Freeze a model and put LoRA adapters beside its linear layers, in place; only they are trained then.

    A layer that computed W x computes W x + alpha / r · B A x. A (r, inputs) is drawn by torch's generator, in fp32 at
    least, and B (outputs, r) is zero: the model computes at first what it did before. Everything that takes the model
    takes it still.

    Args:
        model: a `LanguageModel`, or transformers' Mamba or FalconMamba; it must have no adapters yet.
        r: rank of the adapters.
        alpha: how strongly they act.
        targets: names of the linear layers that get them; by default all that can: `TARGETS`, of those the model has,
            or `TRANSFORMERS_TARGETS`.

    Raises:
        MissingPackage: PEFT is not installed.
        UserError: a target is none of the model's, or an adapter there would come to nothing; there are adapters
            already, r is below 1, or alpha not above 0.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685), section 4.1.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257))
        >>> add_lora(model, r=4, targets=["in_proj", "out_proj"])
        >>> sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        1024
    """
    if r < 1:
        raise UserError(f"the rank r of adapters must be 1 or more, got {r}")
    if not 0 < alpha < float("inf"):
        raise UserError(f"alpha of adapters must be above 0 and finite, got {alpha}")
    names = _checked_targets(model, targets)
    peft = require("peft", "peft")
    _inject(model, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=names))


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters alone, as PEFT does: adapter_config.json and adapter_model.safetensors.

    `load_adapters` reads them, and PEFT's ``PeftModel.from_pretrained(model, folder)``.

    Args:
        model: what `add_lora` was given.
        folder: where to write; it is made if absent.

    Raises:
        FileProblem: the folder cannot be written to.
        UserError: the model has no adapters.
    """
    peft = require("peft", "peft")
    if _NAME not in _configs(model):
        raise UserError(f"the model has no adapters to save, or none by the name '{_NAME}'")
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    named = {_PREFIX + name: tensor.contiguous() for name, tensor in weights.items()}
    write_tensors(Path(folder) / _WEIGHTS, named, {"format": "pt"})
    with in_words("write", folder):
        _configs(model)[_NAME].save_pretrained(str(folder))


def load_adapters(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> None:
    """Put the adapters that `save_adapters` or PEFT wrote into a model, in place; its own weights are frozen.

    Args:
        model: the model they were trained beside, without adapters.
        folder: where they lie; nothing in it is executed, and nothing is asked of the hub.
        trainable: whether they are to be trained on.

    Raises:
        MissingPackage: PEFT is not installed.
        FileProblem: a file is missing, truncated or foreign.
        UserError: they are no LoRA adapters, or of another model; it is left as it was, but for being frozen.
    """
    peft, folder = require("peft", "peft"), Path(folder)
    config = _read_config(folder / _CONFIG)
    config.target_modules = _checked_targets(model, config.target_modules)
    config.inference_mode = not trainable
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(folder / _WEIGHTS).items()}
    _inject(model, config)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    if misfit := _misfit(weights, expected):
        _take_out(model, merge=False)
        raise UserError(f"the adapters in '{folder}' are damaged, or of another model: {misfit}")
    peft.set_peft_model_state_dict(model, weights)


def merged(model: M) -> M:
    """A copy of the model in which the active adapters are added to the weights: W + alpha / r · B A, and no more.

    It computes what the model does, to rounding (a model of bf16 weights is better merged in fp32), at the cost of one
    without adapters, and is saved as an ordinary checkpoint. All its parameters can be trained.

    Args:
        model: what `add_lora`, `load_adapters` or PEFT put adapters into; it is left as it is.

    Raises:
        UserError: the model has no adapters.

    Example:
        >>> from selective_ssm.models import LanguageModelConfig
        >>> model = LanguageModel(LanguageModelConfig(d_model=16, n_layer=2, vocab_size=257))
        >>> ids = torch.arange(6)[None]
        >>> before = model(ids).logits
        >>> add_lora(model)
        >>> torch.equal(merged(model)(ids).logits, before)  # nothing was learned yet
        True
    """
    if not _configs(model):
        raise UserError(
            "the model has no adapters to merge; of PEFT's own PeftModel give what is in it, get_base_model()"
        )
    copied = copy.deepcopy(model)
    _take_out(copied, merge=True)
    return copied.requires_grad_(True)


def _checked_targets(model: nn.Module, targets: Sequence[str] | None) -> list[str]:
    """The names of the layers that get adapters.

    Raises:
        UserError: one of them cannot, or the model has adapters.
    """
    if _configs(model):
        raise UserError("the model has adapters already: merge them into its weights, or load the model anew")
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(module, LanguageModel) for module in model.modules()):
        possible = [name for name in TARGETS if name in linear]
    elif getattr(getattr(model, "config", None), "model_type", None) in ("mamba", "falcon_mamba"):
        possible = list(TRANSFORMERS_TARGETS)
        for name in targets or ():
            if reason := _REFUSED.get(name.rpartition(".")[2]):
                raise UserError(f"targets: '{name}' of transformers' Mamba takes no adapter: {reason}")
    else:
        raise UserError(
            f"adapters are put into this library's models and transformers' Mamba here, not into {type(model).__name__}"
        )
    if targets is not None and (isinstance(targets, str) or not targets):
        raise UserError(f"targets must be names of linear layers, out of {', '.join(possible)}; got {targets!r}")
    for name in targets or ():
        choice("targets", name.rpartition(".")[2], possible)
    return list(possible if targets is None else targets)


def _inject(model: nn.Module, config: Any) -> None:
    """Put new adapters into a model, in fp32 beside weights of bf16 or fp16.

    Raises:
        UserError: PEFT refuses the config; there are no adapters then.
    """
    peft, utils = require("peft", "peft"), require("peft.tuners.tuners_utils", "peft")
    try:
        peft.inject_adapter_in_model(config, model, _NAME)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # of whatever a config may hold
        _take_out(model, merge=False)
        raise UserError(f"PEFT puts no such adapters into the model: {error}") from error
    utils.cast_adapter_dtype(model, _NAME)
    _tell_transformers(model, True)


def _take_out(model: nn.Module, *, merge: bool) -> None:
    """Put the layers back that adapters stand in the place of."""
    for name, layer in list(_adapted(model)):
        if merge:
            layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    vars(model).pop("peft_config", None)
    _tell_transformers(model, False)


def _tell_transformers(model: nn.Module, has_adapters: bool) -> None:
    """What transformers' models go by when they are saved: with adapters they write those, else the weights."""
    if hasattr(model, "_hf_peft_config_loaded"):
        vars(model)["_hf_peft_config_loaded"] = has_adapters


def _misfit(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What is wrong with the weights of adapters, or nothing."""
    for name in sorted(weights.keys() | expected.keys()):
        if name not in weights or name not in expected:
            return f"'{name}' is {'missing' if name in expected else 'not part of the model'}"
        if weights[name].shape != expected[name].shape:
            return f"'{name}' has the shape {tuple(weights[name].shape)}, expected {tuple(expected[name].shape)}"
        if not torch.isfinite(weights[name]).all():
            return f"'{name}' holds NaN or infinite values"
    return ""


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers with adapters, and where they stand."""
    kind = require("peft.tuners.tuners_utils", "peft").BaseTunerLayer
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def _configs(model: nn.Module) -> Mapping[str, Any]:
    """PEFT's config of each adapter, by its name."""
    return vars(model).get("peft_config", {})


def _read_config(path: Path) -> Any:
    peft, written = require("peft", "peft"), read_json(path)
    if not isinstance(written, dict) or written.get("peft_type") != "LORA":
        raise FileProblem(f"'{path}' is not the config of LoRA adapters")
    theirs = "PEFT's own PeftModel loads them"
    for name in _MORE_THAN_LORA:
        if written.get(name):
            raise UserError(f"'{path}' tells of more than LoRA adapters ({name}): {theirs}")
    if (drawn := written.get("init_lora_weights", True)) not in _DRAWN:
        raise UserError(f"'{path}' tells of adapters that may change the model's own weights ({drawn!r}): {theirs}")
    try:
        config = peft.LoraConfig.from_pretrained(str(path.parent))
    except (TypeError, ValueError) as error:
        raise FileProblem(f"'{path}' is not a config that PEFT reads: {error}") from error
    config.base_model_name_or_path = None  # where it was elsewhere is of no use here
    return config

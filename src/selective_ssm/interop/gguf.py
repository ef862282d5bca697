"""GGUF files of the architecture ``mamba``, which llama.cpp and what stands on it run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selective_ssm.data import Tokenizer
from selective_ssm.errors import UserError, require
from selective_ssm.files import replacing
from selective_ssm.interop.gguf_vocabulary import Vocabulary, vocabulary
from selective_ssm.models import LanguageModel, LanguageModelConfig
from selective_ssm.models.formats.theirs import OF_TOKENS, as_theirs, config_of, require_expressed
from selective_ssm.models.weights import cast

READER = "llama.cpp"
CONTEXT = 2**20
"""What is told as the length of the training texts: a state has none, and programs refuse texts beyond it."""

# What may be anything, because it is told there, because a tensor says it or because it is of no consequence.
_MODEL_FIELDS = (
    "d_model",
    "n_layer",
    "vocab_size",
    "norm_eps",
    "tie_embeddings",
    "residual_in_fp32",
    "pad_vocab_multiple",
)
_MIXER_FIELDS = ("d_conv", "conv_bias")
_SSM_FIELDS = ("d_state", "dt_rank", "norm_eps", "skip", "dt_min", "dt_max", "dt_init_floor")

# our name -> theirs, and whether it stays in fp32 whatever the file's dtype is
_TOP = {
    "embedding.weight": ("token_embd.weight", False),
    "backbone.norm_f.weight": ("output_norm.weight", True),
    "head.weight": ("output.weight", False),
}
_IN_LAYER = {
    "norm.weight": ("attn_norm.weight", True),
    "mixer.in_proj.weight": ("ssm_in.weight", False),
    "mixer.conv1d.weight": ("ssm_conv1d.weight", True),
    "mixer.conv1d.bias": ("ssm_conv1d.bias", True),
    "mixer.ssm.x_proj.weight": ("ssm_x.weight", False),
    "mixer.ssm.dt_proj.weight": ("ssm_dt.weight", False),
    "mixer.ssm.dt_bias": ("ssm_dt.bias", True),
    "mixer.ssm.A_log": ("ssm_a", True),
    "mixer.ssm.D": ("ssm_d", True),
    "mixer.out_proj.weight": ("ssm_out.weight", False),
}
_ZERO_IF_ABSENT = ("mixer.conv1d.bias", "mixer.ssm.D")
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}


def write_gguf(
    model: LanguageModel,
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype | None = None,
    name: str | None = None,
) -> None:
    """Write a model and its tokenizer as one file for llama.cpp. No more than a tensor is converted at a time.

    Matrices are written in `dtype`; norms, biases, the convolution, A = −exp(A_log) and D in fp32. Rows of the
    embedding that are no tokens are left out; tokens that the tokenizer lacks are called ``[PAD…]``. As `generate`
    does, llama.cpp begins a prompt with the boundary, and ends a text at it.

    Args:
        model: a stack of equal Mamba blocks around S6, with expand = 2 and no biases of projections; B, C and Δ may
            be normalised, with the layers' eps.
        path: the file to write or replace.
        tokenizer: the model's.
        dtype: torch.float32, torch.float16 or torch.bfloat16; None for the embedding's. To quantise is for llama.cpp's
            own ``llama-quantize``.
        name: what the model is called in programs; None for the file's name.

    Raises:
        MissingPackage: the package ``gguf`` is not installed.
        FileProblem: the file cannot be written.
        UserError: llama.cpp cannot run this model or this tokenizer, or the dtype cannot hold a value.

    Source: the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md).
    """
    gguf = require("gguf", extra="gguf")
    config = model.config
    _check(config)
    words = vocabulary(tokenizer, config.vocab_size)
    own = model.embedding.weight.dtype
    dtype = dtype or (torch.float32 if own == torch.float64 else own)
    if dtype not in _TYPES:
        raise UserError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
    tensors = list(_tensors(model, dtype))
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch="mamba")
        try:
            _write_header(writer, config, name or Path(path).stem)
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
            _write_vocabulary(writer, words)
            for tensor in tensors:
                kind = gguf.GGMLQuantizationType[_TYPES[tensor.dtype]]
                nbytes = tensor.shape.numel() * tensor.dtype.itemsize
                writer.add_tensor_info(tensor.name, tensor.shape, _numpy_of(tensor.dtype), nbytes, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(_as_numpy(cast(tensor.name, tensor.read(), tensor.dtype)))
        finally:
            writer.close()


def _check(config: LanguageModelConfig) -> None:
    """Refuse a model that llama.cpp has no architecture for.

    Raises:
        UserError: it has none; the sentence names the fields.
    """
    model, block, ssm = as_theirs(config, READER, pads_vocabulary=False)
    eps = ssm["norm_eps"]
    if eps is not None and eps != config.norm_eps:
        raise UserError(
            f"{READER} has one eps for all norms, but this model normalises its layers with norm_eps = "
            f"{config.norm_eps!r} and B, C and Δ with {eps!r}"
        )
    understood = config_of(
        {key: model[key] for key in _MODEL_FIELDS},
        {key: block[key] for key in _MIXER_FIELDS},
        {key: ssm[key] for key in _SSM_FIELDS},
    )
    require_expressed(model, understood, READER)


class _Tensor(NamedTuple):
    """A tensor of the file, and how to come by it."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]


def _tensors(model: LanguageModel, dtype: torch.dtype) -> Iterator[_Tensor]:
    """Every tensor of the file, in its order."""
    weights = model.state_dict()
    for ours, (theirs, is_single) in _TOP.items():
        if ours in weights:
            rows = weights[ours][: model.config.vocab_size] if ours in OF_TOKENS else weights[ours]
            yield _tensor(theirs, rows, torch.float32 if is_single else dtype)
    for index in range(model.config.n_layer):
        prefix = f"backbone.layers.{index}."
        width = weights[f"{prefix}mixer.ssm.A_log"].shape[0]
        for ours, (theirs, is_single) in _IN_LAYER.items():
            tensor = weights.get(prefix + ours)
            if tensor is None and ours in _ZERO_IF_ABSENT:
                tensor = torch.zeros(width)
            assert tensor is not None
            yield _tensor(f"blk.{index}.{theirs}", tensor, torch.float32 if is_single else dtype)


def _tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> _Tensor:
    def read() -> Tensor:
        return -torch.exp(tensor.float()) if name.endswith("ssm_a") else tensor

    return _Tensor(name, tensor.shape, dtype, read)


def _write_header(writer: Any, config: LanguageModelConfig, name: str) -> None:
    _, block, ssm = as_theirs(config, READER, pads_vocabulary=False)
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(0)  # there is none, but a reader asks for it, as for heads
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(block["d_conv"])
    writer.add_ssm_inner_size(block["expand"] * config.d_model)
    writer.add_ssm_state_size(ssm["d_state"])
    writer.add_ssm_time_step_rank(ssm["dt_rank"])
    writer.add_ssm_dt_b_c_rms(ssm["norm_eps"] is not None)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def _write_vocabulary(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # how texts are cut into words
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.end)
    writer.add_eos_token_id(words.end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _numpy_of(dtype: torch.dtype) -> Any:
    return _as_numpy(torch.empty(0, dtype=dtype)).dtype


def _as_numpy(tensor: Tensor) -> Any:
    """The tensor's memory as numpy's; bf16, which numpy has not, as whole numbers of its size."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()

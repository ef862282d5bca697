"""Whole blocks and whole models on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from selective_ssm.bench import mamba_ssm
from selective_ssm.bench.cases import ModelCase, Setup
from selective_ssm.bench.gpu.attention import TransformerLayer, fastest, limited
from selective_ssm.bench.gpu.cases import LengthCase, PrefillCase
from selective_ssm.bench.gpu.clock import Call
from selective_ssm.bench.gpu.operators import timed
from selective_ssm.bench.memory import forget_peak, peak
from selective_ssm.bench.run import Row, fresh, read, train
from selective_ssm.models import LanguageModelConfig, preset
from selective_ssm.models.backbone import Backbone
from selective_ssm.tasks.language import next_token_loss

_DTYPE = torch.bfloat16


class TwoBlocks(nn.Module):
    """Two Mamba layers, norms and adds included: about as many parameters as a Transformer layer has.

    Args:
        d_model: width of the residual stream, in the dtype of the weights.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        config = LanguageModelConfig(d_model=d_model, n_layer=2, vocab_size=1, residual_in_fp32=False)
        self.first, self.second = Backbone(config).layers

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, L, D) to the same shape."""
        x, branch, _ = self.first(torch.zeros_like(x), x, None, cu_seqlens=None, return_state=False)
        x, branch, _ = self.second(x, branch, None, cu_seqlens=None, return_state=False)
        return x + branch


def blocks(case: LengthCase, setup: Setup) -> Iterator[Row]:
    """Forward and backward of two Mamba layers; with the peer "sdpa", beside one Transformer layer."""
    random = torch.Generator(setup.device).manual_seed(0)
    x = torch.randn(case.batch, case.length, case.d_model, generator=random, device=setup.device).to(_DTYPE)
    row: Row = {"case": case.name, "batch": case.batch}
    yield row | {"who": "two Mamba layers"} | timed(_gradients(TwoBlocks(case.d_model), x), setup)
    if "sdpa" in setup.peers:
        call = _gradients(TransformerLayer(case.d_model, case.head_dim), x)
        best = fastest(call, setup)
        yield row | {"who": f"a Transformer layer ({best})"} | timed(limited(call, best), setup)


def model(case: ModelCase, setup: Setup) -> Iterator[Row]:
    """Tokens a second of training (forward, loss, backward) and of prefill by the wall's time, and memory."""
    config = preset(case.preset)
    ids = torch.randint(config.vocab_size, (case.batch, case.length), device=setup.device)
    ours = fresh(config, setup.device, _DTYPE)
    calls: dict[str, Call] = {"training": partial(train, ours, ids), "prefill": partial(read, ours, ids)}
    for what, call in calls.items():
        yield _tokens(case, what, "ours", call, setup)
    if "mamba_ssm" not in setup.peers:
        return
    del ours, calls
    theirs = mamba_ssm.language_model(config, setup.device, _DTYPE)
    if theirs is None:
        yield {"case": case.name, "what": "training", "who": "mamba_ssm", "note": "not installed"}
        return

    def train_theirs() -> None:
        theirs.zero_grad()
        next_token_loss(theirs(ids).logits, ids).backward()

    yield _tokens(case, "training", "mamba_ssm", train_theirs, setup)
    yield _tokens(case, "prefill", "mamba_ssm", torch.no_grad()(partial(theirs, ids, num_last_tokens=1)), setup)


def prefill(case: PrefillCase, setup: Setup) -> Iterator[Row]:
    """Tokens a second of reading prompts, for the state alone and for the next token's logits too."""
    ours = fresh(preset(case.preset), setup.device, _DTYPE)
    ids = torch.randint(ours.config.vocab_size, (case.batch, case.length), device=setup.device)
    yield _tokens(case, "read", "ours", torch.no_grad()(partial(ours.read, ids)), setup)
    yield _tokens(case, "prefill", "ours", partial(read, ours, ids), setup)


def _gradients(module: nn.Module, x: Tensor) -> Call:
    """Forward and backward, to the input and every parameter."""
    module = module.to(x.device, x.dtype)
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    slope = torch.ones_like(x)
    return lambda: torch.autograd.grad(module(leaves[0]), leaves, slope)


def _tokens(case: ModelCase, what: str, who: str, call: Call, setup: Setup) -> Row:
    forget_peak(setup.device)
    row: Row = {"case": case.name, "what": what, "who": who} | timed(call, setup)
    row["tokens a second"] = case.batch * case.length / (row["wall µs"] / 1e6)
    return row | peak(setup.device)

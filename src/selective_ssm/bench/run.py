"""Running the cases on any device: one function a subject, giving a row of figures for each case, pass and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selective_ssm.bench import cases
from selective_ssm.bench.cases import ModelCase, OpCase, Setup
from selective_ssm.bench.clock import medians
from selective_ssm.bench.loop import scan_loop
from selective_ssm.models import LanguageModel, LanguageModelConfig, ModelState, preset
from selective_ssm.ops import causal_conv1d, selective_scan, selective_scan_step
from selective_ssm.ops.dispatch import Case, explain
from selective_ssm.tasks.language import next_token_loss

Row = dict[str, Any]
Call = Callable[[], object]


def scan(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The scan of each backend that can run, forward and forward+backward, and how many times faster than the loop."""
    inputs = leaves(cases.scan_inputs(case, setup.device))
    for backend in backends("selective_scan", case, setup.device):
        calls = {"ours": partial(selective_scan, **inputs, delta_softplus=True, backend=backend)}
        if case.against_loop:
            calls["loop"] = partial(scan_loop, **inputs)
        for direction, timed in _directions(calls, inputs):
            taken = medians(timed, setup.device, rounds=setup.rounds)
            row = {"case": case.name, "pass": direction, "backend": backend, "ms": taken["ours"] * 1e3}
            if "loop" in taken:
                row |= {"loop ms": taken["loop"] * 1e3, "speed-up": taken["loop"] / taken["ours"]}
            yield row


def conv(case: OpCase, setup: Setup) -> Iterator[Row]:
    """The causal convolution of each backend that can run, forward and forward+backward."""
    inputs = leaves(cases.conv_inputs(case, setup.device))
    for backend in backends("causal_conv1d", case, setup.device):
        calls = {"ours": partial(causal_conv1d, **inputs, activation="silu", backend=backend)}
        for direction, timed in _directions(calls, inputs):
            taken = medians(timed, setup.device, rounds=setup.rounds)
            yield {"case": case.name, "pass": direction, "backend": backend, "ms": taken["ours"] * 1e3}


def step(case: OpCase, setup: Setup) -> Iterator[Row]:
    """One step of the scan with each backend that can run."""
    inputs = cases.scan_inputs(case, setup.device)
    state = torch.zeros(case.batch, case.channels, case.states, device=setup.device)
    for backend in backends("selective_scan_step", case, setup.device):
        call = partial(selective_scan_step, state, **inputs, delta_softplus=True, backend=backend)
        taken = medians({"step": call}, setup.device, rounds=10 * setup.rounds)
        yield {"case": case.name, "backend": backend, "µs": taken["step"] * 1e6}


def model(case: ModelCase, setup: Setup) -> Iterator[Row]:
    """Tokens a second of a freshly initialised model: training (forward+backward), prefill and decoding."""
    language_model = LanguageModel(preset(case.preset)).to(setup.device)
    ids = torch.randint(language_model.config.vocab_size, (case.batch, case.length), device=setup.device)
    for what, call, tokens in (
        ("training", partial(train, language_model, ids), ids.numel()),
        ("prefill", partial(read, language_model, ids), ids.numel()),
        ("decoding", partial(_write, language_model, ids[:, :1], case.new_tokens), case.batch * case.new_tokens),
    ):
        taken = medians({what: call}, setup.device, rounds=setup.rounds)
        yield {"case": case.name, "what": what, "ms": taken[what] * 1e3, "tokens a second": tokens / taken[what]}


Subject = tuple[tuple[Any, ...], Callable[[Any, Setup], Iterator[Row]]]

SUBJECTS: dict[str, Subject] = {
    "scan": (cases.SCAN, scan),
    "conv": (cases.CONV, conv),
    "step": (cases.STEP, step),
    "model": (cases.MODEL, model),
}
"""Each subject's cases, and the function that runs one."""


def backends(op: str, case: OpCase, device: torch.device) -> list[str]:
    """Those that can run a case, fastest first."""
    reasons = explain(Case(op=op, device=device.type, dtype=case.dtype, complex_state=False))
    return [backend for backend, reason in reasons.items() if reason is None]


def leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, as what gradients are asked of."""
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def fresh(config: LanguageModelConfig, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A newly drawn model, made where it is to be."""
    model = LanguageModel.outline(config).to(dtype).to_empty(device=device)
    model.reset_parameters()
    return model


def matrices(model: LanguageModel) -> list[Tensor]:
    """The weights of a model's matrix products, in their order, the head's last."""
    linears = [module.weight for module in model.backbone.modules() if isinstance(module, nn.Linear)]
    return [weight.detach() for weight in (*linears, (model.head or model.embedding).weight)]


def _directions(calls: Mapping[str, Call], inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Call]]]:
    """The calls as they are, and with the gradient of each input after them."""
    yield "forward", {name: torch.no_grad()(call) for name, call in calls.items()}
    wanted = list(inputs.values())
    yield "forward+backward", {name: partial(_with_gradients, call, wanted) for name, call in calls.items()}


def _with_gradients(call: Call, wanted: list[Tensor]) -> object:
    out = call()
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out.sum(), wanted)


def train(language_model: LanguageModel, ids: Tensor) -> None:
    """Take the gradient of the loss."""
    language_model.zero_grad()
    next_token_loss(language_model(ids).logits, ids).backward()


@torch.no_grad()
def read(language_model: LanguageModel, ids: Tensor) -> None:
    """Read a prompt."""
    language_model.prefill(ids)


@torch.no_grad()
def _write(language_model: LanguageModel, ids: Tensor, new_tokens: int) -> None:
    logits, state = language_model.prefill(ids)
    for _ in range(new_tokens):
        assert isinstance(state, ModelState)
        logits, state = language_model.step(logits.argmax(dim=-1), state)

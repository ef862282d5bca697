"""Running the cases: one function a subject, giving a row of figures for each case, pass and backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selective_ssm.bench import cases
from selective_ssm.bench.cases import ModelCase, OpCase
from selective_ssm.bench.clock import medians
from selective_ssm.bench.loop import scan_loop
from selective_ssm.models import LanguageModel, ModelState, preset
from selective_ssm.ops import causal_conv1d, selective_scan, selective_scan_step
from selective_ssm.ops.dispatch import Case, explain
from selective_ssm.tasks.language import next_token_loss

Row = dict[str, Any]
Call = Callable[[], object]


def scan(case: OpCase, device: torch.device, rounds: int) -> Iterator[Row]:
    """The scan of each backend that can run, forward and forward+backward, and how many times faster than the loop."""
    inputs = _leaves(cases.scan_inputs(case, device))
    for backend in _backends("selective_scan", case, device):
        calls = {"ours": partial(selective_scan, **inputs, delta_softplus=True, backend=backend)}
        if case.against_loop:
            calls["loop"] = partial(scan_loop, **inputs)
        for direction, timed in _directions(calls, inputs):
            taken = medians(timed, device, rounds=rounds)
            row = {"case": case.name, "pass": direction, "backend": backend, "ms": taken["ours"] * 1e3}
            if "loop" in taken:
                row |= {"loop ms": taken["loop"] * 1e3, "speed-up": taken["loop"] / taken["ours"]}
            yield row


def conv(case: OpCase, device: torch.device, rounds: int) -> Iterator[Row]:
    """The causal convolution of each backend that can run, forward and forward+backward."""
    inputs = _leaves(cases.conv_inputs(case, device))
    for backend in _backends("causal_conv1d", case, device):
        calls = {"ours": partial(causal_conv1d, **inputs, activation="silu", backend=backend)}
        for direction, timed in _directions(calls, inputs):
            taken = medians(timed, device, rounds=rounds)
            yield {"case": case.name, "pass": direction, "backend": backend, "ms": taken["ours"] * 1e3}


def step(case: OpCase, device: torch.device, rounds: int) -> Iterator[Row]:
    """One step of the scan with each backend that can run."""
    inputs = cases.scan_inputs(case, device)
    state = torch.zeros(case.batch, case.channels, case.states, device=device)
    for backend in _backends("selective_scan_step", case, device):
        call = partial(selective_scan_step, state, **inputs, delta_softplus=True, backend=backend)
        taken = medians({"step": call}, device, rounds=10 * rounds)
        yield {"case": case.name, "backend": backend, "µs": taken["step"] * 1e6}


def model(case: ModelCase, device: torch.device, rounds: int) -> Iterator[Row]:
    """Tokens a second of a freshly initialised model: training (forward+backward), prefill and decoding."""
    language_model = LanguageModel(preset(case.preset)).to(device)
    ids = torch.randint(language_model.config.vocab_size, (case.batch, case.length), device=device)
    for what, call, tokens in (
        ("training", partial(_train, language_model, ids), ids.numel()),
        ("prefill", partial(_read, language_model, ids), ids.numel()),
        ("decoding", partial(_write, language_model, ids[:, :1], case.new_tokens), case.batch * case.new_tokens),
    ):
        taken = medians({what: call}, device, rounds=rounds)
        yield {"case": case.name, "what": what, "ms": taken[what] * 1e3, "tokens a second": tokens / taken[what]}


SUBJECTS: dict[str, tuple[tuple[Any, ...], Callable[[Any, torch.device, int], Iterator[Row]]]] = {
    "scan": (cases.SCAN, scan),
    "conv": (cases.CONV, conv),
    "step": (cases.STEP, step),
    "model": (cases.MODEL, model),
}
"""Each subject's cases, and the function that runs one."""


def _backends(op: str, case: OpCase, device: torch.device) -> list[str]:
    reasons = explain(Case(op=op, device=device.type, dtype=case.dtype, complex_state=False))
    return [backend for backend, reason in reasons.items() if reason is None]


def _leaves(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def _directions(calls: Mapping[str, Call], inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, Mapping[str, Call]]]:
    """The calls as they are, and with the gradient of each input after them."""
    yield "forward", {name: torch.no_grad()(call) for name, call in calls.items()}
    leaves = list(inputs.values())
    yield "forward+backward", {name: partial(_with_gradients, call, leaves) for name, call in calls.items()}


def _with_gradients(call: Call, leaves: list[Tensor]) -> object:
    out = call()
    assert isinstance(out, Tensor)
    return torch.autograd.grad(out.sum(), leaves)


def _train(language_model: LanguageModel, ids: Tensor) -> None:
    language_model.zero_grad()
    next_token_loss(language_model(ids).logits, ids).backward()


@torch.no_grad()
def _read(language_model: LanguageModel, ids: Tensor) -> None:
    language_model.prefill(ids)


@torch.no_grad()
def _write(language_model: LanguageModel, ids: Tensor, new_tokens: int) -> None:
    logits, state = language_model.prefill(ids)
    for _ in range(new_tokens):
        assert isinstance(state, ModelState)
        logits, state = language_model.step(logits.argmax(dim=-1), state)

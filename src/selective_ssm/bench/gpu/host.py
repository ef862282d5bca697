"""What a call costs before the GPU works: the host's part of each, and the first of a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

import torch

from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase, Setup
from selective_ssm.bench.contenders import Contender, passes
from selective_ssm.bench.gpu import peers
from selective_ssm.bench.gpu.cases import CallCase
from selective_ssm.bench.gpu.clock import host_seconds
from selective_ssm.bench.run import Row, leaves
from selective_ssm.ops import add_rms_norm, causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step

_FIRST_CALL = """
import json, sys, time
import torch
from selective_ssm.bench import cases
from selective_ssm.bench.cases import OpCase
from selective_ssm.ops import selective_scan

device = torch.device(sys.argv[1])
case = OpCase(**json.loads(sys.argv[2]), dtype=torch.bfloat16)
inputs = {name: one.requires_grad_() for name, one in cases.scan_inputs(case, device).items()}
slope = torch.ones_like(inputs["u"])

def timed(call):
    start = time.perf_counter()
    result = call()
    slope.sum().item()
    return result, 1e3 * (time.perf_counter() - start)

plain = slope.clone().requires_grad_()  # what torch loads for its first backward pass is not ours
timed(lambda: torch.autograd.grad(plain + plain, plain, slope))
out, forward = timed(lambda: selective_scan(**inputs, delta_softplus=True))
_, backward = timed(lambda: torch.autograd.grad(out, list(inputs.values()), slope))
print(json.dumps({"forward ms": forward, "backward ms": backward}))
"""


def host(case: CallCase, setup: Setup) -> Iterator[Row]:
    """Time until a call with all its arguments returns: tensors so small that the GPU is never waited for."""
    for what, one, names in _calls(case.scan, setup):
        for name, call in passes(one, *names):
            row: Row = {"case": case.name, "what": what, "pass": name, "who": one.who}
            yield row | ({"note": one.note} if call is None else {"host µs": host_seconds(call, setup) * 1e6})


def first_call(case: CallCase, setup: Setup) -> Iterator[Row]:
    """The first scan of a process and its backward pass, with an empty cache of kernels and then with a full one."""
    sizes = {name: getattr(case.scan, name) for name in ("batch", "length", "channels", "states")}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            command = [sys.executable, "-c", _FIRST_CALL, str(setup.device), json.dumps(sizes)]
            environment = os.environ | {"SELECTIVE_SSM_CACHE": folder}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise RuntimeError(f"the process that makes the first call failed:\n{done.stderr}")
            yield {"case": case.name, "cache": cache} | json.loads(done.stdout)


def _calls(case: OpCase, setup: Setup) -> Iterator[tuple[str, Contender, tuple[str, ...]]]:
    """What is called, and in which passes."""
    both, device = ("forward", "forward+backward"), setup.device
    state = torch.zeros(case.batch, case.channels, case.states, device=device)
    inputs = leaves(cases.scan_inputs(case, device) | {"initial_state": state.clone()})
    options = cases.scan_options(case, device) | {"return_final_state": True}
    yield "scan", Contender("ours", partial(selective_scan, **inputs, **options), list(inputs.values())), both
    history = torch.zeros(case.batch, case.channels, 3, device=device, dtype=case.dtype)
    small = OpCase(batch=case.batch, length=case.length, channels=case.channels, states=3, dtype=case.dtype)
    filters = leaves(cases.conv_inputs(small, device) | {"initial_state": history.clone()})
    conv = partial(causal_conv1d, **filters, activation="silu", return_final_state=True)
    yield "conv", Contender("ours", conv, list(filters.values())), both
    tensors = {"x": torch.randn_like(filters["x"]), "residual": torch.randn(filters["x"].shape, device=device)}
    stream = leaves(tensors | {"weight": torch.ones(case.channels, dtype=case.dtype, device=device)})
    yield "norm", Contender("ours", partial(add_rms_norm, **stream, eps=1e-5), list(stream.values())), both
    now = OpCase(batch=case.batch, length=1, channels=case.channels, states=case.states, dtype=case.dtype)
    token = cases.scan_inputs(now, device)
    slots = torch.arange(case.batch, device=device, dtype=torch.int32)
    step = partial(selective_scan_step, state, **token, delta_softplus=True, state_indices=slots)
    yield "scan step", Contender("ours", step, []), ("forward",)
    weight, bias = filters["weight"].detach(), filters["bias"].detach()
    step = partial(causal_conv1d_step, history, token["u"], weight, bias, activation="silu", state_indices=slots)
    yield "conv step", Contender("ours", step, []), ("forward",)
    if "mamba_ssm" in setup.peers:
        del inputs["initial_state"]
        yield "scan", peers.mamba_scan(inputs, case), both
        yield "scan step", peers.mamba_step(state, token), ("forward",)

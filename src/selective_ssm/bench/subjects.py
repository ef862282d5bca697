"""Which subjects there are, and how each is timed where."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selective_ssm.bench import fast_ops, run, writing
from selective_ssm.bench.cpu import cases as cpu_cases
from selective_ssm.bench.cpu import generation as cpu_generation
from selective_ssm.bench.cpu import models as cpu_models
from selective_ssm.bench.cpu import operators as cpu_operators
from selective_ssm.bench.cpu import peers as cpu_peers
from selective_ssm.bench.gpu import (
    cases,
    decoding,
    generation,
    host,
    lengths,
    models,
    neighbours,
    operators,
    peers,
)
from selective_ssm.bench.run import Subject
from selective_ssm.errors import UserError

ON_GPU: Mapping[str, Subject] = {
    "scan": (cases.SCAN, operators.scan),
    "conv": (cases.CONV, operators.conv),
    "norm": (cases.NORM, operators.norm),
    "step": (cases.STEP, operators.step),
    "host": (cases.HOST, host.host),
    "first-call": (cases.FIRST_CALL, host.first_call),
    "blocks": (cases.BLOCKS, models.blocks),
    "neighbours": (cases.NEIGHBOURS, neighbours.neighbours),
    "lengths": (cases.LENGTHS, lengths.lengths),
    "model": (cases.MODEL, models.model),
    "decode": (cases.DECODE, decoding.decode),
    "generate": (cases.GENERATE, generation.generate),
    "transformers": (fast_ops.ON_GPU, fast_ops.fast_ops),
}
"""Each subject's cases on a GPU, and the function that runs one."""

ON_CPU: Mapping[str, Subject] = {
    "scan": (cpu_cases.SCAN, cpu_operators.scan),
    "conv": (cpu_cases.CONV, cpu_operators.conv),
    "step": (cpu_cases.STEP, cpu_operators.step),
    "model": (cpu_cases.MODEL, cpu_models.model),
    "decode": (cpu_cases.DECODE, cpu_generation.decode),
    "generate": (cpu_cases.GENERATE, writing.writing),
    "transformers": (fast_ops.ON_CPU, fast_ops.fast_ops),
}
"""The same on a CPU; `run.SUBJECTS` are those of other devices."""

PEERS: Mapping[str, tuple[str, ...]] = {"cuda": peers.PEERS, "cpu": cpu_peers.PEERS}
"""What can be timed beside ours, by the device's type."""

DRAWN = {"lengths": lengths.draw, "generate": writing.draw}
"""The subjects that have a plot."""


def subject(name: str, device: torch.device) -> Subject:
    """The cases of a subject on a device, and what runs one.

    Raises:
        UserError: the subject is about GPUs, and the device is none.
    """
    if device.type == "cuda":
        return ON_GPU[name]
    here = ON_CPU if device.type == "cpu" else run.SUBJECTS
    if name not in here:
        raise UserError(f"'{name}' is timed on a GPU only, and the device is '{device}': give --device cuda")
    return here[name]

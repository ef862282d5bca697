"""Which subjects there are, and how each is timed where."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from selective_ssm.bench import run
from selective_ssm.bench.gpu import cases, host, lengths, models, operators
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
    "lengths": (cases.LENGTHS, lengths.lengths),
    "model": (cases.MODEL, models.model),
}
"""Each subject's cases on a GPU, and the function that runs one; `run.SUBJECTS` are those of other devices."""

DRAWN = {"lengths": lengths.draw}
"""The subjects that have a plot."""


def subject(name: str, device: torch.device) -> Subject:
    """The cases of a subject on a device, and what runs one.

    Raises:
        UserError: the subject is about GPUs, and the device is none.
    """
    if device.type == "cuda":
        return ON_GPU[name]
    if name not in run.SUBJECTS:
        raise UserError(f"'{name}' is timed on a GPU only, and the device is '{device}': give --device cuda")
    return run.SUBJECTS[name]

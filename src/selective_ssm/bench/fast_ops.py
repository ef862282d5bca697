"""A model of transformers on its own path and on our operators, beside ours, on any device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch

from selective_ssm.bench import huggingface
from selective_ssm.bench.cases import Setup
from selective_ssm.bench.clock import quickest
from selective_ssm.bench.contenders import imported
from selective_ssm.bench.cpu.cases import TaskCase
from selective_ssm.bench.run import Row
from selective_ssm.interop.transformers import use_fast_ops
from selective_ssm.models import preset

_PATIENCE = 20.0  # seconds; what takes longer is timed once

_PREFILL = TaskCase(preset="mamba-130m", task="prefill", batch=1, length=512)
ON_CPU = (_PREFILL, replace(_PREFILL, task="decode", length=16), replace(_PREFILL, task="training", length=128))
ON_GPU = tuple(replace(case, dtype=torch.bfloat16) for case in ON_CPU)


def fast_ops(case: TaskCase, setup: Setup) -> Iterator[Row]:
    """A task of a newly drawn model, before `use_fast_ops` and after, and how many times faster."""
    transformers = imported("transformers")
    if transformers is None:
        yield {"case": case.name, "who": "transformers", "note": "not installed"}
        return
    with setup.device:
        before = huggingface.mamba(transformers, preset(case.preset)).to(case.dtype)
    models = {"transformers": before, "transformers, our ops": use_fast_ops(copy.deepcopy(before))}
    ids = torch.randint(before.config.vocab_size, (case.batch, case.length), device=setup.device)
    calls = {who: huggingface.TASKS[case.task](model, ids) for who, model in models.items()}
    taken = quickest(calls, setup.device, rounds=setup.rounds, patience=_PATIENCE)
    tokens = case.batch if case.task == "decode" else ids.numel()
    for who, seconds in taken.items():
        row: Row = {"case": case.name, "who": who, "ms": seconds * 1e3, "tokens a second": tokens / seconds}
        yield row | {"times as fast": taken["transformers"] / seconds}

"""The most memory in use, counted anew."""

from __future__ import annotations

import sys

import pytest
import torch

from selective_ssm.bench import memory

CPU = torch.device("cpu")
MORE = 64 * 2**20  # bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell what a process held at most")
def test_a_process_s_peak_begins_anew() -> None:
    def held() -> float:
        return memory.peak(CPU)["GiB"] * 2**30

    memory.forget_peak(CPU)
    before = held()
    some = torch.ones(MORE, dtype=torch.uint8)
    assert held() - before >= 0.9 * MORE
    del some
    memory.forget_peak(CPU)
    assert held() - before <= 0.1 * MORE


def test_what_is_not_counted_has_no_column() -> None:
    memory.forget_peak(torch.device("meta"))
    assert memory.peak(torch.device("meta")) == {}

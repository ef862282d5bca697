"""CPU kernels and threads: any number gives the same bits; Python threads and forked children may call."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from selective_ssm.ops import causal_conv1d, native
from tests.ops.guards import Guards

OPS = torch.ops.selective_ssm
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(native.explain() is not None, reason=str(native.explain()))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def everything(seed: int = 0) -> list[np.ndarray]:
    """What the kernels make of a pack that is worth several threads; nothing else here starts any."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*shape, generator=generator, dtype=torch.float32) for shape in ((1, 3000, 96), (96, 4)))
    assert x.numel() >= native.LEAST_FOR_THREADS
    rest = (weight, None, None, torch.tensor([0, 300, 300, 3000]), "silu", False)
    out, final, saved = OPS.causal_conv1d(x, *rest, True, True, "cpu")
    gradients = OPS.causal_conv1d_backward(out, final, saved, x, *rest, "cpu")
    return [tensor.numpy() for tensor in (out, final, *gradients)]


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(some, others, strict=True))


def test_the_number_of_threads_changes_no_bit() -> None:
    torch.set_num_threads(1)
    expected = everything()
    for count in (2, 3, 5, 16):
        torch.set_num_threads(count)
        assert same(everything(), expected)


def test_several_python_threads_at_once() -> None:
    torch.set_num_threads(1)
    expected = [everything(seed=seed) for seed in range(4)]
    torch.set_num_threads(2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(everything, range(4)))
            assert all(same(x, y) for x, y in zip(found, expected, strict=True))


def test_memory_for_kernels_has_their_dtype_whatever_the_default() -> None:
    expected = everything()
    torch.set_default_dtype(torch.bfloat16)
    try:
        guards = Guards()
        with guards.allocating():
            assert same(everything(), expected)
        assert guards.intact()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [1, 2])
def test_subnormals_are_flushed_in_every_task_and_nowhere_else(count: int) -> None:
    torch.set_num_threads(count)
    x, weight = torch.full((1, 4096, 64), 1e-30), torch.full((64, 1), 1e-10)
    assert causal_conv1d(x, weight, backend="cpu").eq(0).all()
    assert (x[0, 0] * weight[:, 0]).ne(0).all(), "on this thread they are not flushed"
    assert torch.full((1 << 20,), 1e-30).mul(1e-10).ne(0).all(), "nor on torch's"


FORKED = """
import os
import sys
import torch
from selective_ssm.ops import native

def results():
    from tests.ops.test_parallel import everything  # which loads the library
    return everything()

torch.set_num_threads(2)
product = torch.randn(500, 500) @ torch.randn(500, 500)
before = results() if sys.argv[1] == "loaded" else None
child = os.fork()
after = results()
if child == 0:
    alone = native.build().endswith("2 threads of its own")
    os._exit(0 if alone and all((x == y).all() for x, y in zip(after, before or after)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.parametrize("library", ["loaded", "not loaded yet"])
def test_a_forked_child_has_threads_of_its_own(library: str) -> None:
    """After its parent has used those of OpenMP, which a child would wait for without end."""
    parent = subprocess.Popen([sys.executable, "-c", FORKED, library], cwd=ROOT, start_new_session=True)
    try:
        assert parent.wait(timeout=60) == 0
    except subprocess.TimeoutExpired:
        os.killpg(parent.pid, signal.SIGKILL)  # the child too
        raise

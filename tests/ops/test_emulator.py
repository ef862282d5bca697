"""The emulator of kernels computes what a GPU would, and tells what a GPU would not forgive."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from selective_ssm import ops
from tests.ops import emulator

pytestmark = pytest.mark.skipif(emulator.explain() is not None, reason=emulator.explain() or "")

NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The body of a kernel follows, so that its first line is line 7.
HEADER = """#include "device.cuh"
struct Parameters { const NUMBER* x; float* y; int n; };
extern "C" __global__ void __launch_bounds__(1024) kernel(const __grid_constant__ Parameters p) {
    const int i = threadIdx.x, lane = i % 32;
    NUMBER* const memory = reinterpret_cast<NUMBER*>(shared_memory());
"""


class Parameters(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("n", ctypes.c_int))


Run = Callable[..., Tensor]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run the body of a kernel that reads x and writes `size` numbers y."""

    def run(
        body: str, x: Tensor | None = None, *, size: int = 1, grid=(1, 1, 1), threads: int = 32, shared: int = 1024,
        order: str | int = "forward",
    ) -> Tensor:  # fmt: skip
        x = torch.zeros(1) if x is None else x
        y = torch.full((size,), torch.nan)
        source = tmp_path / "kernel.cu"
        source.write_text(f"{HEADER}{body}\n}}\n")
        parameters = Parameters(x.data_ptr(), y.data_ptr(), x.numel())
        emulator.run(source, "kernel", {"NUMBER": NUMBERS[x.dtype]}, grid, threads, shared, parameters, order=order)
        return y

    return run


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


# ---- what it computes -----------------------------------------------------------------------------------------------

REDUCTION = """
    float sum = 0.0f;
    for (int j = blockIdx.x * blockDim.x + i; j < p.n; j += gridDim.x * blockDim.x) sum += p.x[j];
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) memory[i / 32] = sum;
    sync_block();
    if (i == 0) {
        for (int w = 1; w < blockDim.x / 32; w++) sum += memory[w];
        p.y[blockIdx.x] = sum;
    }
"""


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_blocks_sum_over_shuffles_and_shared_memory(run: Run, order: str | int) -> None:
    x = whole_numbers(1000)
    y = run(REDUCTION, x, size=3, grid=(3, 1, 1), threads=128, order=order)
    assert y.sum() == x.sum()
    assert y[1] == x[128:256].sum() + x[512:640].sum() + x[896:].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_warp_multiplies_matrices(run: Run, dtype: torch.dtype) -> None:
    a, b = whole_numbers(16, 16, dtype=dtype), whole_numbers(16, 8, dtype=dtype)
    product = """
    const int g = lane / 4, t = lane % 4;
    uint32 a[4], b[2];
    float d[4];
    for (int k = 0; k < 4; k++) {
        const NUMBER* at = p.x + 16 * (g + 8 * (k % 2)) + 2 * t + 8 * (k / 2);
        a[k] = at[0].bits | uint32(at[1].bits) << 16;
        d[k] = 1.0f;
    }
    for (int k = 0; k < 2; k++) {
        const NUMBER* at = p.x + 256 + 8 * (2 * t + 8 * k) + g;
        b[k] = at[0].bits | uint32(at[8].bits) << 16;
    }
    multiply_add<NUMBER>(d, a, b[0], b[1]);
    for (int k = 0; k < 4; k++) p.y[8 * (g + 8 * (k / 2)) + 2 * t + k % 2] = d[k];
    """
    y = run(product, torch.cat([a.flatten(), b.flatten()]), size=128, order="backward")
    assert torch.equal(y.view(16, 8), 1 + a.float() @ b.float())


def test_a_warp_transposes_a_matrix(run: Run) -> None:
    x = whole_numbers(8, 8, dtype=torch.float16)
    body = """
    if (i >= 32) return;
    const fp16* at = p.x + 2 * lane;
    const uint32 m = transpose(at[0].bits | uint32(at[1].bits) << 16);
    p.y[2 * lane] = low_half<fp16>(m);
    p.y[2 * lane + 1] = high_half<fp16>(m);
    """
    assert torch.equal(run(body, x, size=64).view(8, 8), x.float().T)


def test_a_warp_loads_matrices(run: Run) -> None:
    x = whole_numbers(4, 8, 8, dtype=torch.bfloat16)
    body = """
    for (int j = 0; j < 8; j++) memory[8 * lane + j] = p.x[8 * lane + j];
    uint32 m[4];
    load_matrices(m, memory + 8 * lane);
    for (int j = 0; j < 4; j++) {
        p.y[64 * j + 2 * lane] = low_half<bf16>(m[j]);
        p.y[64 * j + 2 * lane + 1] = high_half<bf16>(m[j]);
    }
    """
    assert torch.equal(run(body, x, size=256).view(4, 8, 8), x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_nearest(run: Run, dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(900) * 10.0 ** torch.randint(-9, 6, (900,)), torch.tensor([0.0, -0.0, torch.inf, -1e39])]
    )
    halves = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 65520.0, torch.nan])
    x = torch.cat([x, halves])
    body = "for (int j = i; j < p.n; j += 32) p.y[j] = to_float(from_float<NUMBER_OUT>(p.x[j]));"
    y = run(body.replace("NUMBER_OUT", NUMBERS[dtype]), x, size=len(x))
    assert torch.equal(y.view(torch.int32)[:-1], x.to(dtype).float().view(torch.int32)[:-1])
    assert y[-1].isnan()


@pytest.mark.parametrize("dtype", NUMBERS)
def test_eight_numbers_are_loaded_and_stored(run: Run, dtype: torch.dtype) -> None:
    x = whole_numbers(256, dtype=dtype)
    body = "float v[8]; load8(p.x + 8 * i, v); store8(memory + 8 * i, v);"
    body += "load8(memory + 8 * i, v); store8(p.y + 8 * i, v);"
    assert torch.equal(run(body, x, size=256), x.float())


@pytest.mark.parametrize("order", emulator.ORDERS)
def test_lanes_look_at_each_other_and_add_to_one_place(run: Run, order: str | int) -> None:
    body = """
    uint32* const sum = reinterpret_cast<uint32*>(memory);
    if (i == 0) *sum = 0;
    sync_block();
    const uint32 before = add_shared(sum, i);
    sync_block();
    const uint64 wide = (1ull << 40) + i;
    p.y[i] = before + i <= *sum ? *sum : -1;
    p.y[64 + i] = shuffle(wide, 5) - (1ull << 40);
    p.y[128 + i] = shuffle_up(wide, 3) - (1ull << 40);
    """
    sums, fifth, up = run(body, size=192, threads=64, order=order).view(3, 2, 32)
    assert (sums == 63 * 32).all()
    assert (fifth == torch.tensor([[5.0], [37.0]])).all()
    assert (up == torch.tensor([*range(3), *range(29)]) + torch.tensor([[0.0], [32.0]])).all()


def test_fast_functions_know_no_subnormal_numbers(run: Run) -> None:
    x = torch.tensor([-127.0, -126.0, 2.0**127, 0.5])
    y = run("if (i < 4) p.y[i] = i < 2 ? exp2_fast(p.x[i]) : reciprocal_fast(p.x[i]);", x, size=4)
    assert y.tolist() == [0.0, 2.0**-126, 0.0, 2.0]


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", ["sync_block", "sync_warp"])
def test_a_missing_barrier_shows_in_some_order(run: Run, barrier: str) -> None:
    threads = 64 if barrier == "sync_block" else 32
    body = f"memory[i] = p.x[i]; {barrier}(); p.y[i] = memory[(i + {threads // 2}) % {threads}];"
    x = whole_numbers(threads)
    y = [run(body, x, size=threads, threads=threads, order=order) for order in emulator.ORDERS]
    assert all(torch.equal(each, x.roll(threads // 2)) for each in y)
    body = body.replace(f"{barrier}();", "")
    y = [run(body, x, size=threads, threads=threads, order=order) for order in emulator.ORDERS]
    assert not any(torch.equal(each, x.roll(threads // 2)) for each in y)


def test_a_barrier_too_few_before_memory_is_written_again(run: Run) -> None:
    body = """
    for (int round = 0; round < 4; round++) {
        memory[i] = round * 64 + i;
        sync_block();
        p.y[round * 64 + i] = memory[63 - i];
        sync_block();
    }
    """
    expected = torch.arange(256.0).view(4, 64).flip(1).flatten()
    for order in emulator.ORDERS:
        assert torch.equal(run(body, size=256, threads=64, order=order), expected)
    body = body[: body.rindex("sync_block();")] + "}"
    y = [run(body, size=256, threads=64, order=order) for order in emulator.ORDERS]
    assert any(not torch.equal(each, expected) for each in y)


def test_blocks_run_in_the_order_asked_for(run: Run) -> None:
    body = "if (i == 0) p.y[blockIdx.x] = blockIdx.x && p.y[blockIdx.x - 1] == 1.0f ? 2.0f : 1.0f;"
    assert run(body, size=3, grid=(3, 1, 1)).tolist() == [1.0, 2.0, 1.0]
    assert run(body, size=3, grid=(3, 1, 1), order="backward").tolist() == [1.0, 1.0, 1.0]


# ---- asynchronous copies --------------------------------------------------------------------------------------------

COPY = """
    for (int group = 0; group < 3; group++) {
        copy_async(memory + 128 * group + 4 * i, p.x + 128 * group + 4 * i);
        commit_copies();
    }
    wait_copies<PENDING>();
    sync_block();
    for (int j = i; j < 384; j += 32) p.y[j] = memory[j];
"""


@pytest.mark.parametrize("pending", [0, 1, 2, 3])
def test_copies_arrive_when_they_are_waited_for(run: Run, pending: int) -> None:
    x = whole_numbers(384)
    y = run(COPY.replace("PENDING", str(pending)), x, size=384, shared=4 * 384)
    arrived = 128 * (3 - pending)
    assert torch.equal(y[:arrived], x[:arrived])
    assert y[arrived:].isnan().all()


def test_zeros_are_copied_where_nothing_is_wanted(run: Run) -> None:
    x = 1 + torch.arange(8.0)
    body = """
    for (int v = 0; v < 2; v++) copy_async_if(v == 1, memory + 4 * v, p.x + 4 * v);
    commit_copies();
    wait_copies<0>();
    for (int j = 0; j < 8; j++) p.y[j] = memory[j];
    """
    assert run(body, x, size=8, threads=1).tolist() == [0, 0, 0, 0, 5, 6, 7, 8]


def test_uncommitted_copies_are_not_waited_for(run: Run) -> None:
    assert run("copy_async(memory, p.x); wait_copies<0>(); *p.y = *memory;", whole_numbers(4), threads=1).isnan()


def test_memory_is_not_to_be_written_before_a_copy_to_it_arrives(run: Run) -> None:
    body = "copy_async(memory, p.x); commit_copies();\nmemory[0] = 1.0f;\nwait_copies<0>();"
    with pytest.raises(RuntimeError, match="copy_async at line 6 was to fill was written before wait_copies at line 8"):
        run(body, whole_numbers(4), threads=1)


# ---- what a GPU would not forgive -----------------------------------------------------------------------------------


MISTAKES = {
    "memory[256] = 1.0f;": r"block \(0, 0, 0\) wrote outside its shared memory, 0 bytes behind it",
    "memory[i - 1] = 1.0f;": "wrote outside its shared memory, 1 bytes before it",
    "if (blockIdx.x == 1) memory[300] = 0.0f;": r"block \(1, 0, 0\) wrote outside its shared memory, 176 bytes",
    "p.y[0] = memory[-2000000000];": "memory at .* cannot be read or written",
    "float v[8]; load8(p.x + 1, v);": "thread 0: load8 at line 7 is given .*, which is not aligned to a vector",
    "*reinterpret_cast<Vector*>(memory + i) = Vector{};": "thread 1: .*:7 uses .* not aligned to 16 bytes",
    "copy_async(memory + 1, p.x);": "copy_async at line 7 is given .* not aligned to a vector",
    "copy_async(memory + 256, p.x);": "copy_async at line 7 is given 16 bytes at .* not in shared memory",
    "uint32 m[4]; load_matrices(m, p.x);": "load_matrices at line 7 is given 16 bytes at .* not in shared memory",
    "float v[8]; v[7 + i] = p.n; p.y[0] = v[i];": "thread 1: .*:7 uses entry 8 of a shorter array",
    "p.y[0] = int(gridDim.x) * 2000000000;": ":7 has a result that its whole number cannot hold",
    "if (lane < 16) sync_warp();": "lanes 0-15 wait in sync_warp at line 7, but lanes 16-31 have returned",
    "if (lane % 8 == 3) sync_block();\nshuffle_xor(0.0f, 1);": (
        "lanes 0-2, 4-10, 12-18, 20-26, 28-31 wait in shuffle_xor at line 8, "
        "but lanes 3, 11, 19, 27 wait in sync_block at line 7"
    ),
    "if (lane < 16) shuffle_xor(0.0f, 1);\nelse shuffle_xor(0.0f, 1);": (
        "thread 16: its warp has diverged: it calls shuffle_xor at line 8, but lanes 0-15 wait in shuffle_xor at line 7"
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(run: Run, mistake: str) -> None:
    cases = [f"case {n}: {{\n#line 7\n{each}\n}} break;" for n, each in enumerate(MISTAKES, 1)]
    body = f"switch (p.n) {{ {''.join(cases)} }} if (i == 0) p.y[0] = 2.0f;"
    with pytest.raises(RuntimeError, match=MISTAKES[mistake]):
        run(body, torch.zeros(list(MISTAKES).index(mistake) + 1), grid=(2, 1, 1))
    assert run(body, torch.zeros(len(MISTAKES) + 1)) == 2.0  # and does no harm to later ones


def test_threads_that_return_do_not_hold_up_a_block(run: Run) -> None:
    body = "if (i % 3 == 0) return; memory[i] = i; sync_block(); if (i == 1) p.y[0] = memory[98];"
    for order in emulator.ORDERS:
        assert run(body, threads=99, order=order) == 98.0


def test_a_fenced_tensor_keeps_its_values_and_its_border(run: Run) -> None:
    x = whole_numbers(3, 5, 7).transpose(0, 1)[1:]
    fenced = emulator.fenced(x)
    assert torch.equal(fenced, x)
    assert fenced.stride() == x.stride()
    x = emulator.fenced(whole_numbers(4096))
    assert run("if (i == 0) p.y[0] = p.x[p.n - 1];", x) == x[-1]
    with pytest.raises(RuntimeError, match="thread 7: memory at .* cannot be read or written"):
        run("if (i == 7) p.y[0] = p.x[p.n];", x)


def test_what_cannot_be_launched_is_told(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"kernel.cu:6:5: error: .unknown. was not declared"):
        run("    unknown(1);")
    with pytest.raises(RuntimeError, match="232448 bytes of shared memory, but 232449 are asked for"):
        run("", shared=232449)
    with pytest.raises(RuntimeError, match="blocks of 1025 threads cannot be launched"):
        run("", threads=1025)
    run("")
    with pytest.raises(RuntimeError, match="takes 24 bytes of parameters, but 16 are given"):
        emulator.run(tmp_path / "kernel.cu", "kernel", {"NUMBER": "float"}, (1, 1, 1), 1, 0, (ctypes.c_void_p * 2)())


def test_a_header_beside_the_source_is_found(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more.cuh").write_text('#include "device.cuh"\n__device__ float twice(float x) { return 2 * x; }\n')
    (tmp_path / "use.cu").write_text('#include "more.cuh"\n#include "more.cuh"\n' + HEADER + "p.y[0] = twice(4); }")
    y = torch.zeros(1)
    emulator.run(tmp_path / "use.cu", "kernel", {"NUMBER": "float"}, (1, 1, 1), 1, 0, Parameters(0, y.data_ptr(), 1))
    assert y == 8.0


def test_it_has_every_function_of_the_real_header() -> None:
    def functions(header: Path) -> set[str]:
        return set(re.findall(r"__device__ __forceinline__ .*?(\w+)(?:<\w+>)?\(", header.read_text()))

    ours = Path(emulator.__file__).parent / "device.cuh"
    assert functions(Path(ops.__file__).parent / "device.cuh") <= functions(ours)

"""The CUDA sources compiled by NVRTC, where it is installed; no GPU is needed."""

from __future__ import annotations

import functools
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from selective_ssm.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    linear,
    nvrtc,
    sample,
    selective_scan,
    selective_scan_step,
    wkv,
)
from selective_ssm.ops.add_rms_norm import cuda as add_rms_norm_cuda
from selective_ssm.ops.causal_conv1d import cuda as causal_conv1d_cuda
from selective_ssm.ops.linear import cuda as linear_cuda
from selective_ssm.ops.sample import cuda as sample_cuda
from selective_ssm.ops.selective_scan import cuda as selective_scan_cuda
from selective_ssm.ops.selective_scan import step_cuda as selective_scan_step_cuda
from selective_ssm.ops.wkv import cuda as wkv_cuda
from selective_ssm.ops.wkv import no_average
from tests.ops.cases import ScanCase
from tests.ops.kernel_doubles import ADD, DEFINES, fresh, source
from tests.ops.wanted import Wanted, wanted_by

__all__ = ["fresh", "source"]

needs_nvrtc = pytest.mark.skipif(nvrtc._absent() is not None, reason=str(nvrtc._absent()))

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
FEW_ARCHS = ("sm_80", "sm_90")

OPS = Path(nvrtc.__file__).parent
BACKENDS = (
    add_rms_norm_cuda,
    causal_conv1d_cuda,
    linear_cuda,
    sample_cuda,
    selective_scan_cuda,
    selective_scan_step_cuda,
    wkv_cuda,
)

SOURCES = sorted(str(path.relative_to(OPS)) for path in OPS.rglob("*.cu"))


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHS)
def test_the_header_compiles_for_every_architecture(source: Path, arch: str) -> None:
    cubin = nvrtc.compile(source, dict(DEFINES), arch)
    assert cubin.startswith(b"\x7fELF")
    assert b"add" in cubin


@functools.cache
def launches() -> list[Wanted]:
    """Of every operator in bfloat16, forward, backward and for a token."""
    tensors, options = ScanCase(channels=64, state=16, groups=1, dtype=torch.bfloat16).arguments()
    x, now, one = tensors["u"], {name: tensors[name][:, 0] for name in ("u", "delta", "B", "C", "z")}, torch.ones(64)
    weight, states = torch.ones(64, 4), {16: torch.zeros(2, 64, 16), 3: torch.zeros(2, 64, 3)}

    def call() -> None:
        selective_scan(**tensors, **options, backend="cuda").backward(x)
        causal_conv1d(x, weight, one, activation="silu", backend="cuda").backward(x)
        add_rms_norm(x, x.float(), one, 1e-5, backend="cuda")[0].sum().backward()
        wkv(x, x, one, one, no_average(len(x), 64, x.device, x.dtype), backend="cuda")[0].sum().backward()
        selective_scan_step(states[16], A=tensors["A"], **now, delta_softplus=True, backend="cuda")
        causal_conv1d_step(states[3], x[:, 0], weight, one, activation="silu", backend="cuda")
        for rows in (torch.ones(1, 64), torch.ones(1, 64).half(), torch.ones(16, 64).bfloat16()):
            linear(rows, rows[:1])
        linear(torch.ones(17, 64).half(), torch.ones(300, 64).half())
        settings = torch.ones(2, 2), torch.ones(2, 4).long(), torch.ones(2).long()
        for logits in (torch.ones(2, 64), torch.ones(2, 63).half()):
            sample(logits, *settings, draws=False, backend="cuda")
            sample(logits, *settings, logits > 0, draws=True, ranked=1, logprobs=True, backend="cuda")

    return wanted_by(call, *BACKENDS)


def configurations() -> dict[str, set[nvrtc.Defines]]:
    """What each source is compiled for."""
    found: dict[str, set[nvrtc.Defines]] = {}
    for one in launches():
        found.setdefault(str(one.source.relative_to(OPS)), set()).add(one.defines)
    return found


def test_kernels_that_are_said_to_wait_do() -> None:
    """And what they let begin waits in its turn: they say so before they wait themselves."""
    for one in launches():
        found = re.search(rf"__global__[^;{{]* {one.name}\(.*?\n}}\n", one.source.read_text(), re.DOTALL)
        assert found
        assert ("let_next_begin();\n    wait_for_previous();\n" in found[0]) == one.waits, one.name
    waiting = {"forward", "linear", "linear_many", "causal_conv1d_step", "selective_scan_step", "sample"}
    assert {one.name for one in launches() if one.waits} == waiting, "all that a token takes"


@needs_nvrtc
@pytest.mark.parametrize("archs", [FEW_ARCHS, pytest.param(ARCHS, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("path", SOURCES)
def test_every_source_compiles_for_every_architecture(path: str, archs: tuple[str, ...]) -> None:
    several = sorted(map(dict, configurations()[path]), key=str)
    first, *others = [(several[0], arch) for arch in archs] + [(defines, archs[0]) for defines in several[1:]]
    cubins = [nvrtc.compile(OPS / path, *first)]  # alone, since `cuda.core` cannot be imported by two threads at once
    with ThreadPoolExecutor(len(ARCHS)) as threads:
        cubins += threads.map(lambda job: nvrtc.compile(OPS / path, *job), others)
    assert all(cubin.startswith(b"\x7fELF") for cubin in cubins)


@needs_nvrtc
def test_an_error_names_the_line(source: Path) -> None:
    source.write_text(ADD.replace("p.summand", "p.addend"))
    with pytest.raises(RuntimeError) as caught:
        nvrtc.compile(source, dict(DEFINES), "sm_90")
    line = next(number for number, line in enumerate(ADD.splitlines(), start=1) if "p.summand" in line)
    assert re.match(
        rf"'.*add\.cu' does not compile for sm_90 with NVRTC \d+\.\d+: op/add\.cu\({line}\)", str(caught.value)
    )
    assert 'has no member "addend"' in str(caught.value)
    assert "\0" not in str(caught.value)


@needs_nvrtc
def test_an_unknown_architecture_is_told(source: Path) -> None:
    with pytest.raises(RuntimeError, match="does not compile for sm_42 with NVRTC .*invalid value for --gpu-arch"):
        nvrtc.compile(source, dict(DEFINES), "sm_42")


@needs_nvrtc
def test_a_header_beside_the_source_is_found_and_comes_once(source: Path) -> None:
    (source.parent / "shared.cuh").write_text('#include "device.cuh"\n__device__ int seven() { return 7; }\n')
    source.write_text('#include "shared.cuh"\n' + ADD.replace("p.summand", "seven()"))
    assert nvrtc.compile(source, dict(DEFINES), "sm_90")
    source.write_text('#include "shared.cuh"\n\nwrong\n')
    with pytest.raises(RuntimeError, match=re.escape("op/add.cu(3): error")):
        nvrtc.compile(source, dict(DEFINES), "sm_90")

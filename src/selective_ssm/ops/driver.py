"""The CUDA driver, as far as launching needs it: in torch's contexts, with its errors in words."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Generator
from types import ModuleType
from typing import Any

import torch

from selective_ssm.errors import require


@functools.cache
def bindings() -> ModuleType:
    """NVIDIA's Python face of the driver; imported when first asked for."""
    return require("cuda.bindings.driver", extra="cuda")


def checked(result: tuple[Any, ...], trouble: str) -> Any:
    """What a function of the driver returned, or a sentence that ends in the driver's words."""
    status, *values = result
    if status:
        cuda = bindings()
        (_, name), (_, words) = cuda.cuGetErrorName(status), cuda.cuGetErrorString(status)
        raise RuntimeError(f"{trouble}: {words.decode()} ({name.decode()})")
    return values[0] if values else None


def current_stream(device: int) -> int:
    """The handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device)  # pyright: ignore[reportPrivateUsage]


def most_shared(device: int) -> int:
    """The bytes of shared memory that a block can have on a device."""
    cuda, trouble = bindings(), f"cuda:{device} cannot be used"
    attribute = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return checked(cuda.cuDeviceGetAttribute(attribute, checked(cuda.cuDeviceGet(device), trouble)), trouble)


@functools.cache
def _primary_context(device: int) -> Any:
    """The context of a device that torch works in."""
    torch.cuda.init()
    cuda, trouble = bindings(), f"cuda:{device} cannot be used"
    handle = checked(cuda.cuDeviceGet(device), trouble)
    return checked(cuda.cuDevicePrimaryCtxRetain(handle), trouble)


@contextlib.contextmanager
def context(device: int) -> Generator[None]:
    """Make torch's context of a device the thread's current one, for as long as the block runs."""
    cuda = bindings()
    checked(cuda.cuCtxPushCurrent(_primary_context(device)), f"cuda:{device} cannot be used")
    try:
        yield
    finally:
        cuda.cuCtxPopCurrent()


def bind_thread(device: int) -> bool:
    """Give a thread that has no context that of torch's current device, for good, as torch's first call in it would.

    The threads in which autograd goes backward begin without one, and would be refused each launch once.

    Returns:
        Whether the thread has now been given that of `device`.
    """
    cuda, trouble = bindings(), f"cuda:{device} cannot be used"
    if int(checked(cuda.cuCtxGetCurrent(), trouble)) != 0 or device != torch.cuda.current_device():
        return False
    checked(cuda.cuCtxSetCurrent(_primary_context(device)), trouble)
    return True


@contextlib.contextmanager
def while_capturing() -> Generator[None]:
    """Let this thread load modules while a stream is captured: that adds no work to any stream."""
    cuda = bindings()
    relaxed = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    before = checked(cuda.cuThreadExchangeStreamCaptureMode(relaxed), "the stream capture mode cannot be changed")
    try:
        yield
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(before)


class _Overlapping(threading.local):
    is_on = False


_overlapping = _Overlapping()


@contextlib.contextmanager
def overlapping() -> Generator[None]:
    """Let kernels that this thread launches begin before the one before them in their stream has ended.

    A kernel then has parameters, and the state that it moves on, on their way while the one before it still computes,
    and waits for that one before it does anything else. So in the block nothing may write to the weights of linear maps
    or to `state_indices`, no state may be written to before its step, or be stepped twice, and no earlier write to any
    of them be under way: a graph captured in the block begins when all before it has ended. Has an effect on kernels
    made to wait (`nvrtc.kernel`), from compute capability 9.0 on; results are the same.
    """
    before, _overlapping.is_on = _overlapping.is_on, True
    try:
        yield
    finally:
        _overlapping.is_on = before


def is_overlapping() -> bool:
    """Whether this thread's launches may begin early."""
    return _overlapping.is_on


def early_launch(grid: tuple[int, int, int], threads: int, shared: int, stream: int) -> Any:
    """What `cuLaunchKernelEx` takes for a kernel that may begin before the one before it in its stream has ended."""
    cuda = bindings()
    attribute, value = cuda.CUlaunchAttribute(), cuda.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value = value
    config = cuda.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    config.attrs, config.numAttrs = [attribute], 1
    return config

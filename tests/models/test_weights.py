"""Weights are written in shards, in any dtype, with no more than a shard of them copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selective_ssm.errors import UserError
from selective_ssm.models import weights


def test_shards_are_measured_as_they_are_written(tmp_path: Path) -> None:
    tensors = {f"x{n}": torch.randn(100) for n in range(6)}
    weights.write(tmp_path, tensors, shard_bytes=400, dtype=torch.bfloat16)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [len(load_file(shard)) for shard in shards] == [2, 2, 2]
    back = weights.read(tmp_path, "cpu")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert all(torch.equal(back[name], tensor.bfloat16()) for name, tensor in tensors.items())


def test_a_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'large' holds values beyond what float16 can hold"):
        weights.write(tmp_path, {"large": torch.tensor([1e5])}, dtype=torch.float16)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(5, 77).to(dtype)
    assert weights.is_finite(tensor)
    tensor[3, 40] = value
    assert not weights.is_finite(tensor)
    assert weights.is_finite(tensor[:3])
    assert weights.is_finite(tensor[:0])


COPY = """
import sys, threading, time
from pathlib import Path
import torch
from selective_ssm.models import weights

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

folder = Path(sys.argv[1])
weights.write(folder / "first", {"x": torch.ones(10)}, dtype=torch.bfloat16)  # loads what is needed
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
weights.write(folder / "one", weights.read(folder / "safe", "cpu"), shard_bytes=4_000_000, dtype=torch.bfloat16)
weights.write(folder / "other", weights.read(folder / "pickled", "cpu"), shard_bytes=4_000_000, dtype=torch.bfloat16)
done.set()
watcher.join()
print(1024 * (peak - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is looked at as Linux tells it")
def test_no_more_than_a_few_shards_are_in_memory(tmp_path: Path) -> None:
    tensors = {f"x{n}": torch.randn(1_000_000) for n in range(32)}
    weights.write(tmp_path / "safe", tensors)
    weights.write_as_pickle(tmp_path / "pickled", tensors)
    told = subprocess.run([sys.executable, "-c", COPY, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 16
    assert int(told.stdout) < 32_000_000, "shards of 4 MB, in use or just freed; the source has 128 MB, the target 64"

"""What every test shares: threads, seeds, real data."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")

# Small tensors run faster on one thread, and results do not depend on the machine's number of cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """The folder of real data sets that SELECTIVE_SSM_DATA names."""
    folder = os.environ.get("SELECTIVE_SSM_DATA")
    if not folder:
        pytest.skip("SELECTIVE_SSM_DATA is not set: it names the folder with real data sets")
    return Path(folder).resolve()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB: some small files, or two checkpoints of a tiny run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a loaded file stays mapped for a while

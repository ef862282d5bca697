"""What every test shares: threads, seeds, real data."""

from __future__ import annotations

import os
import random
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

"""Which versions a figure was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("selective-ssm", "torch", "numpy", "safetensors", "tokenizers", "lightning", "jsonargparse", "cuda-core")
PEERS = ("mamba-ssm", "causal-conv1d", "triton", "transformers", "mambapy", "fla-core")


def version(package: str) -> str | None:
    """The installed version of a package, None without one; our own in a source tree is told as such."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (source tree)" if package == "selective-ssm" else None


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that results depend on; of what ours is timed beside, if there."""
    peers = {package: version(package) for package in PEERS}
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        **{package: found for package, found in peers.items() if found},
    }


def commit() -> str | None:
    """The commit of the source: ``SELECTIVE_SSM_COMMIT`` if set, else git's answer where git keeps this very file."""
    named = os.environ.get("SELECTIVE_SSM_COMMIT")
    if named or not _git("ls-files", Path(__file__).name):
        return named or None
    return _git("describe", "--always", "--dirty", "--abbrev=12")


def _git(*words: str) -> str | None:
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None

"""Writing with a language model: load a checkpoint, go on from prompts, one at a time or many at once."""

from selective_ssm.generation.bookmarks import Bookmark, load_state, save_state
from selective_ssm.generation.engine import Engine, QueueFull
from selective_ssm.generation.loading import load
from selective_ssm.generation.request import Completion, Request
from selective_ssm.generation.sampling import Sampling
from selective_ssm.generation.stats import Stats
from selective_ssm.generation.stream import generate, stream

__all__ = [
    "Bookmark",
    "Completion",
    "Engine",
    "QueueFull",
    "Request",
    "Sampling",
    "Stats",
    "generate",
    "load",
    "load_state",
    "save_state",
    "stream",
]

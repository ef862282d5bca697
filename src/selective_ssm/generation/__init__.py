"""Writing with a language model: load a checkpoint, go on from a prompt."""

from selective_ssm.generation.loading import load
from selective_ssm.generation.sampling import Sampler
from selective_ssm.generation.stream import generate

__all__ = ["Sampler", "generate", "load"]

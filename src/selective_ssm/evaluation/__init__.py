"""Measuring a language model."""

from selective_ssm.evaluation.perplexity import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]

"""Measuring a language model."""

from selective_ssm.evaluation.continuations import Scores, score_continuations
from selective_ssm.evaluation.harness import harness_model
from selective_ssm.evaluation.perplexity import Evaluation, evaluate
from selective_ssm.evaluation.zero_shot import TaskResult, evaluate_tasks

__all__ = [
    "Evaluation",
    "Scores",
    "TaskResult",
    "evaluate",
    "evaluate_tasks",
    "harness_model",
    "score_continuations",
]

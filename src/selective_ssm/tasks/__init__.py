"""What is learned: rows to learn from, losses and metrics, on tensors, without any model class."""

from selective_ssm.tasks.language import bits_per_byte, next_token_loss
from selective_ssm.tasks.recall import Recall, Share, recall
from selective_ssm.tasks.synthetic import (
    TASKS,
    Copying,
    InductionHeads,
    MultiQueryRecall,
    SelectiveCopying,
    SyntheticTask,
    generator_of,
)

__all__ = [
    "TASKS",
    "Copying",
    "InductionHeads",
    "MultiQueryRecall",
    "Recall",
    "SelectiveCopying",
    "Share",
    "SyntheticTask",
    "bits_per_byte",
    "generator_of",
    "next_token_loss",
    "recall",
]

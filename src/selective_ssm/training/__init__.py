"""Training: a run is a config and a folder; it can be interrupted at any moment and goes on where it was."""

from selective_ssm.training.config import TrainConfig, TrainerConfig
from selective_ssm.training.optimizer import OptimizerConfig
from selective_ssm.training.run import TrainSummary, train
from selective_ssm.training.schedule import ScheduleConfig

__all__ = ["OptimizerConfig", "ScheduleConfig", "TrainConfig", "TrainSummary", "TrainerConfig", "train"]

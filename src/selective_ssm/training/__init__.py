"""Training: a run is a config and a folder; it can be interrupted at any moment and goes on where it was.

`selective_ssm.training.run.train` does it. It is not imported here, since it loads Lightning: seconds that reading a
config, or being told of a mistake in it, should not wait for.
"""

from selective_ssm.training.config import TrainConfig, TrainerConfig
from selective_ssm.training.lora import LoraConfig
from selective_ssm.training.optimizer import OptimizerConfig
from selective_ssm.training.schedule import ScheduleConfig

__all__ = ["LoraConfig", "OptimizerConfig", "ScheduleConfig", "TrainConfig", "TrainerConfig"]

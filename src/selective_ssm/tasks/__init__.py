"""What is learned: losses and metrics, on tensors, without any model class."""

from selective_ssm.tasks.language import bits_per_byte, next_token_loss

__all__ = ["bits_per_byte", "next_token_loss"]

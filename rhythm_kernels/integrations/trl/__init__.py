"""TRL's GRPO with rhythm credit, and any trainer that extends it."""

from .config import RhythmFields, RhythmGRPOConfig
from .trainer import RhythmGRPOTrainer, RhythmMixin

__all__ = ["RhythmFields", "RhythmGRPOConfig", "RhythmGRPOTrainer", "RhythmMixin"]

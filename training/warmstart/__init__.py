"""The tiny model's start: a tokenizer, a small Qwen3, and supervised training on search traces.

`python -m training.warmstart` makes the checkpoint that ships in `training/checkpoints/countdown_tiny`.
"""

from .model import build_model, build_tokenizer

__all__ = ["build_model", "build_tokenizer"]

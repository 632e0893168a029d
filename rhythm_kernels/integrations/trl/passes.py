"""The log-prob passes of a trainer, as they are made, measured or calibrated on, and the gamma that follows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .inputs import log_prob_arguments

__all__ = ["LogProbPasses"]


class LogProbPasses:
    """The passes of one trainer.

    Args:
        trainer: with its `RhythmCredit` as `rhythm`.
        plain: its log-prob pass, unmeasured: the next method of that name behind `RhythmMixin`.
    """

    def __init__(self, trainer: Any, plain: Callable[..., Any]) -> None:
        self.trainer = trainer
        self.plain = plain
        self._entropy: Tensor | None = None  # of the measured pass, where TRL computes it

    def refresh(self) -> None:
        """Take the settings as a callback left them in the trainer's configuration, if they are there."""
        if hasattr(self.trainer.args, "rhythm_settings"):
            self.trainer.rhythm.settings = self.trainer.args.rhythm_settings()

    def measured(self, mask: Tensor, model: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's log-prob pass, measured."""
        rhythm = self.trainer.rhythm
        rhythm.model = model
        if rhythm.settings.mode == "entropy":
            kwargs["compute_entropy"] = True
        with rhythm.measuring(mask):
            result = self.plain(model, *args, **kwargs)
        self._entropy = None if result[1] is None else result[1].detach()
        return result

    def measured_apart(self, mask: Tensor, model: Any, batch: dict[str, Any]) -> None:
        """A log-prob pass more, where those that the trainer makes cannot be measured."""
        if self.trainer.rhythm.settings.mode in ("uniform", "random"):  # which know gamma without
            self._entropy = None
            with self.trainer.rhythm.measuring(mask):
                pass
            return
        arguments, extra = log_prob_arguments(self.trainer, batch)
        with torch.no_grad():
            self.measured(mask, model, *arguments, **extra)

    def gamma(self, mask: Tensor) -> Tensor:
        """Gamma `(B, T)` of the measured pass, and its statistics into TRL's metrics."""
        trainer = self.trainer
        seed = hash((trainer.args.seed, trainer._step, trainer.accelerator.process_index))
        generator = torch.Generator().manual_seed(seed)
        gamma = trainer.rhythm.gamma(self._entropy, generator, response_mask=mask)
        self._entropy = None
        self._log(trainer.rhythm.statistics(self._summed))
        return gamma

    def _summed(self, mine: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.trainer.accelerator.reduce(mine, reduction="sum")

    def _log(self, statistics: dict[str, float]) -> None:
        """Hand them to TRL's metrics."""
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        for name, value in statistics.items():
            metrics[f"rhythm/{name}"].append(value)

    def calibration_is_due(self) -> bool:
        trainer = self.trainer
        due = trainer.rhythm.calibration_due(trainer.state.global_step)
        return due and (trainer.model.training or trainer.rhythm.groups is None)

    def calibrate_on(self, output: dict[str, Any], mask: Tensor) -> None:
        arguments, extra = log_prob_arguments(self.trainer, output)
        self.calibrate(mask, *arguments, **extra)

    def calibrate(self, mask: Tensor, *arguments: Any, **extra: Any) -> None:
        """Group the heads by a log-prob pass of the trainer's own over a generation batch: they see what it sees.

        That pass runs the model from its root, as sharded models must be, with its images, and makes no more logits
        than TRL does. The spans are those of all processes' parts of the batch, so that the groups do not depend on how
        many share it.
        """
        if int(self._summed(mask.sum())) == 0:
            return  # a batch without a response token: the next one will do
        started = time.perf_counter()
        rhythm = self.trainer.rhythm
        rhythm.model = self.trainer.model
        with rhythm.calibrating(mask, self._summed):
            self.plain(self.trainer.model, *arguments, **extra)
        self._log({"calibration_seconds": time.perf_counter() - started})

"""ms-swift's GRPO trainer with rhythm credit: its old-log-prob pass, which it always makes, is measured."""

from __future__ import annotations

import os
import time
from typing import Any

import swift
import torch
from swift.rlhf_trainers import GRPOTrainer
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...measured_credit import GROUPS_FILE, RhythmCredit
from ..announce import announce
from ..reach import credit_is_seen
from .refusals import refuse, settings_of_run
from .rows import pack, unpack

__all__ = ["RhythmGRPOTrainer"]


class RhythmGRPOTrainer(GRPOTrainer):
    """ms-swift's `GRPOTrainer`, whose token advantages follow the rhythm of attention (arXiv 2510.13554v2).

    `rhythm` is its `RhythmCredit`. Gamma of eq. 19 stands in each micro-batch's `grpo_batch.rhythm_gamma`, `(B, T)`
    float32, and the advantages beside it are shaped by it. Nothing of ms-swift's loss is copied.

    Raises:
        ValueError: for what credit cannot honour, by the argument's name; for a wrong `RHYTHM_CREDIT`, or none.
        RuntimeError: in the first step, where a pass was not measured or the loss does not see the credit.
    """

    def __init__(self, model: Any, *rest: Any, **kwargs: Any) -> None:
        settings = settings_of_run()
        refuse(settings, kwargs["args"], model, kwargs["template"], kwargs)
        super().__init__(model, *rest, **kwargs)
        self.rhythm = RhythmCredit(self.model, settings)
        self._passes = 0  # of the policy over micro-batches, so far
        self._watched: tuple[Tensor, Any] | None = None  # the training forward's log-probs, and their micro-batch
        self._seen = settings.mode == "uniform" or settings.gamma_amp == 1  # whether the loss is known to see credit
        if self.accelerator.is_main_process:
            announce(f"RhythmGRPOTrainer (ms-swift {swift.__version__})", settings, "the old-log-prob pass")

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = super()._get_per_token_logps_and_entropies
        if grpo_batch.old_per_token_logps is None and model is self.model:  # reference passes come when it is there
            return self._measured_pass(run, model_inputs, grpo_batch, *args, **kwargs)
        result = run(model, model_inputs, grpo_batch, *args, **kwargs)
        if torch.is_grad_enabled():
            self._watched = (result[0], grpo_batch)
        return result

    def _measured_pass(self, run: Any, inputs: dict[str, Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The policy's pass over one micro-batch, before which the first one calibrates. Gamma goes into the batch."""
        if self.dynamic_num_samples:
            raise RuntimeError("a multi-turn scheduler must not split a trajectory into several samples under credit")
        mask, settings = self._trained(batch), self.rhythm.settings
        packed = self.template.padding_free and settings.reads_attention
        measured = pack(mask, batch.seq_lengths, inputs["input_ids"].shape[1]) if packed else mask
        if self._calibration_is_due() and int(self._summed(mask.sum())):
            started = time.perf_counter()
            with self.rhythm.calibrating(measured, self._summed):
                run(self.model, inputs, batch)
            self._log({"calibration_seconds": time.perf_counter() - started})
        if settings.mode == "entropy":
            kwargs["compute_entropy"] = True
        self._passes += 1
        with self.rhythm.measuring(measured):
            result = run(self.model, inputs, batch, *args, **kwargs)
        seed = hash((self.args.seed, self.state.global_step, self._passes, self.accelerator.process_index))
        gamma = self.rhythm.gamma(result[1], torch.Generator().manual_seed(seed))
        batch.rhythm_gamma = unpack(gamma, batch.seq_lengths, mask) if packed else gamma
        self._log(self.rhythm.statistics(self._summed))
        return result

    def _postprocess_batch(self, samples: Any, batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        for encoded in batch_encoded_inputs:
            batch = encoded["grpo_batch"]
            if not hasattr(batch, "rhythm_gamma"):
                raise RuntimeError("no old-log-prob pass of the policy was measured: this ms-swift is not supported")
            if batch.teacher_per_token_logps is not None:
                raise ValueError("dataset must have no column teacher_prompt for rhythm credit, got one: a teacher")
            batch.advantages = self.rhythm.shape(batch.advantages, batch.rhythm_gamma)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self._watched = None
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training and not self._seen:
            if self._watched is None:
                raise RuntimeError("the loss was made of no log-probs of the policy: this ms-swift is not supported")
            log_probs, batch = self._watched
            # As credit shapes them: the advantages in the batch may be another's. Those within KL's reach tell nothing.
            shaped = self.rhythm.shape(batch.advantages.sign(), batch.rhythm_gamma)
            told = self._trained(batch) & (batch.advantages.abs() > self.beta)
            self._seen = credit_is_seen(loss, log_probs, shaped, told)
        self._watched = None
        return loss

    def _trained(self, batch: Any) -> Tensor:
        """`(B, T)` bool: the tokens that the loss is of."""
        mask = batch.completion_mask.bool()
        return mask & ~batch.truncated_mask[:, None] if self.overlong_filter else mask

    def _calibration_is_due(self) -> bool:
        due = self.rhythm.calibration_due(self.state.global_step)
        return due and (self.model.training or self.rhythm.groups is None)

    def _summed(self, mine: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(mine, reduction="sum")

    def _log(self, statistics: dict[str, float]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in statistics.items():
            metrics[f"rhythm/{name}"].append(value)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.should_save:
            self.rhythm.save(os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))
        return super()._save_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and os.path.exists(os.path.join(checkpoint, GROUPS_FILE)):
            self.rhythm.load(checkpoint)

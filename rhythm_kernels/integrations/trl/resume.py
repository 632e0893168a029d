"""What a checkpoint of `RhythmMixin` holds beyond TRL's, so that a resumed run is the same run.

TRL generates a batch of responses, trains on it in several steps, and keeps it in memory meanwhile: `_buffered_inputs`,
of which `_step` says the part that is due. Neither is in TRL's checkpoints, nor is the order in which a second pass
over the data set draws the questions. Every process saves its own part: it generated it, with its own random numbers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...measured_credit import GROUPS_FILE

if TYPE_CHECKING:  # its methods call those of the trainer that stands behind it
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

__all__ = ["ResumeMixin"]

FILE = "rhythm_progress_{process}.pt"


def save_progress(trainer: Any, folder: str) -> None:
    """Write this process's progress into a checkpoint's folder."""
    schedule = trainer.args.steps_per_generation * trainer.num_iterations
    within = trainer._step % schedule != 0  # otherwise the next step generates anew
    progress = {
        "step": trainer._step,
        "processes": trainer.accelerator.num_processes,
        "buffered": trainer._buffered_inputs if within else None,
    }
    os.makedirs(folder, exist_ok=True)  # the process that makes it may be behind
    torch.save(progress, os.path.join(folder, FILE.format(process=trainer.accelerator.process_index)))


def load_progress(trainer: Any, folder: str) -> None:
    """Go on where `save_progress` was; nothing for a checkpoint of plain TRL.

    Raises:
        ValueError: for a checkpoint of another number of processes.
    """
    own, first = (
        os.path.join(folder, FILE.format(process=process)) for process in (trainer.accelerator.process_index, 0)
    )
    if not os.path.exists(first):
        return
    path = own if os.path.exists(own) else first  # of fewer processes, the first says how many
    progress = torch.load(path, map_location=trainer.accelerator.device, weights_only=True)
    if progress["processes"] != trainer.accelerator.num_processes:
        raise ValueError(
            f"resume_from_checkpoint must be of {trainer.accelerator.num_processes} processes, as many as resume it, "
            f"got {folder!r}, of {progress['processes']}"
        )
    trainer._step, trainer._buffered_inputs = progress["step"], progress["buffered"]


def replay(sampler: Any, epochs: int) -> None:
    """Let TRL's sampler draw the orders of the epochs that are over, each of which follows from the one before."""
    generator = getattr(sampler, "generator", None)
    if generator is None or hasattr(sampler, "set_epoch"):  # not shuffled, or told the epoch by the trainer
        return
    for _ in range(epochs):
        torch.randperm(sampler.num_samples, generator=generator)


class ResumeMixin(_Trainer):
    """The methods of a trainer that save and load its progress and head groups with its checkpoints."""

    _rhythm_sampler: Any = None  # of the questions

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._rhythm_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._rhythm_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = os.path.join(self._get_output_dir(trial=trial), name)
        if not self.args.save_only_model:
            save_progress(self, folder)
        if self.args.should_save:
            self.rhythm.save(folder)
        # Last: what makes a checkpoint one is never there without ours.
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        load_progress(self, checkpoint)
        if not self.args.ignore_data_skip:
            replay(self._rhythm_sampler, int(self.state.epoch or 0))
        if os.path.exists(os.path.join(checkpoint, GROUPS_FILE)):
            self.rhythm.load(checkpoint)

"""TRL's trainer as runs have it: with checkpoints that are whole or not there, and the size of each batch."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rhythm_kernels.integrations.trl import RhythmGRPOTrainer

from . import checkpoints, processes
from .divergence import in_step
from .lora import merged
from .recipe import Recipe
from .recorder import Recorder
from .sharding import dividing, gathered, is_divided, made_whole
from .start import Start


@dataclass(frozen=True)
class Checkpointing:
    """How a run writes its checkpoints.

    Attributes:
        folder: of the checkpoints.
        kept: how many of them there are to be; None is all.
        questions: a name for those that are trained on.
        start: where this process began.
        recorder: knows how long the steps since then took.
    """

    folder: Path
    kept: int | None
    questions: str
    start: Start
    recorder: Recorder

    def seconds(self) -> float:
        """How long all steps of the run took, those before this process included."""
        return self.start.seconds + time.perf_counter() - self.recorder.started

    def writing(self) -> AbstractContextManager[Path]:
        about = {
            "questions": self.questions,
            "processes": processes.count(),
            "seconds": self.seconds(),
            "resumed": list(self.start.resumed),
        }
        return checkpoints.writing(self.folder, about, self.kept)


class _NothingLeftError(Exception):
    """All steps are done already."""


class _Stop(TrainerCallback):
    """Ends a training before its first step, when the checkpoint is loaded."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        raise _NothingLeftError


class Trainer(RhythmGRPOTrainer):
    """Rhythm credit's trainer, for runs that may be cut off."""

    sgd = False  # momentum instead of AdamW
    _run: Checkpointing
    _writing = ""  # the folder in which a checkpoint is being written

    def carry_on(self, run: Checkpointing) -> None:
        """Train the steps that are left.

        Raises:
            RecipeError: for a checkpoint that cannot be read.
        """
        self._run = run
        checkpoint = run.start.checkpoint
        if checkpoint and run.start.step >= self.args.max_steps:  # transformers would train one step more
            self.add_callback(_Stop())
        with suppress(_NothingLeftError), dividing(self.args):
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def whole_model(self, recipe: Recipe) -> Any:
        """The trained model, whole and with its adapter merged, in the main process; None in the others.

        All processes must call it: where each of them holds a part, the parts are gathered.
        """
        if not is_divided(self):
            return merged(self.model) if processes.is_main() else None
        weights = gathered(self)
        return None if weights is None else made_whole(recipe, weights)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.sgd and self.optimizer is None:  # not handed over at the start: sharded models refuse that
            trained = [p for p in self.model.parameters() if p.requires_grad]
            rate, decay = self.args.learning_rate, self.args.weight_decay
            self.optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, weight_decay=decay)
        return super().create_optimizer(*args, **kwargs)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: it would be for a hub."""

    def _get_output_dir(self, trial: Any) -> str:
        return self._writing or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._run.writing() as folder:
            self._writing = str(folder)
            try:
                super()._save_checkpoint(model, trial)
                if self.args.sync_ref_model and (self.args.should_save or is_divided(self)):
                    made = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                    torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), self._reference(made))
            finally:
                self._writing = ""

    def _reference(self, checkpoint: Path) -> Path:
        """Where a checkpoint has the reference model, which follows the model; of a divided one each process's part."""
        return checkpoint / (f"reference_model_{processes.number()}.pt" if is_divided(self) else "reference_model.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *rest: Any, **more: Any) -> None:
        with checkpoints.reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *rest, **more)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint and self.args.sync_ref_model:
                path = self._reference(Path(checkpoint))
                saved = torch.load(path, map_location=self.model.device, weights_only=True)
                self.accelerator.unwrap_model(self.ref_model).load_state_dict(saved)
        self.state.save_steps = self.args.save_steps  # which transformers takes from the checkpoint
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # of accelerate's wrapper
        if isinstance(schedule, LambdaLR):  # of a run that is longer now, the rate follows the new schedule
            for i, group in enumerate(schedule.optimizer.param_groups):
                rate = schedule.base_lrs[i] * schedule.lr_lambdas[i](schedule.last_epoch)
                group["lr"] = schedule._last_lr[i] = rate  # what is taken, and what is logged

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        with in_step(self.state.global_step + 1):
            return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Notes the length of each batch too, and the bytes that its attention maps would have taken."""
        (batch, prompt), completion = inputs["prompt_ids"].shape, inputs["completion_ids"].shape[1]
        config, length = self.model.config, prompt + completion
        maps = batch * config.num_hidden_layers * config.num_attention_heads * length**2 * 4
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["row_tokens"].append(length)
        metrics["map_bytes"].append(maps)
        return super()._compute_loss(model, inputs)

"""TRL's GRPO with rhythm credit: a thin subclass that measures the passes TRL makes anyway.

Where TRL computes the old log-probs, they are measured there; where it does not, the training forward is the behaviour
policy itself and is measured. Either way gamma of eq. 19 stands in `inputs["rhythm_gamma"]`, `(B, T)` float32, and the
advantages that the loss reads are shaped by it. Nothing of TRL's loss is copied.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..heads import HeadGroups
from ..measured_credit import GROUPS_FILE, NO_CREDIT, RhythmCredit
from .trl_config import RhythmGRPOConfig
from .trl_inputs import last_token, log_prob_arguments, response_mask
from .trl_resume import load_progress, replay, save_progress

__all__ = ["RhythmGRPOConfig", "RhythmGRPOTrainer"]


class RhythmGRPOTrainer(GRPOTrainer):
    """Drop-in `GRPOTrainer` whose token advantages follow the rhythm of attention (arXiv 2510.13554v2).

    Takes what `GRPOTrainer` takes, with a `RhythmGRPOConfig` as `args`. `rhythm` is its `RhythmCredit`, and
    `rhythm_groups` the head groups in use (None before the first batch). They are saved with each checkpoint and read
    back on resuming, as is what TRL's own checkpoints lack (`trl_resume`), so that a resumed run is the same run,
    but for later passes over an `IterableDataset` and for `dataloader_persistent_workers`.

    Raises:
        TypeError, ValueError: for another configuration, a model without softmax attention, groups that do not fit it,
            sequence-level importance sampling that credit cannot pass (`RhythmGRPOConfig.refuse_blind_credit`), and
            `use_liger_kernel` in TRL versions whose Liger loss reads one advantage a sequence.
    """

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: RhythmGRPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
            args = RhythmGRPOConfig(f"{name.split('/')[-1] or 'model'}-RhythmGRPO")
        if not isinstance(args, RhythmGRPOConfig):
            raise TypeError(f"args must be a RhythmGRPOConfig, got {type(args).__name__}")
        if getattr(args, "use_liger_kernel", False) and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise ValueError(
                "use_liger_kernel must be False in this version of TRL, got True: its Liger loss reads one advantage a "
                "sequence and would ignore the credit"
            )
        args.refuse_blind_credit()  # again: it may have been changed since it was made
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.rhythm = RhythmCredit(self.model, args.rhythm_settings())
        self._met = False  # whether the latest old-log-prob pass was measured as TRL made it
        self._calibrated = False  # whether it was also calibrated on
        self._armed = False  # whether the next log-prob pass is the policy's own and still to be measured
        self._entropy: Tensor | None = None  # of the measured pass, where TRL computes it
        self._loss: tuple[dict[str, Any], dict[str, Any]] | None = None  # inputs of the loss, and the copy it reads
        self._sampler: Any = None  # of the questions

    @property
    def rhythm_groups(self) -> HeadGroups | None:
        return self.rhythm.groups

    @rhythm_groups.setter
    def rhythm_groups(self, groups: HeadGroups) -> None:
        self.rhythm.groups = groups

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        schedule = self.args.steps_per_generation * self.num_iterations
        corrects = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        self.rhythm.settings = self.args.rhythm_settings()  # as a callback left them
        self._armed = bool(self.args.gradient_accumulation_steps % schedule or corrects)
        self._met = self._calibrated = False
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._armed = False
        mask = response_mask(output)
        if "old_per_token_logps" in output:
            # That pass does not know of tools: where one had the last word, it was measured with too long a response.
            if not self._met or self._tool_had_the_last_word(output, mask):
                arguments, extra = log_prob_arguments(self, output)
                if self._calibrated:
                    self._calibrate(*arguments[:2], mask, **extra)
                with torch.no_grad():
                    self._measured_pass(mask, self.model, *arguments, **extra)
            output["rhythm_gamma"] = self._credit(mask)
        elif self._calibration_is_due():
            (input_ids, attention_mask, _), extra = log_prob_arguments(self, output)
            self._calibrate(input_ids, attention_mask, mask, **extra)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.rhythm.settings = self.args.rhythm_settings()  # as a callback left them
        # The loss reads a copy, so that buffered advantages stay as they are. The copy has none until gamma is known:
        # a version of TRL that reads them before its forward meets a KeyError, and is not plain GRPO in silence.
        reading = {name: value for name, value in inputs.items() if name != "advantages"}
        if "rhythm_gamma" in inputs:  # of the old-log-prob pass, or of an earlier iteration over these inputs
            reading["advantages"] = self._shaped(inputs)
        else:
            self._armed, self._loss = True, (inputs, reading)
        try:
            return super()._compute_loss(model, reading)
        finally:
            self._armed, self._loss = False, None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._armed:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._armed = False
        input_ids, attention_mask, length = args[:3]
        if self._loss is None:  # the old-log-prob pass
            mask = attention_mask[:, -length:]
            if self._calibration_is_due():
                self._calibrate(input_ids, attention_mask, mask, *args[3:], **kwargs)
                self._calibrated = True
            self._met = True
            return self._measured_pass(mask, model, *args, **kwargs)
        inputs, reading = self._loss  # the training forward
        mask = response_mask(inputs)
        result = self._measured_pass(mask, model, *args, **kwargs)
        inputs["rhythm_gamma"] = reading["rhythm_gamma"] = self._credit(mask)
        reading["advantages"] = self._shaped(inputs)
        return result

    def _shaped(self, inputs: dict[str, Any]) -> Tensor:
        return self.rhythm.shape(inputs["advantages"], inputs["rhythm_gamma"])

    @property
    def _blind(self) -> bool:
        """Whether attention cannot be measured yet, as no batch had a response to tell the heads apart by."""
        return self.rhythm.settings.reads_attention and self.rhythm.groups is None

    def _measured_pass(self, mask: Tensor, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's log-prob pass, measured."""
        self.rhythm.model = model
        if self.rhythm.settings.mode == "entropy":
            kwargs["compute_entropy"] = True
        run = super()._get_per_token_logps_and_entropies
        with nullcontext() if self._blind else self.rhythm.measuring(mask):
            result = run(model, *args, **kwargs)
        self._entropy = None if result[1] is None else result[1].detach()
        return result

    def _credit(self, mask: Tensor) -> Tensor:
        """Gamma `(B, T)` of the measured pass, and its statistics into TRL's metrics."""
        if self._blind:
            self._log(NO_CREDIT)
            return torch.ones(mask.shape, device=mask.device)
        generator = torch.Generator().manual_seed(hash((self.args.seed, self._step, self.accelerator.process_index)))
        gamma = self.rhythm.gamma(self._entropy, generator, response_mask=mask)
        self._entropy = None
        self._log(self.rhythm.statistics(self._summed))
        return gamma

    def _summed(self, mine: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(mine, reduction="sum")

    def _log(self, statistics: dict[str, float]) -> None:
        """Hand them to TRL's metrics."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in statistics.items():
            metrics[f"rhythm/{name}"].append(value)

    def _tool_had_the_last_word(self, output: dict[str, Any], mask: Tensor) -> bool:
        """Of any response of any process: what follows is a forward, which sharded models make together."""
        if "tool_mask" not in output:
            return False
        late = (last_token(mask) != last_token(output["completion_mask"])).any()
        return bool(self.accelerator.gather(late.reshape(1)).any())

    def _calibration_is_due(self) -> bool:
        return self.rhythm.calibration_due(self.state.global_step) and (self.model.training or self._blind)

    def _calibrate(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, *rest: Any, **extra: Any) -> None:
        """Group the heads by a log-prob pass of TRL's own over a generation batch, so that they see what it sees.

        That pass runs the model from its root, as sharded models must be, with its images, and makes no more logits
        than TRL does. The spans are those of all processes' parts of the batch, so that the groups do not depend on how
        many share it.
        """
        if int(self._summed(mask.sum())) == 0:
            return  # a batch without a response token: the next one will do
        started = time.perf_counter()
        self.rhythm.model = self.model
        with self.rhythm.calibrating(mask, self._summed):
            super()._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, mask.shape[1], *rest, **extra
            )
        self._log({"calibration_seconds": time.perf_counter() - started})

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if not self.args.save_only_model:
            save_progress(self, folder)
        if self.args.should_save:
            self.rhythm.save(folder)
        super()._save_checkpoint(model, trial)  # last: what makes a checkpoint one is never there without ours

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        load_progress(self, checkpoint)
        if not self.args.ignore_data_skip:
            replay(self._sampler, int(self.state.epoch or 0))
        if os.path.exists(os.path.join(checkpoint, GROUPS_FILE)):
            self.rhythm.load(checkpoint)

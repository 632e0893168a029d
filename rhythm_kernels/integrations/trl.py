"""TRL's GRPO with rhythm credit: a thin subclass that measures the passes TRL makes anyway.

Where TRL computes the old log-probs, they are measured there; where it does not, the training forward is the behaviour
policy itself and is measured. Either way gamma of eq. 19 stands in `inputs["rhythm_gamma"]`, `(B, T)` float32, and the
advantages that the loss reads are shaped by it. Nothing of TRL's loss is copied.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ..credit import rhythm_credit, shape_advantages
from ..heads import HeadGroups
from ..probe.calibration import evaluating
from ..probe.structure import attention_layers, find_decoder
from .measure import MeasuredPass, PassCalibration, PassProbe
from .trl_config import RhythmGRPOConfig
from .trl_inputs import last_token, log_prob_arguments, over_sequence, response_mask

__all__ = ["RhythmGRPOConfig", "RhythmGRPOTrainer"]

_GROUPS_FILE = "rhythm_groups.json"


class RhythmGRPOTrainer(GRPOTrainer):
    """Drop-in `GRPOTrainer` whose token advantages follow the rhythm of attention (arXiv 2510.13554v2).

    Takes what `GRPOTrainer` takes, with a `RhythmGRPOConfig` as `args`. `rhythm_groups` holds the head groups in use
    (None before the first batch); they are saved with each checkpoint and read back on resuming.

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
            raise TypeError(f"args is a {type(args).__name__}: it must be a RhythmGRPOConfig")
        if getattr(args, "use_liger_kernel", False) and hasattr(GRPOTrainer, "compute_liger_loss"):
            raise ValueError(
                "use_liger_kernel is True: it must be False in this version of TRL, whose Liger loss reads one "
                "advantage a sequence and would ignore the credit"
            )
        args.refuse_blind_credit()  # again: it may have been changed since it was made
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.rhythm_groups: HeadGroups | None = None
        self._grouped_at = 0
        self._measuring = args.rhythm_mode in ("local", "global", "coupled")
        self._calibrated = False  # whether the latest old-log-prob pass was calibrated on
        self._armed = False  # whether the next log-prob pass is the policy's own and still to be measured
        self._pass: MeasuredPass | None = None
        self._loss: tuple[dict[str, Any], dict[str, Any]] | None = None  # inputs of the loss, and the copy it reads
        if self._measuring:
            attention_layers(find_decoder(self.model), args.rhythm_layers)  # raises for a wrong choice
            if args.rhythm_groups is not None:
                self._use_groups(HeadGroups.load(args.rhythm_groups))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        schedule = self.args.steps_per_generation * self.num_iterations
        corrects = self.use_vllm and getattr(self, "vllm_importance_sampling_correction", False)
        self._armed, self._pass = bool(self.args.gradient_accumulation_steps % schedule or corrects), None
        self._calibrated = False
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._armed = False
        mask = response_mask(output)
        if "old_per_token_logps" in output:
            # That pass does not know of tools: where one had the last word, it was measured with too long a response.
            if self._pass is None or self._tool_had_the_last_word(output, mask):
                arguments, extra = log_prob_arguments(self, output)
                if self._calibrated:
                    self._calibrate(*arguments[:2], mask, **extra)
                with torch.no_grad():
                    self._measured_pass(mask, self.model, *arguments, **extra)
            assert self._pass is not None
            output["rhythm_gamma"] = self._credit(mask, self._pass)
        elif self._calibration_is_due():
            (input_ids, attention_mask, _), extra = log_prob_arguments(self, output)
            self._calibrate(input_ids, attention_mask, mask, **extra)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
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
            return self._measured_pass(mask, model, *args, **kwargs)
        inputs, reading = self._loss  # the training forward
        mask = response_mask(inputs)
        result = self._measured_pass(mask, model, *args, **kwargs)
        assert self._pass is not None
        inputs["rhythm_gamma"] = reading["rhythm_gamma"] = self._credit(mask, self._pass)
        reading["advantages"] = self._shaped(inputs)
        return result

    def _shaped(self, inputs: dict[str, Any]) -> Tensor:
        return shape_advantages(inputs["advantages"], inputs["rhythm_gamma"], self.args.rhythm_sign)

    def _measured_pass(self, mask: Tensor, model: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's log-prob pass with a probe around it; what it saw is left in `self._pass`."""
        seen = MeasuredPass()
        if self.args.rhythm_mode == "entropy":
            kwargs["compute_entropy"] = True
        run = super()._get_per_token_logps_and_entropies
        if self.rhythm_groups is None:
            result = run(model, *args, **kwargs)
        else:
            window, (low, high) = self.args.rhythm_window, self.args.rhythm_horizon
            seen.probe = PassProbe(model, self.rhythm_groups, window, (low, high), over_sequence(mask, args[0]))
            with seen.probe:
                result = run(model, *args, **kwargs)
        seen.entropy = result[1]
        self._pass = seen
        return result

    def _credit(self, mask: Tensor, seen: MeasuredPass) -> Tensor:
        """Gamma `(B, T)` of a measured pass, and its statistics into TRL's metrics."""
        started = time.perf_counter()
        if seen.probe is not None:
            waad, fai = (x[:, -mask.shape[1] :] for x in seen.probe.measures())
        else:  # baselines read neither; where there was no response to calibrate with, NaN makes gamma 1
            waad = fai = torch.full(mask.shape, math.nan if self._measuring else 0.0, device=mask.device)
        generator = torch.Generator().manual_seed(hash((self.args.seed, self._step, self.accelerator.process_index)))
        gamma = rhythm_credit(waad, fai, mask, entropy=seen.entropy, generator=generator, **self.args.credit_options())
        metrics = self._metrics["train" if self.model.training else "eval"]
        if seen.probe is not None:
            metrics["rhythm/seconds"].append(seen.probe.seconds() + time.perf_counter() - started)
        statistics = {"tokens": mask, "gamma_mean": gamma, "boosted_share": gamma != 1}
        if seen.probe is not None:
            statistics |= {"waad_mean": waad, "fai_mean": fai}
        local = torch.stack([(x * mask).sum().float() for x in statistics.values()])
        tokens, *sums = self.accelerator.reduce(local, reduction="sum").tolist()
        for name, total in zip(list(statistics)[1:], sums):
            metrics[f"rhythm/{name}"].append(total / max(tokens, 1))
        return gamma

    def _tool_had_the_last_word(self, output: dict[str, Any], mask: Tensor) -> bool:
        """Of any response of any process: what follows is a forward, which sharded models make together."""
        if "tool_mask" not in output:
            return False
        late = (last_token(mask) != last_token(output["completion_mask"])).any()
        return bool(self.accelerator.gather(late.reshape(1)).any())

    def _calibration_is_due(self) -> bool:
        every, step = self.args.rhythm_regroup_steps, self.state.global_step
        again = self.model.training and every > 0 and step - self._grouped_at >= every
        return self._measuring and (self.rhythm_groups is None or again)

    def _calibrate(self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, *rest: Any, **extra: Any) -> None:
        """Group the heads by a log-prob pass of TRL's own over a generation batch, so that they see what it sees.

        That pass runs the model from its root, as sharded models must be, with its images, and makes no more logits
        than TRL does. All processes use the groups of the first.
        """
        if int(self.accelerator.gather(mask.sum()).min()) == 0:
            return  # a process without a response token: the next batch will do
        started = time.perf_counter()
        layers, quantile = self.args.rhythm_layers, self.args.rhythm_head_quantile
        calibration = PassCalibration(self.model, layers, quantile, over_sequence(mask, input_ids))
        with evaluating(self.model), calibration:
            super()._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, mask.shape[1], *rest, **extra
            )
        groups = calibration.groups()
        self._use_groups(broadcast_object_list([groups])[0])
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rhythm/calibration_seconds"].append(time.perf_counter() - started)

    def _use_groups(self, groups: HeadGroups) -> None:
        find_decoder(self.model).check(groups)
        self.rhythm_groups, self._grouped_at = groups, self.state.global_step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.rhythm_groups is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.rhythm_groups.save(os.path.join(self._get_output_dir(trial=trial), folder, _GROUPS_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", _GROUPS_FILE)
        if checkpoint is not None and self._measuring and os.path.exists(path):
            self._use_groups(HeadGroups.load(path))

"""Which passes of a trainer are measured, and when its loss meets the credit: what `RhythmMixin` keeps in a trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .advantages import OneValueAToken
from .inputs import is_off_policy, is_policy, is_whole_batch, keeps_old_log_probs, last_token, response_mask, row_marks
from .loss import LossInputs, check_that_credit_is_seen, check_that_rows_have_their_gamma
from .passes import LogProbPasses

__all__ = ["TrainerCredit"]

_LOGGER = logging.getLogger("rhythm_kernels")


class TrainerCredit:
    """The state of one trainer. It is one attribute, so that no name of a foreign trainer is taken."""

    def __init__(self, passes: LogProbPasses) -> None:
        self.passes = passes
        self.trainer = passes.trainer
        self.losses = 0  # that came by so far
        self._armed = False  # whether the next log-prob pass is the policy's own and still to be measured
        self._met: tuple[Tensor, Tensor] | None = None  # tokens and attention mask of a pass measured as TRL made it
        self._calibrated = False  # whether it was also calibrated on
        self._loss: LossInputs | None = None  # while a loss is computed
        self._seen = False  # whether a loss was seen to heed the credit
        self._compiled = False  # whether a loss was seen to be compiled
        self._early = False  # whether a loss was seen to read its advantages before its forward

    def generation(self, generate: Callable[[Any], dict[str, Any]], inputs: Any) -> dict[str, Any]:
        """A generation batch; with its gamma, where the policy changes before all of it is trained on."""
        trainer = self.trainer
        self.passes.refresh()
        self._armed, self._met, self._calibrated = keeps_old_log_probs(trainer), None, False
        try:
            output = generate(inputs)
        finally:
            self._armed = False
        mask = response_mask(output)
        if "old_per_token_logps" in output or is_off_policy(trainer):
            if self._is_to_be_measured_anew(output, mask):
                if self._calibrated or self.passes.calibration_is_due():
                    self.passes.calibrate_on(output, mask)
                self.passes.measured_apart(mask, trainer.model, output)
            output["rhythm_gamma"], output["rhythm_rows"] = self.passes.gamma(mask), row_marks(output)
        elif self.passes.calibration_is_due():
            self.passes.calibrate_on(output, mask)
        return output

    def loss(self, compute: Callable[..., Tensor], model: Any, inputs: dict[str, Any]) -> Tensor:
        """The loss of shaped advantages: by the gamma that the inputs have, or that of the loss's own forward."""
        self.passes.refresh()
        if "rhythm_gamma" in inputs:
            check_that_rows_have_their_gamma(inputs)
        elif self.passes.calibration_is_due():  # no batch of `generation`
            self.passes.calibrate_on(inputs, response_mask(inputs))
        try:
            read, loss = self._computed(compute, model, inputs)
        except TypeError as error:
            if "__torch_dispatch__" not in str(error):
                raise
            self._compiled = True  # torch.compile takes no subclass of a tensor
            read, loss = self._computed(compute, model, inputs)
        if loss.requires_grad:  # not one of an evaluation
            self.losses += 1
            if self._is_watching:
                self._seen = check_that_credit_is_seen(self.trainer, loss, read, response_mask(inputs))
        return loss

    def _computed(
        self, compute: Callable[..., Tensor], model: Any, inputs: dict[str, Any]
    ) -> tuple[LossInputs, Tensor]:
        read = self._loss = LossInputs(inputs, lambda: self._shaped(model, inputs))
        self._armed = "rhythm_gamma" not in inputs
        try:
            return read, compute(model, read)
        finally:
            self._armed, self._loss = False, None

    def log_probs(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *rest: Any, **kwargs: Any
    ) -> Any:
        """A log-prob pass, measured where it is the one that is waited for."""
        arguments = (input_ids, attention_mask, logits_to_keep, *rest)
        if self._loss is not None:
            return self._of_loss(self._loss, model, *arguments, **kwargs)
        if not (self._armed and is_policy(self.trainer, model)):
            return self.passes.plain(model, *arguments, **kwargs)
        self._armed = False  # the old-log-prob pass
        mask = attention_mask[:, -logits_to_keep:]
        if self.passes.calibration_is_due():
            self.passes.calibrate(mask, *arguments, **kwargs)
            self._calibrated = True
        self._met = (input_ids, attention_mask)
        return self.passes.measured(mask, model, *arguments, **kwargs)

    def _of_loss(self, read: LossInputs, model: Any, *arguments: Any, **kwargs: Any) -> Any:
        asked = self._armed or self._is_watching  # else which pass it is, for which a host must wait, matters to nobody
        if not (asked and is_policy(self.trainer, model) and is_whole_batch(read.inputs, *arguments[:2])):
            return self.passes.plain(model, *arguments, **kwargs)
        if self._armed:  # the training forward
            self._armed = False
            mask = response_mask(read.inputs)
            result = self.passes.measured(mask, model, *arguments, **kwargs)
            read.inputs["rhythm_gamma"] = self.passes.gamma(mask)
        else:
            result = self.passes.plain(model, *arguments, **kwargs)
        if read.log_probs is None and result[0].requires_grad:
            read.log_probs = result[0]
        return result

    def _shaped(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The shaped advantages of a loss, at the moment when it asks for them."""
        if "rhythm_gamma" not in inputs:  # before its forward
            self._armed = False
            if not self._early and self.trainer.accelerator.is_main_process:
                _LOGGER.warning(
                    'the loss reads inputs["advantages"] before its forward, so every batch is measured in a forward '
                    "more: let it read them after"
                )
            self._early = True
            mask = response_mask(inputs)
            self.passes.measured_apart(mask, model, inputs)
            inputs["rhythm_gamma"] = self.passes.gamma(mask)
        if self.trainer.rhythm.settings.mode == "uniform":
            return inputs["advantages"]  # untouched, for losses that know none of tokens
        if inputs["advantages"].requires_grad:
            raise RuntimeError('inputs["advantages"] carry a gradient, which rhythm credit would cut: detach them')
        shaped = self.trainer.rhythm.shape(inputs["advantages"], inputs["rhythm_gamma"])
        return shaped if self._seen or self._compiled else shaped.as_subclass(OneValueAToken)

    @property
    def _is_watching(self) -> bool:
        """Whether it is still to be seen that this trainer's loss heeds the credit, and this batch could tell."""
        settings = self.trainer.rhythm.settings
        return not (self._seen or settings.mode == "uniform" or settings.gamma_amp == 1)

    def _is_to_be_measured_anew(self, output: dict[str, Any], mask: Tensor) -> bool:
        """Whether what was measured is not this batch: of any process, as sharded models make a forward together.

        The pass does not know of tools: where one had the last word, it was measured with too long a response. And a
        trainer may leave out responses after it, or make no such pass.
        """
        met = self._met is not None and "old_per_token_logps" in output and is_whole_batch(output, *self._met)
        if met and "tool_mask" in output:
            met = bool((last_token(mask) == last_token(output["completion_mask"])).all())
        return not bool(self.trainer.accelerator.gather(torch.tensor([met], device=mask.device)).all())

"""The mixin over trainers of others: their losses, passes and batches, and what is found at the first step."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer, RhythmMixin
from rhythm_kernels.integrations.trl.loss import LossInputs, check_that_credit_is_seen

from .test_trl import SCHEDULES, FedFromMaps, count_passes
from .toy import RHYTHM, build_model, build_tokenizer, dataset, losses, options, reward, train, weights

RANDOM = {"rhythm_mode": "random"}
ON, OFF = SCHEDULES["on-policy"], SCHEDULES["off-policy"]
BOTH = pytest.mark.parametrize("schedule", [ON, OFF], ids=["on-policy", "off-policy"])


def log_probs(trainer, model, inputs, **more):
    tokens, live = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    length = inputs["completion_ids"].shape[1]
    return trainer._get_per_token_logps_and_entropies(model, tokens, live, length, **more)[0]


def surrogate(new, inputs, advantages):
    """Clipped ratios times advantages, (B, 1) or (B, T), over the tokens of the responses."""
    old = inputs.get("old_per_token_logps")
    ratio = torch.exp(new - (new.detach() if old is None else old))
    mask = inputs["completion_mask"]
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(gain * mask).sum() / mask.sum()


def columns(advantages):
    return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages


class OwnLoss:
    """A loss written anew, that takes its advantages after its forward."""

    def _compute_loss(self, model, inputs):
        new = log_probs(self, model, inputs)
        return surrogate(new, inputs, columns(inputs["advantages"]))


class EarlyReader:
    """The same, that looks at its advantages first, and at its inputs as a whole."""

    def _compute_loss(self, model, inputs):
        inputs = {**inputs}
        advantages = columns(inputs["advantages"])
        return surrogate(log_probs(self, model, inputs), inputs, advantages)


class TokenAdvantages:
    """Advantages of every token, before credit comes to them: the end of a response counts half."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        length = output["completion_ids"].shape[1]
        weight = torch.where(torch.arange(length) < length // 2, 1.0, 0.5)
        output["advantages"] = output["advantages"][:, None] * weight
        return output


class Filter:
    """Leaves out a response of every group, after the old log-probs were made."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        rows = len(output["advantages"])
        kept = torch.arange(rows) % 4 != 3
        kept[3] = True  # as many as can be split in two
        if rows == 16:
            kept[7] = True
        return {k: v[kept] if torch.is_tensor(v) and v.dim() and len(v) == rows else v for k, v in output.items()}


class Temperature:
    """Log-probs of another temperature."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return (logps / 1.5, *rest)


def build(kind, args, **more):
    return kind(build_model(), reward, args, dataset(), processing_class=build_tokenizer(), **more)


def over(*bases):
    return type("Mine", bases, {})


def fed(part):
    """TRL with a part of another trainer, and gamma of full eager maps: the oracle."""
    return over(FedFromMaps, over(part, GRPOTrainer))


LEARNS = [
    (OwnLoss, "on-policy"),
    (Filter, "off-policy"),
    *(
        pytest.param(part, schedule, marks=pytest.mark.long)
        for part, schedule in [
            (OwnLoss, "two iterations in one step"),
            (EarlyReader, "on-policy"),
            (EarlyReader, "off-policy"),
            (TokenAdvantages, "on-policy"),
            (TokenAdvantages, "off-policy"),
            (Filter, "on-policy"),
            (Temperature, "checkpointed, reentrant"),
            (Temperature, "off-policy"),
        ]
    ),
]


@pytest.mark.parametrize(("part", "schedule"), LEARNS)
def test_a_trainer_of_others_learns_as_with_maps(tmp_path, part, schedule):
    changed = {**SCHEDULES[schedule], "max_steps": 2}
    oracle = train(fed(part), GRPOConfig, tmp_path, **changed)
    ours = train(over(RhythmMixin, over(part, GRPOTrainer)), RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    assert (ours.rhythm_groups.local, ours.rhythm_groups.global_) == oracle.groups
    torch.testing.assert_close(losses(ours), losses(oracle), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=1e-6)
    assert 1 < ours.state.log_history[0]["rhythm/gamma_mean"] < 1.5


class Logs:
    """A mixin of a user's, with names that others may have too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss, self._armed, self._log, self._credit = [], True, None, None

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self._loss.append((loss.item(), inputs["advantages"].shape))
        return loss


@pytest.mark.parametrize("side", ["before", pytest.param("behind", marks=pytest.mark.long)])
def test_mixins_stand_on_either_side(tmp_path, side):
    plain = train(over(Logs, GRPOTrainer), GRPOConfig, tmp_path, max_steps=1)
    kind = over(Logs, RhythmGRPOTrainer) if side == "before" else over(RhythmMixin, Logs, GRPOTrainer)
    ours = train(kind, RhythmGRPOConfig, tmp_path, max_steps=1, rhythm_gamma_amp=1.0, **RHYTHM)
    assert torch.equal(weights(ours), weights(plain))
    assert [loss for loss, _ in ours._loss] == [loss for loss, _ in plain._loss]
    assert len(ours._loss[0][1]) == (1 if side == "before" else 2)  # theirs, or those that the loss read


@pytest.mark.long
@BOTH
def test_a_subclass_of_ours_changes_the_passes(tmp_path, schedule):
    oracle = train(fed(Temperature), GRPOConfig, tmp_path, **schedule)
    ours = train(over(Temperature, RhythmGRPOTrainer), RhythmGRPOConfig, tmp_path, **schedule, **RHYTHM)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=1e-6)


@pytest.mark.long
@BOTH
@pytest.mark.parametrize("part", [OwnLoss, EarlyReader, TokenAdvantages, Filter, Temperature], ids=lambda x: x.__name__)
def test_gamma_of_one_is_the_trainer_of_others_bit_for_bit(tmp_path, part, schedule):
    plain = train(over(part, GRPOTrainer), GRPOConfig, tmp_path, **schedule)
    kind = over(RhythmMixin, over(part, GRPOTrainer))
    ours = train(kind, RhythmGRPOConfig, tmp_path, rhythm_gamma_amp=1.0, **schedule, **RHYTHM)
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.long
def test_only_advantages_that_are_read_early_cost_a_forward(tmp_path, caplog):
    late, early = (
        count_passes(over(RhythmMixin, over(part, GRPOTrainer)), RhythmGRPOConfig, tmp_path, **RHYTHM)
        for part in (OwnLoss, EarlyReader)
    )
    assert early == late + 3
    assert caplog.text.count("before its forward") == 1
    kind = over(RhythmMixin, over(EarlyReader, GRPOTrainer))
    assert count_passes(kind, RhythmGRPOConfig, tmp_path, rhythm_mode="random") == late - 1  # nor a calibration


class OwnForward:
    """A loss that takes its logits from the model."""

    def _compute_loss(self, model, inputs):
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        live = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logits = model(input_ids=tokens, attention_mask=live, use_cache=False).logits.log_softmax(-1)
        new = logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0][:, -inputs["completion_ids"].shape[1] :]
        return surrogate(new, inputs, columns(inputs["advantages"]))


class InPieces:
    """A loss whose forwards are of one half of the batch each: none is of the whole batch."""

    def _compute_loss(self, model, inputs):
        half = len(inputs["completion_ids"]) // 2
        parts = []
        for rows in (slice(0, half), slice(half, None)):
            part = {k: inputs[k][rows] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
            parts.append(log_probs(self, model, part))
        return surrogate(torch.cat(parts), inputs, columns(inputs["advantages"]))


class OneAdvantage:
    """A loss that reads one advantage a response."""

    def _compute_loss(self, model, inputs):
        new = log_probs(self, model, inputs)
        return surrogate(new, inputs, columns(inputs["advantages"]).mean(dim=1, keepdim=True))


class AnotherTensor:
    """A loss of log-probs that lost their gradient, and of others that have one."""

    def _compute_loss(self, model, inputs):
        new = log_probs(self, model, inputs)
        advantages = columns(inputs["advantages"])
        return surrogate(new.detach(), inputs, advantages) + log_probs(self, model, inputs).mean()


class ColumnOfRows:
    """A loss that was written for one advantage a response, as TRL's were before it knew others."""

    def _compute_loss(self, model, inputs):
        new = log_probs(self, model, inputs)
        return surrogate(new, inputs, inputs["advantages"].unsqueeze(1))


class OwnStep:
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = OwnLoss._compute_loss(self, model, inputs)
        self.accelerator.backward(loss)
        self._step += 1
        return loss.detach()


class OwnComputeLoss:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return OwnLoss._compute_loss(self, model, inputs)


ASTRAY = [
    (over(OwnLoss, RhythmGRPOTrainer), r"OwnLoss\._compute_loss: it takes the place of RhythmMixin's _compute_loss"),
    (over(OwnStep, RhythmGRPOTrainer), r"OwnStep\.training_step: it takes the place"),
    (over(RhythmMixin, OwnStep, GRPOTrainer), r"OwnStep\.training_step: it takes the place"),
    (over(RhythmMixin, OwnComputeLoss, GRPOTrainer), r"OwnComputeLoss\.compute_loss: it takes the place"),
    (over(RhythmMixin, OwnForward, GRPOTrainer), r"OwnForward\._compute_loss: it makes a forward of its own"),
    (over(RhythmMixin, InPieces, GRPOTrainer), r"InPieces\._compute_loss: .* of the whole batch .* in one call"),
    (over(RhythmMixin, OneAdvantage, GRPOTrainer), r"OneAdvantage\._compute_loss: the loss does not see which tokens"),
    (over(RhythmMixin, AnotherTensor, GRPOTrainer), r"AnotherTensor\._compute_loss: the loss "),
]


@pytest.mark.parametrize(("kind", "message"), ASTRAY, ids=[message.partition("\\")[0] for _, message in ASTRAY])
def test_a_loss_that_credit_does_not_reach_fails_in_the_first_step(tmp_path, kind, message):
    trainer = build(kind, RhythmGRPOConfig(**options(tmp_path, max_completion_length=12), **RHYTHM))
    before = weights(trainer).clone()
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert torch.equal(weights(trainer), before) and trainer.state.global_step == 0


def test_losses_of_an_evaluation_are_none_of_a_step(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 4}
    kind, extra = over(OwnStep, RhythmGRPOTrainer), {"eval_dataset": dataset().select(range(1))}
    with pytest.raises(RuntimeError, match=r"OwnStep\.training_step: it takes the place"):
        train(kind, RhythmGRPOConfig, tmp_path, extra=extra, max_completion_length=8, **evaluated, **RANDOM)


@pytest.mark.long
@pytest.mark.parametrize("part", [OwnForward, OneAdvantage, OwnComputeLoss, ColumnOfRows], ids=lambda x: x.__name__)
def test_uniform_takes_any_loss(tmp_path, part):
    plain = train(over(part, GRPOTrainer), GRPOConfig, tmp_path)
    ours = train(over(RhythmMixin, over(part, GRPOTrainer)), RhythmGRPOConfig, tmp_path, rhythm_mode="uniform")
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("amplitude", [pytest.param(1.0, marks=pytest.mark.long), 1.5])
def test_a_column_of_rows_is_found_at_any_gamma(tmp_path, amplitude):
    kind = over(RhythmMixin, ColumnOfRows, GRPOTrainer)
    with pytest.raises(RuntimeError, match=r"\(16, 1, \d+\) of them: .* where advantages\.dim\(\) == 1"):
        train(kind, RhythmGRPOConfig, tmp_path, max_completion_length=8, rhythm_gamma_amp=amplitude, **RANDOM)


def test_advantages_with_a_gradient_are_not_cut_from_it(tmp_path):
    class Differentiable:
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            inputs["advantages"].requires_grad_()
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    with pytest.raises(RuntimeError, match="carry a gradient, which rhythm credit would cut: detach them"):
        train(over(RhythmMixin, Differentiable, GRPOTrainer), RhythmGRPOConfig, tmp_path, **RANDOM)


class OwnGeneration:
    """Batches of its own, that none of ours saw."""

    def _generate_and_score_completions(self, inputs):
        return GRPOTrainer._generate_and_score_completions(self, inputs)


def test_batches_of_a_generation_of_others_get_credit(tmp_path):
    """Its heads are grouped, too, by the first loss that comes by."""
    changed = {"max_steps": 1, "max_completion_length": 12, **RHYTHM}
    ours = train(over(OwnGeneration, RhythmGRPOTrainer), RhythmGRPOConfig, tmp_path, **changed)
    assert torch.equal(weights(ours), weights(train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **changed)))
    assert ours.state.log_history[0]["rhythm/gamma_mean"] > 1


class Teacher:
    """A loss that first asks another model for its log-probs."""

    def _compute_loss(self, model, inputs):
        with torch.no_grad():
            log_probs(self, copy.deepcopy(self.model), inputs)
        self.measured = [self.rhythm.model is self.model]
        return OwnLoss._compute_loss(self, model, inputs)


class OneTensor:
    """A loss that stacks what it takes the lesser of."""

    def _compute_loss(self, model, inputs):
        new, mask = log_probs(self, model, inputs), inputs["completion_mask"]
        ratio = torch.exp(new - new.detach())
        gain = torch.stack([ratio, ratio.clamp(0.8, 1.2)]) * columns(inputs["advantages"])
        return -(gain.amin(0) * mask).sum() / mask.sum()


class Compiled:
    """A loss whose arithmetic is compiled, which takes no subclass of a tensor."""

    @staticmethod
    @torch.compile(backend="aot_eager")
    def arithmetic(new, advantages, mask):
        return -(torch.exp(new - new.detach()) * advantages * mask).sum() / mask.sum()

    def _compute_loss(self, model, inputs):
        return self.arithmetic(log_probs(self, model, inputs), columns(inputs["advantages"]), inputs["completion_mask"])


@pytest.mark.parametrize("part", [Teacher, OneTensor, pytest.param(Compiled, marks=pytest.mark.long)])
def test_losses_that_are_as_good_as_trls(tmp_path, part):
    changed = {"max_steps": 1, "max_completion_length": 8, **RHYTHM}
    ours, same = (
        train(over(RhythmMixin, one, GRPOTrainer), RhythmGRPOConfig, tmp_path, **changed) for one in (part, OwnLoss)
    )
    torch.testing.assert_close(weights(ours), weights(same), rtol=0, atol=1e-6)
    assert ours._rhythm._seen and all(getattr(ours, "measured", [True]))


class Reorders:
    """The other way round, but for what it does not know of."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {k: v if k.startswith("rhythm") or not v.dim() else v.flip(0) for k, v in output.items()}


def test_rows_that_are_moved_without_their_gamma_are_found(tmp_path):
    with pytest.raises(RuntimeError, match=r'inputs\["rhythm_gamma"\] are of other responses than .* do the same to'):
        train(over(Reorders, RhythmGRPOTrainer), RhythmGRPOConfig, tmp_path, **OFF, **RANDOM, max_completion_length=8)


def test_a_heavy_reference_is_no_sign_of_a_blind_loss():
    """As in a resumed run: the KL term pulls harder than the advantages do, and by other tokens."""
    generator = torch.Generator().manual_seed(0)
    new = (-torch.rand(8, 500, generator=generator)).requires_grad_()
    inputs = {
        "advantages": torch.tensor([0.1, -0.1] * 4),
        "rhythm_gamma": torch.where(torch.rand(8, 500, generator=generator) < 0.4, 1.5, 1.0),
        "ref_per_token_logps": new.detach() - torch.rand(8, 500, generator=generator),
    }
    shaped, away = inputs["advantages"][:, None] * inputs["rhythm_gamma"], inputs["ref_per_token_logps"] - new
    read = LossInputs(inputs, lambda: shaped)
    read.log_probs = new
    trainer = SimpleNamespace(beta=1.0, rhythm=SimpleNamespace(shape=lambda advantages, gamma: shaped))
    loss = (away.exp() - away - 1 - torch.exp(new - new.detach()) * shaped).mean()
    assert check_that_credit_is_seen(trainer, loss, read, torch.ones(8, 500))  # by the tokens that it pulls on little


class LeavesOut:
    """A loss that skips some batches: they say nothing of the others."""

    calls = 0

    def _compute_loss(self, model, inputs):
        self.calls += 1
        if self.calls % 2:
            return 0.0 * sum(p.sum() for p in model.parameters())
        return super()._compute_loss(model, inputs)


def test_a_loss_may_leave_out_batches(tmp_path):
    trainer = train(over(RhythmMixin, LeavesOut, GRPOTrainer), RhythmGRPOConfig, tmp_path, max_steps=2, **RANDOM)
    assert trainer.state.global_step == 2 and trainer._rhythm.losses == 2

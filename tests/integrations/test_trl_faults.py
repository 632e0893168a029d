"""Rewards and responses that give a step nothing to learn from: what TRL makes of them stays so under credit."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer

from .toy import RHYTHM, WORDS, build_model, build_tokenizer, dataset, options, reward, weights

READING = ("coupled", "local", "global")
MODES = ["coupled", *(pytest.param(x, marks=pytest.mark.long) for x in (*READING[1:], "uniform", "random", "entropy"))]
long = pytest.mark.long
SHORT = {"max_steps": 2, "max_completion_length": 10, "per_device_train_batch_size": 8}
END = WORDS.index("<eos>")


def run(tmp_path, reward, mode="coupled", model=None, callbacks=None, kind=RhythmGRPOTrainer, **changed):
    if kind is GRPOTrainer:
        args = GRPOConfig(**options(tmp_path, **{**SHORT, **changed}))
    else:
        args = RhythmGRPOConfig(**options(tmp_path, **{**SHORT, **changed}), rhythm_mode=mode, **RHYTHM)
    funcs = reward if isinstance(reward, list) else [reward]
    trainer = kind(
        model or build_model(), funcs, args, dataset(), processing_class=build_tokenizer(), callbacks=callbacks
    )
    trainer.train()
    return trainer


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def start():
    return torch.cat([p.detach().flatten() for p in build_model().parameters()])


def equal(completions, **_):
    return [0.5] * len(completions)


@pytest.mark.parametrize("mode", MODES)
def test_equal_rewards_change_no_weight(tmp_path, mode):
    """In the whole batch: advantage 0, loss 0, and weights as they were, bit for bit, whatever gamma is."""
    trainer = run(tmp_path, equal, mode)
    assert torch.equal(weights(trainer), start())
    for entry in logged(trainer):
        assert entry["loss"] == entry["grad_norm"] == 0 and entry["frac_reward_zero_std"] == 1
        assert (entry["rhythm/gamma_mean"] > 1) == (mode != "uniform")
        assert all(math.isfinite(value) for name, value in entry.items() if name.startswith("rhythm/"))


@long
def test_equal_rewards_in_a_group_are_no_part_of_the_loss(tmp_path):
    """Of two groups one is all alike: its tokens get no gradient, those of the other do."""
    seen = []

    class Watching(RhythmGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            seen.append(super()._generate_and_score_completions(inputs))
            return seen[-1]

    def half(completions, **_):
        return [0.5] * 4 + reward(completions[4:])

    run(tmp_path, half, kind=Watching, max_steps=1, num_iterations=2)  # with old log-probs, measured there
    (output,) = seen
    assert (output["advantages"][:4] == 0).all() and (output["advantages"][4:] != 0).all()
    assert (output["rhythm_gamma"][:4] > 1).any()


def nothing(completions, **_):
    return [None] * len(completions)


def some(completions, **_):
    return [None, *reward(completions[1:])]


def none_in_a_group(completions, **_):
    return [None] * 4 + reward(completions[4:])


def nan(completions, **_):
    return [math.nan, *reward(completions[1:])]


@long
@pytest.mark.parametrize("given", [some, none_in_a_group, nan])
def test_rewards_that_say_nothing(tmp_path, given):
    """`None`, or NaN: of that response nothing is learnt, and of the others what plain TRL would (gamma is 1 here)."""
    plain = run(tmp_path, given, kind=GRPOTrainer)
    ours = run(tmp_path, given, rhythm_gamma_amp=1.0)
    assert [entry["loss"] for entry in logged(plain)] == [entry["loss"] for entry in logged(ours)]
    assert torch.equal(weights(plain), weights(ours)) and not torch.equal(weights(ours), start())
    assert torch.isfinite(weights(run(tmp_path, given))).all()


@long
@pytest.mark.parametrize("mode", ["coupled", "random"])
def test_rewards_that_all_say_nothing_change_no_weight(tmp_path, mode):
    trainer = run(tmp_path, nothing, mode)
    assert torch.equal(weights(trainer), start())
    assert all(entry["loss"] == 0 and entry["reward"] is None for entry in logged(trainer))
    both = run(tmp_path, [nothing, reward], mode)  # of two, what the other says counts
    assert torch.equal(weights(both), weights(run(tmp_path, reward, mode)))


@long
def test_an_infinite_reward_takes_its_group_out(tmp_path):
    """By TRL's default scale, as mean and deviation are infinite too."""
    trainer = run(tmp_path, lambda completions, **_: [math.inf, *reward(completions[1:])])
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(weights(trainer), start())


class Error(Exception):
    pass


@long
@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (lambda rewards: 1 / 0, ZeroDivisionError, "division"),
        (lambda rewards: (_ for _ in ()).throw(SystemExit(3)), SystemExit, "3"),
        (lambda rewards: rewards[1:], ValueError, "'faulty' returned 7 rewards, but 8 were expected"),
        (lambda rewards: ["1"] * 8, ValueError, "str"),
        (lambda rewards: None, TypeError, "NoneType"),
    ],
)
def test_an_error_in_a_step_leaves_its_checkpoints(tmp_path, fault, error, said):
    """What a reward raises, and what TRL says of a wrong one, passes; the steps before it are on the disk."""
    calls = iter(range(100))

    def faulty(completions, **_):
        return reward(completions) if next(calls) < 2 else fault(reward(completions))

    changed = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "max_completion_length": 6}
    with pytest.raises(error, match=said):
        run(tmp_path, faulty, **changed)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and not (tmp_path / "checkpoint-3").exists()
    assert (tmp_path / "checkpoint-2" / "rhythm_groups.json").exists()


@long
@pytest.mark.parametrize("values", [torch.Tensor.tolist, lambda x: x, lambda x: x.numpy(), lambda x: list(x)])
def test_rewards_of_other_types(tmp_path, values):
    """Lists, tensors, arrays, lists of tensors: one and the same."""
    found = run(tmp_path, lambda completions, **_: values(torch.tensor(reward(completions))), max_steps=1)
    assert torch.equal(weights(found), weights(run(tmp_path, reward, max_steps=1)))


def biased(bias):
    """A model that ends at once, or never."""
    model = build_model()
    model.lm_head.register_forward_hook(lambda _, args, logits: logits + bias * (torch.arange(logits.shape[-1]) == END))
    return model


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_only_ends(tmp_path, mode):
    """Responses of one token: none comes later, so no attention is paid to them and no head is told by it."""
    trainer = run(tmp_path, reward, mode, biased(1e4))
    assert all(entry["completions/max_length"] == 1 for entry in logged(trainer))
    gamma = 1.0 if mode in ("uniform", "coupled", "global") else 1.5
    assert all(entry["loss"] == 0 and entry["rhythm/gamma_mean"] == gamma for entry in logged(trainer))
    assert torch.equal(weights(trainer), start())


class Lifts(TrainerCallback):
    """Masks responses that are cut off in the first step alone."""

    def on_step_end(self, args, state, control, **_):
        self.trainer.mask_truncated_completions = False


@pytest.mark.parametrize("mode", MODES)
def test_a_first_batch_without_a_response(tmp_path, mode):
    """All cut off and masked: gamma is 1 and nothing moves; heads are grouped by the next batch."""
    lifts = Lifts()

    class Trainer(RhythmGRPOTrainer):
        def train(self, *args, **kwargs):
            lifts.trainer = self
            return super().train(*args, **kwargs)

        def _compute_loss(self, model, inputs):
            seen.append((int(inputs["completion_mask"].sum()), self.rhythm_groups is not None))
            return super()._compute_loss(model, inputs)

    seen = []
    changed = {"mask_truncated_completions": True, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    trainer = run(tmp_path, reward, mode, biased(-1e4), [lifts], Trainer, **changed)
    assert [tokens > 0 for tokens, _ in seen] == [False, True]
    assert [groups for _, groups in seen] == [False, mode in READING]
    first, second = logged(trainer)
    assert (first["loss"], first["grad_norm"], first["rhythm/gamma_mean"]) == (0, 0, 1)
    assert second["grad_norm"] > 0 and (second["rhythm/gamma_mean"] > 1) == (mode != "uniform")
    assert ("rhythm/calibration_seconds" in second) == (mode in READING) and "rhythm/waad_mean" not in first


@long
@pytest.mark.parametrize("path", [{}, {"num_iterations": 2}])
def test_rows_without_a_response_among_others(tmp_path, path):
    """Some responses cut off and masked: gamma is 1 in theirs, the rest is measured, all is finite."""
    trainer = run(tmp_path, reward, model=biased(1.0), mask_truncated_completions=True, **path)
    assert any(0 < entry["completions/clipped_ratio"] < 1 for entry in logged(trainer) if "reward" in entry)
    assert torch.isfinite(weights(trainer)).all() and not torch.equal(weights(trainer), start())

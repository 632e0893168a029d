"""The reference loop where something goes wrong: rewards, batches without a signal or a token, models that diverge."""

from __future__ import annotations

import pytest
import torch

from rhythm_kernels import RhythmCredit, RhythmSettings
from training import reference_loop as loop
from training.divergence import DivergedError
from training.recipe import RecipeError, parse_recipe
from training.reference_loop import Batch, group_advantages, learn, main, sample, train

from ..integrations.toy import PROMPTS, build_model, build_tokenizer
from .runs import FEW, save_model

TOKENS = build_tokenizer()(PROMPTS)["input_ids"]
READING = ("coupled", "local", "global")
OTHERS = [pytest.param(mode, marks=pytest.mark.long) for mode in ("local", "global", "uniform", "entropy")]
MODES = ["coupled", "random", *OTHERS]
END = 1


@pytest.fixture(scope="module")
def batch():
    """Four groups of four responses."""
    torch.manual_seed(0)
    return sample(build_model(), build_tokenizer(), TOKENS, 4, 16, 1.0)


def credit_of(model, mode, batch=None):
    credit = RhythmCredit(model, RhythmSettings(mode=mode, window=4, horizon=(2, 8)))
    if batch is not None:
        credit.calibrate([vars(batch)])
    return credit


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 1.0, -2e17])
def test_equal_rewards_are_no_advantage(value):
    """Exactly: the mean of sixteen times 0.7 in float32 is another number."""
    equal = torch.full((16,), value)
    assert (group_advantages(equal, 16) == 0).all()
    mixed = torch.cat([equal, torch.arange(16.0)])
    assert (group_advantages(mixed, 16)[:16] == 0).all()
    assert torch.equal(group_advantages(mixed, 16)[16:], group_advantages(torch.arange(16.0), 16))


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_equal_rewards_changes_no_weight(batch, mode):
    """Loss 0, every weight as it was, bit for bit; the credit is computed, and says so."""
    model = build_model().train()
    before, optimizer = weights(model), adam(model)
    report = learn(model, optimizer, batch, torch.zeros(16), credit_of(model, mode, batch))
    assert report["loss"] == 0 and torch.equal(weights(model), before)
    assert report["gamma_mean"] > 1 or mode == "uniform"
    moments = [x for state in optimizer.state.values() for x in (state["exp_avg"], state["exp_avg_sq"])]
    assert moments and not any(map(torch.any, moments))


def test_equal_rewards_after_others_leave_adams_momentum(batch):
    """It moves the weights on, as Adam does by any gradient that is 0; plain gradient descent stays."""
    for make, moves in ((adam, True), (lambda model: torch.optim.SGD(model.parameters(), lr=1e-2), False)):
        model = build_model().train()
        optimizer, credit = make(model), credit_of(model, "coupled", batch)
        learn(model, optimizer, batch, torch.arange(16.0) - 7.5, credit)
        before = weights(model)
        assert learn(model, optimizer, batch, torch.zeros(16), credit)["loss"] == 0
        assert torch.equal(weights(model), before) != moves


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_a_response_is_no_step(batch, mode):
    """The first one too, when there are no head groups yet: they are made of the next."""
    model = build_model().train()
    before, optimizer, credit = weights(model), adam(model), credit_of(model, mode)
    empty = Batch(batch.input_ids, batch.attention_mask, torch.zeros_like(batch.response_mask))
    advantages = torch.arange(16.0) - 7.5
    reads = mode in READING
    assert credit.calibration_due(0) == reads
    credit.calibrate([vars(empty)])
    assert learn(model, optimizer, empty, advantages, credit) == {"loss": 0.0, "gamma_mean": 1.0, "boosted_share": 0.0}
    assert torch.equal(weights(model), before)
    assert credit.calibration_due(1) == reads
    credit.calibrate([vars(batch)])
    learn(model, optimizer, batch, advantages, credit)
    assert not torch.equal(weights(model), before)


def bias_the_end(model, bias):
    model.lm_head.register_forward_hook(lambda _, args, logits: logits + bias * (torch.arange(logits.shape[-1]) == END))


def recipe_of(mode="coupled", **grpo):
    given = {
        "max_steps": 3,
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 12,
        "warmup_steps": 0,
    }
    return parse_recipe(
        {
            "task": {"name": "countdown"},  # neither is asked: questions and model are below
            "model": {"path": None},
            "grpo": {**given, **grpo},
            "rhythm": {"mode": mode, "window": 4, "horizon": [2, 8]},
        }
    )


def run(reward, model=None, questions=None, **given):
    made = [(prompt, reward) for prompt in TOKENS] if questions is None else questions
    return train(model or build_model(), build_tokenizer(), made, recipe_of(**given))


@pytest.mark.parametrize("mode", ["coupled", "random"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_model_that_only_ends_or_never_does(mode, ends):
    """Responses of one token, the end; and responses that are all cut off: both go through."""
    model = build_model()
    bias_the_end(model, 1e4 if ends else -1e4)
    reports = list(run(lambda text: float(len(text) % 3), model, mode=mode))
    assert [report["tokens"] for report in reports] == [1.0 if ends else 12.0] * 3
    of_ends = {"coupled": 1.0, "random": 1.5}[mode]  # one token has no later one to influence; the half of one is one
    assert all(report["gamma_mean"] == of_ends if ends else report["gamma_mean"] > 1 for report in reports)
    if ends:
        assert all(report["loss"] == 0 for report in reports)  # all texts are alike


def after(calls, fault):
    """A reward that is right for some calls."""
    count = iter(range(10**6))

    def reward(text):
        return float(len(text) % 3) if next(count) < calls else fault()

    return reward


@pytest.mark.parametrize("fault", [1j, float("nan"), float("inf"), None, "1", [1.0, 2.0], torch.ones(2), 10**400])
def test_a_reward_that_is_no_number(fault):
    reports = run(after(20, lambda: fault), max_completion_length=2)
    assert next(reports)["step"] == 1
    with pytest.raises(ValueError, match=r"must hold functions that give a finite number, got .* for '"):
        next(reports)


def test_rewards_of_other_types():
    for one in (True, 1, torch.tensor(1), torch.tensor([1.0])):
        assert next(run(lambda text, one=one: one, max_completion_length=2))["reward"] == 1.0


@pytest.mark.parametrize("error", [RuntimeError("mine"), SystemExit(0), KeyboardInterrupt(), DivergedError("mine")])
def test_what_a_reward_raises_passes(error):
    def fault():
        raise error

    reports = run(after(20, fault), max_completion_length=2)
    next(reports)
    with pytest.raises(type(error)) as caught:
        next(reports)
    assert caught.value is error


def test_a_loss_that_is_not_finite_takes_no_step(batch):
    model = build_model().train()
    optimizer, credit = adam(model), credit_of(model, "coupled", batch)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    before = weights(model)
    with pytest.raises(DivergedError, match=r"^the loss is nan$"):
        learn(model, optimizer, batch, torch.arange(16.0), credit)
    assert not optimizer.state and torch.equal(weights(model).nan_to_num(), before.nan_to_num())


def test_a_gradient_that_is_not_finite_takes_no_step(batch):
    model = build_model().train()
    optimizer, before = adam(model), weights(model)
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergedError, match=r"^the gradient norm is (inf|nan)$"):
        learn(model, optimizer, batch, torch.arange(16.0), credit_of(model, "uniform"))
    assert not optimizer.state and torch.equal(weights(model), before)


def test_no_limit_of_the_gradient_is_no_gradient_of_zero(batch):
    """`grpo.max_grad_norm=0`, as TRL has it."""
    found = {}
    for limit in (0, 1e9, 1e-9):
        model = build_model().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        learn(model, optimizer, batch, torch.arange(16.0) - 7.5, credit_of(model, "uniform"), max_grad_norm=limit)
        found[limit] = weights(model)
    assert torch.equal(found[0], found[1e9]) and not torch.equal(found[0], found[1e-9])


@pytest.mark.parametrize("warmup", [0, 3, 0.25])
def test_the_rate_is_that_of_the_trainer(warmup):
    """A share of the steps too."""
    from transformers import TrainingArguments, get_linear_schedule_with_warmup

    steps = TrainingArguments(warmup_steps=warmup, use_cpu=True).get_warmup_steps(10)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_linear_schedule_with_warmup(optimizer, steps, 10).lr_lambdas[0]
    assert [loop._rate(step, warmup, 10) for step in range(10)] == [theirs(step) for step in range(10)]


def test_a_model_that_diverges_names_the_step():
    reports = run(lambda text: float(len(text) % 3), learning_rate=1e30)
    assert next(reports)["step"] == 1
    with pytest.raises(DivergedError, match=r"^step 2: the .*(nan|not finite).*; the model has diverged: try"):
        next(reports)


def test_nothing_to_ask():
    with pytest.raises(ValueError, match="questions must hold some, got none"):
        next(run(None, questions=[]))
    with pytest.raises(RecipeError, match=r"train_batch_size must be at least grpo\.num_generations, 4, got 2"):
        next(run(float, per_device_train_batch_size=2))


def test_the_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "start", 16, 2, 2)
    recipe = tmp_path / "own.yaml"
    recipe.write_text("task: {name: 'tests.training.test_checked:Half'}\nrhythm: {horizon: [2, 8]}\n")
    few = [word for word in FEW if not word.startswith("task.numbers")]
    capsys.readouterr()
    for words, said in (
        ([str(recipe), *few, f"model.path={model}"], "test_checked:Half: rewards['correctness'] must give 1 or 0"),
        ([str(tmp_path / "none.yaml")], "none.yaml"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error.splitlines()[-1] and "Traceback" not in error

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "carry_out", interrupt)
    assert main([str(recipe), f"model.path={model}"]) == 130

"""The reference PPO: its formulas by definition, what may touch what, and that it learns."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from rhythm_kernels import RhythmCredit, RhythmSettings
from training import reference_loop, reference_ppo
from training.models import load
from training.recipe import load_recipe, parse_recipe
from training.reference_loop import Batch, log_distributions, measure
from training.reference_ppo import (
    PPO,
    Critic,
    gae,
    last_hidden_states,
    learn,
    states_before,
    train,
    value_loss,
    whiten,
)

from ..integrations.toy import PROMPTS, build_model, build_tokenizer
from .runs import FEW, TINY

TOKENS = build_tokenizer()(PROMPTS)["input_ids"]
SETTINGS = RhythmSettings(window=4, horizon=(2, 8))


def estimates(reward: float, values: list[float], discount: float, decay: float) -> list[float]:
    """GAE of one response without holes by its definition, a sum over all later surprises."""
    n = len(values)
    after = [*values[1:], 0.0]
    surprises = [(reward if t == n - 1 else 0.0) + discount * after[t] - values[t] for t in range(n)]
    return [sum((discount * decay) ** (u - t) * surprises[u] for u in range(t, n)) for t in range(n)]


def test_gae_by_its_definition():
    """On masks of every kind: whole, with holes anywhere, of one token, of none."""
    draw, seen = random.Random(0), set()
    for _ in range(150):
        rows, length = draw.randint(1, 4), draw.choice([1, 2, 3, 9, 17])
        share = draw.choice([0.0, 0.2, 0.6, 1.0])
        mask = torch.tensor([[draw.random() < share for _ in range(length)] for _ in range(rows)])
        values = torch.tensor([[draw.gauss(0, 1) for _ in range(length)] for _ in range(rows)], dtype=torch.float64)
        rewards = torch.tensor([draw.gauss(0, 1) for _ in range(rows)], dtype=torch.float64)
        discount, decay = draw.choice([1.0, 0.9]), draw.choice([1.0, 0.95, 0.5, 0.0])
        expected = torch.zeros_like(values)
        for row in range(rows):
            places = mask[row].nonzero().flatten().tolist()
            seen |= {min(len(places), 2), "holes" if places and places[-1] - places[0] >= len(places) else "whole"}
            found = estimates(float(rewards[row]), values[row, places].tolist(), discount, decay)
            expected[row, places] = torch.tensor(found, dtype=torch.float64)
        values[~mask] = torch.nan  # nothing may be read there
        torch.testing.assert_close(gae(rewards, values, mask, discount, decay), expected, rtol=1e-12, atol=1e-12)
        single = gae(rewards.float(), values.float(), mask, discount, decay)
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=2e-5)
    assert seen == {0, 1, 2, "holes", "whole"}


def test_without_a_critic_it_is_the_reward_to_go():
    mask = torch.tensor(
        [[0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    ).bool()
    rewards = torch.tensor([2.0, -1.0, 3.0, 5.0])
    assert torch.equal(gae(rewards, torch.zeros(4, 7), mask), rewards[:, None] * mask)
    discounted = gae(rewards, torch.zeros(4, 7), mask, discount=0.5)
    assert discounted[0].tolist() == [0, 0.5, 1, 0, 0, 2, 0]  # a hole takes no discount
    assert discounted[1].tolist() == [-(0.5**k) for k in range(6, -1, -1)]


def test_a_critic_that_knows_the_reward_leaves_nothing():
    mask = torch.tensor([[0, 1, 1, 0, 1]]).bool()
    for decay in (0.0, 0.5, 1.0):
        assert gae(torch.tensor([3.0]), torch.full((1, 5), 3.0), mask, decay=decay).abs().max() == 0


def test_whitening_by_hand():
    mask = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    advantages = torch.tensor([[9.0, 1.0, 2.0], [9.0, 6.0, 9.0], [9.0, 9.0, 9.0]])  # mean 3, variance 14 / 3
    deviation = (14 / 3) ** 0.5
    expected = torch.tensor([[0, -2 / deviation, -1 / deviation], [0, 3 / deviation, 0], [0, 0, 0]])
    torch.testing.assert_close(whiten(advantages, mask), expected)
    assert not whiten(torch.ones(2, 3), mask[:2]).any()  # nothing to tell tokens apart
    assert not whiten(torch.ones(1, 3), torch.tensor([[False, True, False]])).any()


@pytest.mark.parametrize("value", [0.7, 0.1, 0.2, 1 / 3, -2e17])
def test_equal_advantages_are_white_without_a_sign(value):
    """Exactly: the mean of equal numbers is rounded, and so is their deviation, by which it would be divided."""
    for tokens in (1, 3, 100, 999, 8192):
        assert not whiten(torch.full((1, tokens), value), torch.ones(1, tokens, dtype=torch.bool)).any()


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_equal_rewards_before_the_critic_knows_anything_change_no_weight(value):
    of = batch()
    model, _, (report,), _ = one_step(of, rewards=torch.full((3,), value))
    assert torch.equal(weights(model), weights(build_model())) and report["loss"] == report["explained"] == 0
    knows = one_step(of, rewards=torch.full((3,), value), steps=3)[2]
    assert all(one["explained"] == 0 for one in knows)  # of no variance


def test_a_batch_without_a_response_leaves_model_and_critic():
    of = batch()
    empty = Batch(of.input_ids, of.attention_mask, torch.zeros_like(of.response_mask))
    model, critic, (report,), _ = one_step(empty)
    assert torch.equal(weights(model), weights(build_model())) and not any(map(torch.any, critic.parameters()))
    assert report == {"loss": 0, "value_loss": 0, "explained": 0, "gamma_mean": 1, "boosted_share": 0}


def test_value_loss_by_hand():
    values, returns, old = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.0])
    assert value_loss(values, returns, old) == (1 + 4) / 2
    assert value_loss(values, returns, old, 0.25) == pytest.approx((1.25**2 + 4) / 2)


def test_the_state_before_a_token():
    """After a hole it is the state behind what the tool wrote."""
    hidden = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]).bool()
    assert states_before(hidden, mask).flatten().tolist() == [0, 3, 7]


def batch(left: int = 0, right: int = 0, hole: bool = False) -> Batch:
    """Three responses of different lengths, with padding to spare."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 24, (3, 16), generator=generator)
    live, response = torch.ones(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.bool)
    for row, (start, end) in enumerate([(0, 16), (2, 11), (3, 14)]):
        live[row, :start], live[row, end:] = 0, 0
        response[row, 4:end] = True
    if hole:
        response[:, 7:9] = False
    ids[live == 0] = 0
    ids, live, response = (torch.nn.functional.pad(x, (left, right)) for x in (ids, live, response))
    return Batch(ids, live, response)


REWARDS = torch.tensor([1.0, 0.0, 0.3])


def one_step(of: Batch, mode="coupled", settings: PPO | None = None, steps: int = 1, rewards: torch.Tensor = REWARDS):
    """A fresh toy model, and what `learn` reports of each step over the same batch."""
    model = build_model().train()
    credit = RhythmCredit(model, RhythmSettings(mode=mode, window=4, horizon=(2, 8)))
    if credit.calibration_due(0):
        credit.calibrate([vars(of)])
    critic, optimizer = Critic(model, settings), torch.optim.SGD(model.parameters(), lr=0.3)
    reports = [learn(model, optimizer, of, rewards, credit, critic) for _ in range(steps)]
    return model, critic, reports, credit


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("hole", [False, True])
def test_whitening_comes_before_shaping(monkeypatch, hole):
    """What reaches the surrogate is white once gamma is divided out, of the signs of what was whitened."""
    given = {}
    monkeypatch.setattr(reference_ppo, "improve", lambda *a, **k: given.update(shaped=a[4]) or 0.0)
    of = batch(hole=hole)
    *_, credit = one_step(of)
    mask, gamma, shaped = of.response_mask, credit.gamma(), given["shaped"]
    assert set(gamma[mask].tolist()) >= {1.0, 1.5}
    white = (shaped / gamma)[mask]
    assert abs(float(white.mean())) < 1e-6
    assert float(white.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert (gamma[~mask] == 1).all()
    assert not shaped[~mask].any()
    plain = whiten(gae(REWARDS, torch.zeros(mask.shape), mask), mask)
    assert torch.equal(shaped, plain * gamma)
    assert torch.equal(shaped.sign(), plain.sign())
    assert abs(float(shaped[mask].mean())) > 1e-3  # so the other order would show


class NoCredit:
    """In place of `RhythmCredit`: nothing is measured, nothing is shaped."""

    def __init__(self, model, settings):
        pass

    def calibration_due(self, step):
        return False

    def measuring(self, mask):
        return nullcontext()

    def gamma(self, entropy, generator):
        pass

    def shape(self, advantages):
        return advantages

    def statistics(self):
        return {}


def toy_recipe(steps: int, **rhythm):
    return parse_recipe(
        {
            "task": {"name": "countdown"},  # neither is asked: questions and model are the toy's
            "model": {"path": None},
            "grpo": {
                "max_steps": steps,
                "num_generations": 8,
                "per_device_train_batch_size": 32,
                "max_completion_length": 16,
                "learning_rate": 3e-2,
            },
            "rhythm": {"window": 4, "horizon": [2, 8], **rhythm},
        }
    )


def share_of_even_words(text: str) -> float:
    words = [word for word in text.split() if word[0] == "w"]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def trained(steps: int, **rhythm):
    model, questions = build_model(), [(prompt, share_of_even_words) for prompt in TOKENS]
    reports = list(train(model, build_tokenizer(), questions, toy_recipe(steps, **rhythm), PPO(decay=0.95)))
    return weights(model), reports


def test_a_gamma_of_one_is_no_credit_bit_for_bit(monkeypatch):
    found = {
        "amp": trained(2, mode="coupled", gamma_amp=1.0)[0],
        "uniform": trained(2, mode="uniform")[0],
        "credit": trained(2, mode="coupled")[0],
    }
    monkeypatch.setattr(reference_loop, "RhythmCredit", NoCredit)
    none = trained(2)[0]
    assert torch.equal(found["amp"], none)
    assert torch.equal(found["uniform"], none)
    assert not torch.equal(found["credit"], none)


def test_the_critic_and_the_model_do_not_touch():
    model, of = build_model(), batch()
    critic = Critic(model)
    with last_hidden_states(model) as hidden:
        distributions = log_distributions(model, of)
    states = states_before(hidden[0], of.response_mask)
    assert distributions.requires_grad
    critic.fit(states, torch.arange(float(len(states))))
    assert all(p.grad is None for p in model.parameters())
    assert critic.head.weight.abs().max() > 0
    critic = one_step(of, settings=PPO(value_epochs=0))[1]  # only the policy's loss had a chance
    assert critic.head.weight.grad is None
    assert not critic.head.weight.any()
    first, second = (weights(one_step(of, settings=PPO(value_epochs=n))[0]) for n in (0, 50))
    assert torch.equal(first, second)


def test_the_first_batch_alone_sets_the_bias():
    critic = Critic(build_model(), PPO(value_learning_rate=0.0))
    states = torch.randn(5, critic.head.in_features)
    for mean in (2.0, 7.0):
        critic.fit(states, torch.full((5,), mean))
        assert critic.head.bias == 2 and not critic.head.weight.any()


def test_values_move_little_further_than_the_clip():
    moved, states = {}, torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for clip in (None, 0.05):
        critic = Critic(build_model(), PPO(value_clip=clip, value_epochs=40, value_learning_rate=1e-3))
        critic.fit(states, torch.zeros(20))
        before = critic(states).detach()
        critic.fit(states, torch.ones(20))
        moved[clip] = float((critic(states).detach() - before).abs().mean())
    assert 0.05 < moved[0.05] < 0.5 * moved[None]


def test_iterations_are_steps_of_the_policy():
    of = batch()
    once, twice = (one_step(of, settings=PPO(iterations=n)) for n in (1, 2))
    assert [{**twice[2][0], "seconds": once[2][0]["seconds"]}] == once[2]  # what is reported is of the first
    assert not torch.equal(weights(once[0]), weights(twice[0]))


def test_the_measured_forward_is_the_same_beside_a_critic():
    model, of = build_model().train(), batch()
    credit = RhythmCredit(model, SETTINGS)
    credit.calibrate([vars(of)])
    alone = measure(model, of, credit, None, 1.0), credit.gamma()
    with last_hidden_states(model):
        beside = measure(model, of, credit, None, 1.0), credit.gamma()
    assert all(map(torch.equal, alone, beside))


@pytest.mark.parametrize("steps", [1, 3])
def test_padding_changes_nothing(steps):
    plain, padded = (one_step(of, steps=steps, settings=PPO(decay=0.9)) for of in (batch(), batch(left=5, right=3)))
    torch.testing.assert_close(weights(padded[0]), weights(plain[0]), rtol=0, atol=5e-6)
    for one, other in zip(plain[2], padded[2]):
        for name in ("loss", "value_loss", "explained", "gamma_mean"):
            assert other[name] == pytest.approx(one[name], abs=1e-5)
    assert (weights(plain[0]) - weights(build_model())).abs().max() > 1e-3


def test_the_critic_learns_what_the_batch_returned():
    reports = one_step(batch(), settings=PPO(value_epochs=50, value_learning_rate=1e-2), steps=3)[2]
    assert reports[0]["explained"] == pytest.approx(0, abs=1e-6)  # it began with 0 everywhere
    assert reports[-1]["explained"] > 0.2
    assert reports[-1]["value_loss"] < reports[0]["value_loss"] / 2


def test_it_learns():
    reports = trained(10, mode="coupled")[1]
    assert [report["step"] for report in reports] == list(range(1, 11))
    assert sum(r["reward"] for r in reports[-3:]) / 3 > sum(r["reward"] for r in reports[:3]) / 3 + 0.2
    assert all(1 < report["gamma_mean"] < 1.5 for report in reports)


def run_command(*arguments: str) -> int:
    return reference_loop.main(arguments, train)


def test_the_command_prints_a_line_a_step_and_saves_the_model(capsys, tmp_path):
    more = ["grpo.max_steps=2", "grpo.warmup_steps=0", "grpo.max_completion_length=40"]  # some responses end
    run_command(TINY, *FEW, "--save", str(tmp_path / "model"), *more)
    lines = [dict(zip(*[iter(line.split())] * 2)) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == ["1", "2"]
    assert float(lines[0]["reward"]) > 0
    assert {"reward", "loss", "value_loss", "explained", "gamma_mean"} <= lines[0].keys()
    saved, _ = load(load_recipe(TINY, [f"model.path={tmp_path / 'model'}"]))
    assert not torch.equal(weights(saved), weights(load(load_recipe(TINY))[0]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("grpo.max_step=2", "error: 'max_step' is not a key of grpo; did you mean max_steps"),
        ("grpo.rewards=[luck]", "error: grpo.rewards must hold only score, correctness, format, answered, got 'luck'"),
        ("--save=/dev/null/model", "error: [Errno 20] Not a directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, wrong, message):
    assert run_command(TINY, *FEW, wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.long
def test_the_tiny_checkpoint_learns_to_end(capsys):
    """Rewarded for ending within 40 tokens, which a third of its responses do, it soon ends most."""
    run_command(
        *(TINY, "task.numbers=[3]", "task.train_size=64"),
        *("grpo.rewards=[answered]", "grpo.max_completion_length=40", "grpo.per_device_train_batch_size=64"),
        *("grpo.max_steps=12", "grpo.warmup_steps=0"),
    )
    ended = [float(line.split()[3]) / 0.2 for line in capsys.readouterr().out.splitlines()]
    assert sum(ended[:2]) / 2 < 0.5
    assert sum(ended[-3:]) / 3 > 0.75

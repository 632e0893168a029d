"""The reference loop: its formulas by hand, that it learns, and that the TRL subclass does the same."""

from __future__ import annotations

import math

import pytest
import torch

from rhythm_kernels import RhythmCredit, RhythmSettings
from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from training.recipe import parse_recipe
from training.reference_loop import (
    Batch,
    group_advantages,
    learn,
    log_distributions,
    sample,
    surrogate,
    token_entropies,
    token_log_probs,
    train,
)

from ..integrations.toy import PROMPTS, RHYTHM, build_model, build_tokenizer, weights
from ..integrations.toy import train as train_trl

TOKENS = build_tokenizer()(PROMPTS)["input_ids"]


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0])
    found = group_advantages(rewards, 3)
    deviation = math.sqrt(((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) + 1e-4
    expected = [2 / 3, -1 / 3, -1 / 3, -2 / 3, 1 / 3, 1 / 3]
    assert found.tolist() == pytest.approx([x / deviation for x in expected])
    assert group_advantages(torch.ones(4), 4).tolist() == [0.0] * 4


def test_surrogate_by_hand():
    """Two responses; a ratio of 2 is clipped where it would help, and counts in full where it hurts."""
    log_probs = torch.tensor([[0.0, math.log(2.0)], [0.0, math.log(2.0)]])
    old = torch.zeros(2, 2)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert float(surrogate(log_probs, old, advantages, mask)) == pytest.approx(-(1 + 1.2 - 1 - 2) / 4)
    mask[1] = False
    assert float(surrogate(log_probs, old, advantages, mask)) == pytest.approx(-(1 + 1.2) / 2)


def test_log_probs_ignore_padding():
    model = build_model().eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    padded = torch.tensor([[0, 0, 3, 4, 5, 6]])
    batches = Batch(ids, torch.ones_like(ids), ids > 0), Batch(padded, (padded > 0).long(), padded > 0)
    distributions = [log_distributions(model, batch) for batch in batches]
    plain, left = (token_log_probs(x, batch) for x, batch in zip(distributions, batches))
    entropy, of_left = map(token_entropies, distributions)
    torch.testing.assert_close(left[:, 3:], plain[:, 1:], rtol=0, atol=5e-6)
    torch.testing.assert_close(of_left[:, 3:], entropy[:, 1:], rtol=0, atol=5e-6)
    assert plain[0, 0] == entropy[0, 0] == 0
    choice = model(input_ids=ids).logits[0, 1]
    torch.testing.assert_close(plain[0, 2], choice.log_softmax(-1)[5])
    torch.testing.assert_close(entropy[0, 2], torch.distributions.Categorical(logits=choice).entropy())


def test_responses_end_with_their_end_token():
    torch.manual_seed(0)
    batch = sample(build_model(), build_tokenizer(), TOKENS, 4, 24, 1.0)
    assert batch.input_ids.shape[0] == 16
    lengths = set()
    for ids, mask, live in zip(batch.input_ids, batch.response_mask, batch.attention_mask):
        response = ids[mask].tolist()
        assert 1 not in response[:-1]
        assert response[-1] == 1 or len(response) == 24
        assert live[mask].all()
        assert (ids[~live.bool()] == 0).all() or response[-1] == 1
        lengths.add(len(response))
    assert len(lengths) > 1


@pytest.mark.parametrize("mode", ["coupled", "local", "uniform"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_trl_subclass_does_the_same(tmp_path, mode, iterations):
    """The batches that TRL samples and scores, through this loop: the same weights after three steps."""
    batches = []

    class Recording(RhythmGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            response = torch.cat([torch.zeros_like(output["prompt_mask"]), output["completion_mask"]], dim=1).bool()
            tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            live = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            batches.append((Batch(tokens, live, response), output["advantages"]))
            return output

    # Plain gradient descent: Adam magnifies the rounding of small gradients.
    changed = {"loss_type": "dapo", "lr_scheduler_type": "constant", "learning_rate": 0.3, "optim": "sgd"}
    theirs = train_trl(
        Recording,
        RhythmGRPOConfig,
        tmp_path,
        rhythm_mode=mode,
        num_iterations=iterations,
        max_steps=3 * iterations,
        **changed,
        **RHYTHM,
    )
    model = build_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    settings = RhythmSettings(
        mode=mode,
        window=RHYTHM["rhythm_window"],
        horizon=RHYTHM["rhythm_horizon"],
        groups=theirs.rhythm_groups,
    )
    credit = RhythmCredit(model, settings)
    assert len(batches) == 3
    for batch, advantages in batches:
        learn(model, optimizer, batch, advantages, credit, iterations=iterations)
    ours = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(ours, weights(theirs), rtol=0, atol=5e-6)
    assert (ours - torch.cat([p.detach().flatten() for p in build_model().parameters()])).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["coupled", "random", "entropy"])
def test_it_learns(mode):
    """Even words are rewarded: their share rises from about a half."""
    recipe = parse_recipe(
        {
            "task": {"name": "countdown"},  # neither is asked: questions and model are below
            "model": {"path": None},
            "grpo": {
                "max_steps": 12,
                "num_generations": 8,
                "per_device_train_batch_size": 32,
                "max_completion_length": 16,
                "learning_rate": 3e-2,
            },
            "rhythm": {"mode": mode, "window": 4, "horizon": [2, 8]},
        }
    )

    def reward(text: str) -> float:
        words = [word for word in text.split() if word[0] == "w"]
        return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))

    questions = [(prompt, reward) for prompt in TOKENS]
    reports = list(train(build_model(), build_tokenizer(), questions, recipe))
    assert [report["step"] for report in reports] == list(range(1, 13))
    assert sum(r["reward"] for r in reports[-3:]) / 3 > sum(r["reward"] for r in reports[:3]) / 3 + 0.2
    assert all(1 < report["gamma_mean"] < 1.5 for report in reports)

"""docs/trainers/any_loop.md does what it says: its loops, run from the page, against full attention maps and loops."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import rhythm_kernels as rk

from ...probe.probe_oracle import eager_maps, oracle, padded_bounds
from .page import page_code

PAGE = "any_loop.md"
SETUP, *LOOPS = page_code(PAGE)
LAYOUTS = ["padded", "completion", "packed"]


def run(block: str, names: dict) -> None:
    exec(compile(block, f"<a block of {PAGE}>", "exec"), names)


def loop(kind: str, **replaced):
    """The page's names after its loop, and by step: what `rollout` gave, the dense gamma `(B, T)`, gamma, the loss."""
    names = {}
    run(SETUP, names)
    names |= replaced
    rolled, steps = [], []
    rollout, update = names["rollout"], names["update"]

    def recorded_rollout():
        rolled.append(rollout())
        return rolled[-1]

    def recorded_update(loss):
        steps.append((*rolled[-1], dense(names, *rolled[-1][:3]), names["credit"].gamma(), loss.item()))
        update(loss)

    names |= {"rollout": recorded_rollout, "update": recorded_update}
    run(LOOPS[LAYOUTS.index(kind)], names)
    return names, steps


@cache
def trained(kind: str):
    """The loop as it stands on the page."""
    return loop(kind)


def again(kind: str):
    """A `rollout` that gives what the page's own one gave, without generating it anew."""
    return iter([step[:4] for step in trained(kind)[1]]).__next__


def dense(names, ids, attention_mask, response_mask):
    """Gamma from the model's full attention maps, in float64 and by the reference's loops."""
    model, groups = names["model"], names["credit"].groups
    if groups is None:
        return torch.ones(ids.shape)
    maps = eager_maps(model, input_ids=ids, attention_mask=attention_mask.long())
    settings = names["settings"]
    bounds = padded_bounds(attention_mask)
    waad, fai = oracle(maps, groups, bounds, response_mask, settings.window, settings.horizon)
    return rk.reference.rhythm_credit(waad.float(), fai.float(), response_mask, **settings.credit_options())


def by_hand(model, ids, attention_mask, response_mask, advantages, gamma):
    """The loss: minus the mean over response tokens of advantage times gamma, as every ratio is 1."""
    total = sum(
        float(advantages[row]) * float(gamma[row, t])
        for row in range(len(ids))
        for t in range(ids.shape[1])
        if response_mask[row, t]
    )
    return -total / int(response_mask.sum())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_loop_trains_on_the_dense_gamma(kind):
    names, steps = trained(kind)
    assert len(steps) == 3
    for ids, attention_mask, response_mask, advantages, expected, gamma, loss in steps:
        assert (expected != 1).any(1).all()  # every response has tokens that credit chose
        found = {"padded": expected, "completion": expected[:, 6:], "packed": expected[attention_mask][None]}[kind]
        assert torch.equal(gamma, found)
        assert loss == pytest.approx(by_hand(names["model"], ids, attention_mask, response_mask, advantages, expected))
    assert steps[0][-1] != steps[1][-1]  # and the model moved


def test_the_layouts_train_the_same_model():
    """Masks over all tokens, over responses, and packed are the same training, but for rounding."""
    losses = [[step[-1] for step in trained(kind)[1]] for kind in LAYOUTS]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def by_sequence(log_probs, advantages, mask):
    """A loss of one ratio a response, in which a token's advantage counts in a sum only: GSPO's."""
    response = (mask.int().diff(dim=1, prepend=mask[:, :1].int() * 0) > 0).cumsum(1)  # packed or not: a run of the mask
    response = response + response.amax() * torch.arange(len(mask))[:, None]
    difference = ((log_probs - log_probs.detach()) * mask).flatten()
    sums = torch.zeros(int(response.max()) + 1).index_add(0, response.flatten(), difference)
    return -(sums.exp()[response] * advantages * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_last_line_finds_a_loss_that_is_blind(kind):
    with pytest.raises(RuntimeError, match="the loss does not see which tokens credit chose"):
        loop(kind, surrogate=by_sequence, rollout=again(kind))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_gamma_of_one_is_the_loop_without_credit(kind):
    names, steps = loop(kind, settings=rk.RhythmSettings(mode="uniform"), rollout=again(kind))
    assert names["credit"].groups is None
    assert all((step[-2] == 1).all() for step in steps)


def test_several_steps_on_a_batch_take_the_gamma_of_its_rows():
    """Of the policy that wrote the responses: the maps are taken before the first step on the batch."""
    names = {}
    run(SETUP, names)
    rollout, update, at_first, steps = names["rollout"], names["update"], [], []

    def recorded_rollout():
        at_first[:] = []
        at_first.append(rollout())
        return at_first[0]

    def recorded_update(loss):
        ids, attention_mask, response_mask, advantages = at_first[0]
        if len(at_first) == 1:
            at_first.append(dense(names, ids, attention_mask, response_mask))
        rows, gamma = names["rows"], at_first[1]
        assert torch.equal(names["gamma"], gamma)
        ratio = torch.ones_like(gamma[rows])
        ratio[:, 1:] = (names["log_probs"] - names["old"][rows]).detach().exp()
        shaped = advantages[rows, None] * gamma[rows]
        least = torch.minimum(ratio * shaped, ratio.clamp(0.8, 1.2) * shaped)[response_mask[rows]]
        assert loss.item() == pytest.approx(-least.mean().item())
        steps.append((ratio != 1).any().item())
        update(loss)

    names |= {"rollout": recorded_rollout, "update": recorded_update}
    run(LOOPS[3], names)
    assert len(LOOPS) == 4
    assert len(steps) == 6
    assert all(steps[1::2])  # the second steps are of another policy than the one that was measured
    assert names["seen"]

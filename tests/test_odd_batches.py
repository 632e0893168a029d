"""`RhythmCredit` on batches that a long run meets: no response, one token, rows without one, measures that are NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rhythm_kernels as rk

from .probe.probe_models import packed_batch, tiny_model
from .test_measured_credit import SETTINGS, batch_of, calibrated, forward

READING = ("coupled", "local", "global")
OTHERS = [pytest.param(mode, marks=pytest.mark.long) for mode in ("local", "global", "uniform", "entropy")]
MODES = ["coupled", "random", *OTHERS]
NOTHING = {"gamma_mean": 1.0, "boosted_share": 0.0}
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -2.0])


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


def measured(credit, model, batch, mask):
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    draws = torch.Generator().manual_seed(0)
    return credit.gamma(torch.rand(mask.shape, generator=draws), draws)


@pytest.mark.parametrize("mode", MODES)
def test_a_first_batch_without_a_response(model, mode):
    """Nothing to calibrate on: gamma is 1, and the next batch is calibrated on, as if it were the first."""
    batch, mask = batch_of()
    credit = rk.RhythmCredit(model, replace(SETTINGS, mode=mode))
    for nothing in (torch.zeros_like(mask), torch.zeros_like(mask[:, -9:])):  # over all tokens, and over the last ones
        assert credit.calibration_due(0) == (mode in READING)
        assert credit.calibrate([{**batch, "response_mask": nothing}]) is None
        assert torch.equal(measured(credit, model, batch, nothing), torch.ones(nothing.shape))
        assert torch.equal(credit.shape(ADVANTAGES), ADVANTAGES[:, None].expand(nothing.shape))
        assert credit.statistics() == NOTHING
    assert credit.calibration_due(1) == (mode in READING)
    credit.calibrate([{**batch, "response_mask": mask}])
    gamma = measured(credit, model, batch, mask)
    assert torch.equal(gamma, measured(calibrated(model, mode=mode), model, batch, mask))
    assert (gamma > 1).any() == (mode != "uniform")


def test_a_calibration_without_a_response_leaves_the_groups(model):
    """By forwards of the caller's own too; the next batch is asked for."""
    batch, mask = batch_of()
    credit = calibrated(model, regroup_steps=2)
    groups = credit.groups
    assert [credit.calibration_due(step) for step in (1, 2)] == [False, True]
    assert credit.calibrate([{**batch, "response_mask": torch.zeros_like(mask)}]) is groups
    with credit.calibrating(torch.zeros_like(mask)):
        forward(model, batch)
    assert credit.groups is groups and credit.calibration_due(3)
    packed, _ = packed_batch()
    assert credit.calibrate([{**packed, "response_mask": torch.zeros(1, 84, dtype=torch.bool)}]) is groups
    with pytest.raises(ValueError, match="got no response token"):
        credit.calibrate([])  # a mistake, and no batch


def test_a_response_before_any_calibration_is_an_error(model):
    """Neutral is what cannot be otherwise; a credit that was forgotten is not."""
    batch, mask = batch_of()
    credit = rk.RhythmCredit(model, SETTINGS)
    credit.calibrate([{**batch, "response_mask": torch.zeros_like(mask)}])
    with pytest.raises(RuntimeError, match="needs head groups"), credit.measuring(mask):
        forward(model, batch)


@pytest.mark.parametrize("mode", MODES)
def test_one_token_and_none_among_others(model, mode):
    """A row without a response has gamma 1 and changes no other's; that of one token has no later one to look at it."""
    batch, mask = batch_of()
    mask[1:3] = False
    mask[2, 40] = True
    credit = calibrated(model, mode=mode)
    gamma = measured(credit, model, batch, mask)
    assert (gamma[1] == 1).all() and (gamma[2, ~mask[2]] == 1).all()
    of_one = {"coupled": 1.0, "global": 1.0, "uniform": 1.0}.get(mode, 1.5)  # the largest of one is that one
    assert float(gamma[2, 40]) == of_one
    alone = calibrated(model, mode=mode)
    alone._groups = credit.groups
    rows = [0, 2, 3]
    again = measured(alone, model, {name: x[rows] for name, x in batch.items()}, mask[rows])
    if mode in READING:  # the others choose by draws and entropies, which are of places in the batch
        assert torch.equal(again, gamma[rows])
    assert all(map(torch.isfinite, map(torch.tensor, credit.statistics().values())))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_gives_nan(mode):
    """Gamma is 1 in a row that cannot be measured, and finite in the others; the statistics say that there was one."""
    model, (batch, mask) = tiny_model("qwen3"), batch_of()
    credit = calibrated(model, mode=mode)
    once = measured(credit, model, batch, mask)
    token = batch["input_ids"][2, 40]
    alone = ~(batch["input_ids"] == token).any(1)
    assert alone.any() and not alone[2]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
        with credit.measuring(mask):
            logits = forward(model, batch)
    entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()
    gamma = credit.gamma(entropy, torch.Generator().manual_seed(0))
    assert torch.isfinite(gamma).all() and torch.isfinite(credit.shape(ADVANTAGES)).all()
    if mode in (*READING, "entropy"):
        assert (gamma[2] == 1).all()
    if mode in READING:
        assert torch.equal(gamma[alone], once[alone])
        assert credit.statistics()["waad_mean"] != credit.statistics()["waad_mean"]

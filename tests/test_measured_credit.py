"""`RhythmCredit` against the probe and the functions that it is made of."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels.measured_credit import GROUPS_FILE, NEAR_CERTAIN

from .probe.probe_models import padded_batch, tiny_model

SETTINGS = rk.RhythmSettings(window=4, horizon=(2, 8), layers=[1, 2])
PROMPT = 20
BASELINES = ("uniform", "random", "entropy")


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


def batch_of(holes: bool = False):
    """A padded batch and the `(B, T)` mask of its responses."""
    batch = padded_batch()
    mask = batch["attention_mask"].bool().clone()
    mask[:, :PROMPT] = False
    if holes:
        mask[:, 30:33] = False
    return batch, mask


def calibrated(model, settings=SETTINGS, **changed):
    credit = rk.RhythmCredit(model, replace(settings, **changed))
    batch, mask = batch_of()
    credit.calibrate([{**batch, "response_mask": mask}])
    return credit


def forward(model, batch, rows=slice(None)):
    return model(**{name: x[rows] for name, x in batch.items()}, use_cache=False).logits


@pytest.mark.parametrize("mode", ["local", "global", "coupled"])
@pytest.mark.parametrize("split", [(4,), (1, 3), (2, 1, 1)])
def test_it_is_probe_and_credit(model, mode, split):
    """Bit for bit, in one forward or in several that split the batch; the logits are those without it."""
    credit = calibrated(model, mode=mode)
    batch, mask = batch_of()
    parts = list(torch.arange(4).split(split))
    with torch.no_grad():
        plain = [forward(model, batch, rows) for rows in parts]
        with credit.measuring(mask):
            found = [forward(model, batch, rows) for rows in parts]
        probes = []
        for rows in parts:
            with rk.RhythmProbe(model, credit.groups, 4, (2, 8), mask[rows]) as probe:
                forward(model, batch, rows)
            probes.append(probe)
    assert all(map(torch.equal, found, plain))
    waad, fai = (torch.cat([getattr(probe, name) for probe in probes]) for name in ("waad", "fai"))
    assert torch.equal(credit.waad, waad)
    assert torch.equal(credit.fai, fai)
    gamma = rk.rhythm_credit(waad, fai, mask, mode)
    assert (gamma > 1).any()
    assert torch.equal(credit.gamma(), gamma)
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    assert torch.equal(credit.shape(advantages), rk.shape_advantages(advantages, gamma))
    assert torch.equal(credit.shape(advantages, gamma + 1), rk.shape_advantages(advantages, gamma + 1))


def test_a_mask_of_the_responses_alone(model):
    """Trainers keep responses without their prompts: all that is made of such a mask has its shape."""
    credit = calibrated(model)
    batch, mask = batch_of()
    results = []
    for given in (mask, mask[:, PROMPT:], mask[:, PROMPT:].int()):
        with torch.no_grad(), credit.measuring(given):
            forward(model, batch)
        results.append((credit.waad, credit.fai, credit.gamma()))
    for short in results[1:]:
        for found, whole in zip(short, results[0]):
            assert torch.equal(found, whole[:, PROMPT:])


def test_calibration_is_that_of_head_groups(model):
    batch, mask = batch_of()
    whole = calibrated(model)
    expected = rk.head_groups(model, [{**batch, "response_mask": mask}], layers=[1, 2])
    assert whole.groups == expected
    for given in (mask, mask[:, PROMPT:]):
        credit = rk.RhythmCredit(model, SETTINGS)
        with credit.calibrating(given):
            forward(model, batch, slice(0, 3))
            forward(model, batch, slice(3, 4))
        assert credit.groups == expected
        assert credit.groups.provenance["calibration"] == expected.provenance["calibration"]


def test_calibration_leaves_the_mode_of_the_model(model):
    model.train()
    try:
        credit = rk.RhythmCredit(model, SETTINGS)
        batch, mask = batch_of()
        with credit.calibrating(mask):
            assert not model.training
            assert not forward(model, batch).requires_grad
        assert model.training
    finally:
        model.eval()


def test_gradients_go_through(model):
    credit = calibrated(model)
    batch, mask = batch_of()
    gradients = []
    for block in (credit.measuring(mask), torch.enable_grad()):
        model.zero_grad()
        with block:
            logits = forward(model, batch)
        logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_tokens_of_tools_get_no_credit(model):
    """The mask may be known better when gamma is made; measures are of the response from first to last."""
    credit = calibrated(model)
    batch, mask = batch_of()
    _, holes = batch_of(holes=True)
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    gamma = credit.gamma(response_mask=holes)
    assert torch.equal(gamma, rk.rhythm_credit(credit.waad, credit.fai, holes))
    assert (gamma[:, 30:33] == 1).all()
    with pytest.raises(ValueError, match=r"response_mask must be of shape \(4, 72\) .*, got \(4, 52\)"):
        credit.gamma(response_mask=holes[:, PROMPT:])


@pytest.mark.parametrize("mode", BASELINES)
def test_baselines_measure_nothing(model, mode):
    credit = rk.RhythmCredit(model, replace(SETTINGS, mode=mode, regroup_steps=1))
    _, mask = batch_of()
    assert not credit.calibration_due(0)
    assert credit.calibrate([]) is None
    with credit.measuring(mask):
        pass  # no forward is needed
    entropy = torch.rand(mask.shape)
    gamma = credit.gamma(entropy, torch.Generator().manual_seed(5))
    zeros = torch.zeros(mask.shape)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(gamma, rk.rhythm_credit(zeros, zeros, mask, mode, entropy=entropy, generator=generator))
    assert (gamma == 1).all() == (mode == "uniform")
    statistics = credit.statistics()
    assert {"waad_mean", "fai_mean", "seconds"}.isdisjoint(statistics)
    with pytest.raises(RuntimeError, match=f"mode '{mode}' reads no attention"):
        _ = credit.waad


def test_the_sign_is_that_of_the_settings(model):
    batch, mask = batch_of()
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    for sign in ("both", "positive", "negative"):
        credit = calibrated(model, sign=sign)
        with torch.no_grad(), credit.measuring(mask):
            forward(model, batch)
        assert torch.equal(credit.shape(advantages), rk.shape_advantages(advantages, credit.gamma(), sign))


def test_statistics_by_hand(model):
    """Four tokens in two responses, of which `top` chooses those of most entropy; the fifth place is padding."""
    credit = rk.RhythmCredit(model, replace(SETTINGS, mode="entropy", top=0.5, gamma_amp=3.0))
    mask = torch.tensor([[True, True, False], [True, True, False]])
    with credit.measuring(mask):
        pass
    entropy = torch.tensor([[1.0, 0.2, math.nan], [NEAR_CERTAIN / 2, NEAR_CERTAIN / 4, 9.0]])
    credit.gamma(entropy.where(mask, 0.0))
    credit._batch.entropy = entropy  # what lies outside of the responses counts for nothing
    assert credit.statistics() == pytest.approx(
        {
            "gamma_mean": 2.0,
            "boosted_share": 0.5,
            "certain_share": 0.5,
            "bonus_certain_share": 0.5,
            "bonus_entropy_ratio": (1.0 + NEAR_CERTAIN / 2) / 2 / ((1.2 + NEAR_CERTAIN * 3 / 4) / 4),
        }
    )


def test_statistics_of_measures_and_of_several_processes(model):
    credit = calibrated(model)
    batch, mask = batch_of()
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    gamma = credit.gamma()
    statistics = credit.statistics()
    assert statistics.pop("seconds") > 0
    expected = {"gamma_mean": gamma, "boosted_share": gamma != 1, "waad_mean": credit.waad, "fai_mean": credit.fai}
    assert statistics == pytest.approx({name: x[mask].double().mean().item() for name, x in expected.items()})
    again = credit.statistics(lambda sums: sums * 2)  # two processes with the same batch
    again.pop("seconds")
    assert again == pytest.approx(statistics)


def test_gamma_of_one_has_no_bonus_to_speak_of(model):
    credit = rk.RhythmCredit(model, replace(SETTINGS, mode="uniform"))
    with credit.measuring(torch.ones(1, 3)):
        pass
    credit.gamma(torch.zeros(1, 3))
    assert credit.statistics() == {"gamma_mean": 1.0, "boosted_share": 0.0, "certain_share": 1.0}


def test_when_to_calibrate(model):
    credit = rk.RhythmCredit(model, replace(SETTINGS, regroup_steps=3))
    due = []
    for step in range(8):
        if credit.calibration_due(step):
            batch, mask = batch_of()
            credit.calibrate([{**batch, "response_mask": mask}])
            due.append(step)
    assert due == [0, 3, 6]
    once = calibrated(model)
    assert not any(map(once.calibration_due, range(1000)))


def test_groups_are_saved_and_gone_on_with(model, tmp_path):
    """At the step where the next calibration would have been, too."""
    credit = rk.RhythmCredit(model, replace(SETTINGS, regroup_steps=3))
    credit.save(tmp_path)
    assert not (tmp_path / GROUPS_FILE).exists()
    assert credit.calibration_due(4)
    batch, mask = batch_of()
    credit.calibrate([{**batch, "response_mask": mask}])
    credit.save(tmp_path / "new")
    again = rk.RhythmCredit(model, credit.settings)
    again.load(tmp_path / "new")
    assert again.groups == credit.groups
    assert [again.calibration_due(step) for step in (5, 6, 7)] == [False, False, True]
    # As a file of groups it says nothing of the steps of another run.
    other = rk.RhythmCredit(model, replace(credit.settings, groups=tmp_path / "new" / GROUPS_FILE))
    assert other.groups == credit.groups
    assert other.calibration_due(3)
    baseline = rk.RhythmCredit(model, replace(SETTINGS, mode="uniform"))
    baseline.load(tmp_path / "nowhere")
    assert baseline.groups is None


def test_groups_of_another_model_are_refused(model, tmp_path):
    content = {"local": [[1, 0]], "global": [[2, 9]]}
    (tmp_path / GROUPS_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="head 9 of layer 2"):
        rk.RhythmCredit(model, replace(SETTINGS, groups=tmp_path / GROUPS_FILE))
    credit = rk.RhythmCredit(model, SETTINGS)
    with pytest.raises(ValueError, match="head 9 of layer 2"):
        credit.load(tmp_path)
    with pytest.raises(TypeError, match="groups must be HeadGroups, got dict"):
        credit.groups = content
    with pytest.raises(ValueError, match="layer 7"):
        rk.RhythmCredit(model, replace(SETTINGS, layers=[7]))
    with pytest.raises(TypeError, match="settings must be a RhythmSettings, got dict"):
        rk.RhythmCredit(model, {"mode": "coupled"})


def test_what_was_not_done_is_said(model):
    """A credit that silently does not happen would be the worst fault."""
    batch, mask = batch_of()
    fresh = rk.RhythmCredit(model, SETTINGS)
    with pytest.raises(RuntimeError, match="mode 'coupled' needs head groups: call calibrate"), fresh.measuring(mask):
        forward(model, batch)
    credit = calibrated(model)
    for ask in (credit.gamma, lambda: credit.shape(torch.ones(4)), credit.statistics, lambda: credit.fai):
        with pytest.raises(RuntimeError, match="there is no measured batch"):
            ask()
    message = r"response_mask must cover .*, got shape \(4, 72\) where they had 0 rows"
    with pytest.raises(RuntimeError, match=message), credit.measuring(mask):
        pass  # the forward went elsewhere
    with pytest.raises(RuntimeError, match="where they had 3 rows"), torch.no_grad(), credit.measuring(mask):
        forward(model, batch, slice(0, 3))
    with pytest.raises(RuntimeError, match="there is no measured batch"):
        credit.gamma()
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    with pytest.raises(RuntimeError, match="there is no gamma yet"):
        credit.statistics()
    with pytest.raises(ZeroDivisionError), credit.measuring(mask):
        _ = 1 / 0
    with pytest.raises(RuntimeError, match="there is no measured batch"):
        credit.gamma()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[1]], TypeError, "response_mask must be a torch.Tensor, got list"),
        (torch.ones(4), ValueError, r"response_mask must be \(B, T\), got shape \(4,\)"),
        (torch.ones(4, 73), ValueError, r"response_mask must be no longer than the 72 tokens .*, got shape \(4, 73\)"),
    ],
)
def test_wrong_masks_are_named(model, mask, error, message):
    credit = calibrated(model)
    batch, _ = batch_of()
    with pytest.raises(error, match=message), torch.no_grad(), credit.measuring(mask):
        forward(model, batch)

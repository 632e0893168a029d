"""`RhythmCredit` against the probe and the functions that it is made of."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels.measured_credit import GROUPS_FILE, NEAR_CERTAIN

from .probe.probe_models import packed_batch, padded_batch, tiny_model

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


def measure_in_halves(credit, mask, batch):
    with credit.measuring(mask):
        forward(credit.model, batch, slice(0, 2))
        forward(credit.model, batch, slice(2, 4))


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
    credit.gamma(entropy)  # what lies outside of the responses counts for nothing
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
    with pytest.raises(RuntimeError, match="no forward of the model ran in this block"), credit.measuring(mask):
        pass  # the forward went elsewhere
    with pytest.raises(RuntimeError, match="for 3 batch rows"), torch.no_grad(), credit.measuring(mask):
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


def test_packed_sequences_are_responses_of_their_own(model):
    """Told by a measured forward; where none is measured, by `cu_seqlens`."""
    batch, bounds = packed_batch()
    mask = torch.ones(1, 84, dtype=torch.bool)
    for _, start, end in bounds:
        mask[:, start : min(start + 5, end)] = False
    offsets = torch.tensor([0, *(end for _, _, end in bounds)], dtype=torch.int32)
    entropy = torch.rand(1, 84)
    for mode in ("coupled", "entropy"):
        credit = calibrated(model, mode=mode)
        with torch.no_grad(), credit.measuring(mask):
            forward(model, batch)
        gamma = credit.gamma(entropy, cu_seqlens=offsets if mode == "entropy" else None)
        measures = (credit.waad, credit.fai) if mode == "coupled" else (torch.zeros(1, 84),) * 2
        for _, start, end in bounds:
            alone = [x[:, start:end] for x in (*measures, mask)]
            expected = rk.rhythm_credit(*alone, mode, entropy=entropy[:, start:end])
            assert torch.equal(gamma[:, start:end], expected)
        assert not torch.equal(gamma, rk.rhythm_credit(*measures, mask, mode, entropy=entropy))
        assert torch.equal(credit.gamma(entropy, cu_seqlens=offsets), gamma)
    assert credit.statistics()["boosted_share"] == pytest.approx((gamma > 1)[mask].float().mean().item())
    credit = calibrated(model)
    message = r"response_mask must have all 84 tokens of packed batch rows, got shape \(1, 40\)"
    with pytest.raises(ValueError, match=message), torch.no_grad(), credit.measuring(mask[:, 44:]):
        forward(model, batch)
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    with pytest.raises(ValueError, match=r"cu_seqlens must be \(S \+ 1,\), got shape \(1,\)"):
        credit.gamma(cu_seqlens=torch.zeros(1, dtype=torch.int32))


def test_calibration_takes_masks_of_the_responses_alone(model):
    batch, mask = batch_of()
    credit = rk.RhythmCredit(model, SETTINGS)
    credit.calibrate([{**batch, "response_mask": mask[:, PROMPT:]}])
    assert credit.groups == calibrated(model).groups
    idle = rk.RhythmCredit(model, replace(SETTINGS, mode="uniform"))
    with idle.calibrating(mask):
        pass
    assert idle.groups is None


def test_what_a_mode_chooses_by_goes_through_shape(model):
    _, mask = batch_of()
    advantages, entropy = torch.tensor([1.0, -1.0, 0.5, -2.0]), torch.rand(mask.shape)
    for mode in ("entropy", "random"):
        credit = rk.RhythmCredit(model, replace(SETTINGS, mode=mode))
        with credit.measuring(mask):
            pass
        given = {"entropy": entropy, "generator": torch.Generator().manual_seed(1)}
        before = torch.get_rng_state()
        shaped = credit.shape(advantages, **given)
        assert torch.equal(torch.get_rng_state(), before)
        given["generator"] = torch.Generator().manual_seed(1)
        assert torch.equal(shaped, rk.shape_advantages(advantages, credit.gamma(**given)))


def test_an_entropy_keeps_no_graph(model):
    _, mask = batch_of()
    credit = rk.RhythmCredit(model, replace(SETTINGS, mode="entropy"))
    with credit.measuring(mask):
        pass
    logits = torch.rand(mask.shape, requires_grad=True)
    entropy = logits * 2
    saved = weakref.ref(entropy)
    credit.gamma(entropy)
    assert not any(x.requires_grad for x in vars(credit._batch).values() if isinstance(x, torch.Tensor))
    del entropy
    assert saved() is None


def test_masks_of_any_type_are_counted_alike(model):
    """70,000 tokens are beyond float16, and 1,019 are not a number of bfloat16."""

    def in_place(sums):  # as torch.distributed.all_reduce works, here of two processes
        sums.mul_(2)

    credit = rk.RhythmCredit(model, replace(SETTINGS, mode="uniform"))
    for shape, dtype in (((70, 1000), torch.float16), ((1, 1019), torch.bfloat16), ((3, 5), torch.int64)):
        with credit.measuring(torch.ones(shape, dtype=dtype)):
            pass
        credit.gamma()
        assert credit.statistics() == {"gamma_mean": 1.0, "boosted_share": 0.0}
        assert credit.statistics(in_place) == {"gamma_mean": 1.0, "boosted_share": 0.0}
    with credit.measuring(torch.zeros(2, 3)):
        pass
    credit.gamma()
    assert credit.statistics() == {"gamma_mean": 1.0, "boosted_share": 0.0}


def test_settings_may_change_between_batches(model, tmp_path):
    """The batch that was measured keeps those that it was measured by."""
    batch, mask = batch_of()
    credit = calibrated(model)
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    gamma = credit.gamma()
    credit.settings = replace(SETTINGS, mode="local", gamma_amp=3.0)
    assert torch.equal(credit.gamma(), gamma)
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    assert credit.gamma().max() == 3.0
    credit.settings = replace(SETTINGS, mode="uniform")
    with credit.measuring(mask):
        pass
    credit.settings = SETTINGS
    assert (credit.gamma() == 1).all()
    groups = rk.HeadGroups([(1, 0)], [(2, 3)])
    credit.settings = replace(SETTINGS, groups=groups)
    assert credit.groups == groups
    for wrong in (replace(SETTINGS, layers=[7]), replace(SETTINGS, groups=tmp_path / "absent.json")):
        with pytest.raises(ValueError, match=r"layers|groups"):
            credit.settings = wrong
        assert credit.settings.groups == groups


def test_a_better_known_mask_is_part_of_the_measured_one(model):
    batch, mask = batch_of()
    credit = calibrated(model)
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    wider = mask.clone()
    wider[:, PROMPT - 2] = True
    with pytest.raises(ValueError, match="response_mask must be True only where that of measuring is, got 4 other"):
        credit.gamma(response_mask=wider)
    with pytest.raises(ValueError, match=r"entropy must have the shape of the response mask, \(4, 72\), got \(4, 71\)"):
        credit.gamma(torch.zeros(4, 71))
    _, holes = batch_of(holes=True)
    gamma = credit.gamma()
    credit.gamma(response_mask=holes)
    assert torch.equal(credit.gamma(), gamma)


@pytest.mark.parametrize("wrong", ["a hole in attention_mask", "padding in response_mask"])
def test_what_only_the_device_knows_is_raised_later(model, wrong, monkeypatch):
    """As on a GPU, where the host does not wait: gamma is 1, and statistics or the next block says why."""
    from rhythm_kernels.probe import checks, forward_sequences, inputs, layer_window

    for module in (checks, forward_sequences, inputs, layer_window):
        monkeypatch.setattr(module, "reads_now", lambda device: False, raising=False)
    monkeypatch.setattr(checks.Pending, "known", lambda self, wait: wait)
    batch, mask = batch_of()
    credit = calibrated(model)
    if wrong == "padding in response_mask":
        mask[:] = True
    else:
        batch["attention_mask"][1, 40] = mask[1, 40] = 0
    with torch.no_grad(), credit.measuring(mask):
        forward(model, batch)
    assert (credit.gamma() == 1).all()
    with pytest.raises(ValueError, match=f"{wrong.split()[-1]} must .*found on the device after"):
        credit.statistics()


def test_groups_saved_without_a_step_count_from_the_next(model, tmp_path):
    rk.HeadGroups([(1, 0)], [(2, 3)]).save(tmp_path / GROUPS_FILE)
    for provenance in (None, {"step": "x"}):
        content = {"local": [[1, 0]], "global": [[2, 3]], "provenance": provenance}
        (tmp_path / GROUPS_FILE).write_text(json.dumps(content))
        credit = rk.RhythmCredit(model, replace(SETTINGS, regroup_steps=10))
        credit.load(tmp_path)
        assert [credit.calibration_due(step) for step in (150, 159, 160)] == [False, False, True]


def test_the_gamma_of_an_earlier_step_is_not_taken(model):
    """A step whose batch was not measured: its tokens are others."""
    credit, (batch, mask) = calibrated(model), batch_of()
    assert not credit.calibration_due(3)
    with credit.measuring(mask):
        forward(model, batch)
    gamma = credit.gamma()
    assert not credit.calibration_due(3)
    shaped = credit.shape(torch.ones(4))
    assert not credit.calibration_due(4)
    for call in (lambda: credit.shape(torch.ones(4)), credit.gamma, credit.statistics):
        with pytest.raises(RuntimeError, match="the measured batch is of step 3, not of step 4: measure the batch of"):
            call()
    assert torch.equal(credit.shape(torch.ones(4), gamma), shaped)


def test_padding_gets_no_credit(model):
    """Such a mask is wrong: of responses that begin elsewhere in each batch row, shifted, or of `(B, C)`
    where the padding is on the right. Padding would take the place of tokens among the chosen ones."""
    batch, mask = batch_of()
    credit = calibrated(model)
    everything = torch.ones_like(mask)
    for wrong in (everything, everything[:, -20:], mask.roll(1, 1)):
        with pytest.raises(ValueError, match="response_mask must be True only at tokens that attention"):
            measure_in_halves(credit, wrong, batch)
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

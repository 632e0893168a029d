"""ms-swift itself, trained on a CPU in this process: for the row `ms-swift` of tests/matrix.sh, which names this file.

Held: gamma is that of full eager maps, with gamma 1 it is ms-swift bit for bit, credit changes what is learned, and
what credit costs is the calibration's forwards alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import swift.rlhf_trainers
import torch
from swift.arguments.sft_args import SftArguments
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers import GRPOTrainer

from rhythm_kernels import HeadGroups
from rhythm_kernels.integrations.ms_swift import RhythmGRPOTrainer

from . import ms_swift_standin as standin
from .ms_swift_toy import CREDIT, FedFromMaps, losses, train, weights, write_toy


class Ours(RhythmGRPOTrainer):
    """With the gammas of every micro-batch kept."""

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        super()._postprocess_batch(samples, batch_encoded_inputs)
        self.gammas += [encoded["grpo_batch"].rhythm_gamma for encoded in batch_encoded_inputs]


class Holes:
    """Responses of which a tool wrote every other pair of tokens, as in several turns."""

    def _generate_completions(self, samples):
        samples = super()._generate_completions(samples)
        for sample in samples:
            ids = sample.response_token_ids
            flat = ids[0] if ids and isinstance(ids[0], list) else ids
            sample.response_token_ids = [flat]
            sample.response_loss_mask = [[int(t % 4 < 2) for t in range(len(flat))]]
        return samples

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        super()._postprocess_batch(samples, batch_encoded_inputs)
        masks = torch.cat([encoded["grpo_batch"].completion_mask for encoded in batch_encoded_inputs]).int()
        self.turns = (masks.diff(dim=1) == 1).sum(1).max()


class OursWithHoles(Holes, Ours):
    pass


class FedFromMapsWithHoles(Holes, FedFromMaps):
    pass


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def credit(monkeypatch):
    def set_(*settings):
        monkeypatch.setenv("RHYTHM_CREDIT", ",".join([CREDIT, *settings]))

    set_()
    return set_


@pytest.fixture
def packing_anywhere(monkeypatch):
    """ms-swift packs where flash attention is; sdpa keeps packed sequences apart as well, by their positions."""
    monkeypatch.setattr(SftArguments, "_check_padding_free", lambda self: None)


LORA = {"tuner_type": "lora", "lora_rank": 4, "target_modules": "all-linear"}
SCHEDULES = {
    "one micro-batch": {},
    "padded on the left": {"padding_side": "left"},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "off-policy": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "checkpointed": {"gradient_checkpointing": True},
    "reference model": {"beta": 0.1},
    "adapters and reference": {**LORA, "lora_dropout": 0, "beta": 0.1, "learning_rate": 0.1, "max_steps": 3},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "kl in reward": {"advantage_estimator": "rloo", "beta": 0.1},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gamma_is_that_of_full_maps(toy, tmp_path, credit, schedule):
    changed = SCHEDULES[schedule]
    oracle = train(FedFromMaps, toy, tmp_path / "oracle", **changed)
    ours = train(Ours, toy, tmp_path / "ours", **changed)
    _hold_equal(ours, oracle)


def test_packed(toy, tmp_path, credit, packing_anywhere):
    changed = {"padding_free": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    oracle = train(FedFromMaps, toy, tmp_path / "oracle", **changed)
    ours = train(Ours, toy, tmp_path / "ours", **changed)
    _hold_equal(ours, oracle)


@pytest.mark.parametrize("packed", [False, True])
def test_only_what_the_model_wrote_gets_credit(toy, tmp_path, credit, packing_anywhere, packed):
    oracle = train(FedFromMapsWithHoles, toy, tmp_path / "oracle", padding_free=packed)
    ours = train(OursWithHoles, toy, tmp_path / "ours", padding_free=packed)
    assert ours.turns > 2
    _hold_equal(ours, oracle)


@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_sign(toy, tmp_path, credit, monkeypatch, sign):
    credit(f"sign={sign}")
    monkeypatch.setattr(FedFromMaps, "sign", sign)
    _hold_equal(train(Ours, toy, tmp_path / "ours"), train(FedFromMaps, toy, tmp_path / "oracle"))


def _hold_equal(ours, oracle):
    assert (ours.rhythm.groups.local, ours.rhythm.groups.global_) == (oracle.groups.local, oracle.groups.global_)
    assert len(ours.gammas) == len(oracle.gammas) > 1
    for gamma, expected in zip(ours.gammas, oracle.gammas):
        torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-6)
        assert gamma.unique().numel() > 1
    torch.testing.assert_close(losses(ours), losses(oracle), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=1e-5)


EVALUATION = {"split_dataset_ratio": 0.25, "per_device_eval_batch_size": 8}
CHORD = {
    "chord_sft_per_device_train_batch_size": 2,
    "chord_mu_warmup_steps": 0,
    "chord_mu_decay_steps": 4,
    "chord_mu_peak": 0.5,
    "chord_mu_valley": 0.1,
}
# With dropout, which a pass of our own would draw from.
PLAIN = {
    **{loss: {"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")},
    "sequence cispo": {"loss_type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "sequence_token": {"importance_sampling_level": "sequence_token", "num_iterations": 2},
    "adapters with dropout": {**LORA, "lora_dropout": 0.3, "beta": 0.1, "learning_rate": 0.1},
    "accumulated": SCHEDULES["accumulated"],
    "evaluated": {**EVALUATION, "eval_strategy": "steps", "eval_steps": 1},
    "truncated left out": {"overlong_filter": True, "max_completion_length": 16},
    "sampled again": {"dynamic_sample": True, "loss_type": "dapo"},
    "with expert data": {"chord_sft_dataset": "experts.jsonl", **CHORD},
}


@pytest.mark.parametrize("case", PLAIN)
def test_gamma_of_one_is_ms_swift_bit_for_bit(toy, tmp_path, credit, case):
    plain = train(GRPOTrainer, toy, tmp_path / "plain", **PLAIN[case])
    credit("gamma_amp=1")
    ours = train(Ours, toy, tmp_path / "ours", **PLAIN[case])
    assert losses(ours) == losses(plain)
    assert len(losses(ours)) == 2
    assert torch.equal(weights(ours), weights(plain))
    assert ours.forwards == plain.forwards + 1  # the calibration, by the first micro-batch
    credit()
    credited = train(Ours, toy, tmp_path / "credited", **PLAIN[case])
    assert credited._seen
    assert not torch.equal(weights(credited), weights(plain))


@pytest.mark.parametrize("mode", ["local", "global", "random", "entropy", "uniform"])
@pytest.mark.parametrize("packed", [False, True])
def test_modes(toy, tmp_path, credit, packing_anywhere, mode, packed):
    plain = train(GRPOTrainer, toy, tmp_path / "plain", padding_free=packed)
    amplitude = "1.5" if mode == "uniform" else "1"
    credit(f"mode={mode}", f"gamma_amp={amplitude}")
    ours = train(Ours, toy, tmp_path / "ours", padding_free=packed)
    assert torch.equal(weights(ours), weights(plain))
    assert ours.forwards == plain.forwards + (mode in ("local", "global"))
    if mode == "uniform":
        return
    credit(f"mode={mode}")
    first, again = (train(Ours, toy, tmp_path / word, padding_free=packed) for word in ("first", "again"))
    assert (weights(first) - weights(plain)).abs().max() > 1e-3
    assert torch.equal(weights(first), weights(again))
    entry = first.state.log_history[0]
    assert 0.3 < entry["rhythm/boosted_share"] < 0.6
    assert ("rhythm/bonus_entropy_ratio" in entry) == (mode == "entropy")


REFUSED = {
    "real": ({"loss_type": "real"}, "loss_type must be another than 'real'"),
    "sequence": ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be 'token' or"),
    "sequence sapo": ({"importance_sampling_level": "sequence", "loss_type": "sapo"}, "importance_sampling_level must"),
    "rlsd": ({"advantage_reweight": "rlsd"}, "advantage_reweight must be None"),
    "sdar": ({"sdar_loss_coef": 0.1}, "sdar_loss_coef must be 0.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(toy, tmp_path, credit, case):
    changed, said = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{said}.*, got"):
        train(Ours, toy, tmp_path, **changed)
    if case in ("sequence", "sequence sapo"):
        credit("mode=uniform")
        train(Ours, toy, tmp_path, **changed)


def test_a_teacher_is_refused(toy, tmp_path, credit):
    with pytest.raises(ValueError, match=r"^teacher_model must be left out .*, got one"):
        train(Ours, toy, tmp_path, teacher_model=toy / "model", teacher_model_type="qwen3")


def test_a_wrong_setting_is_refused(toy, tmp_path, credit):
    credit("gamma=2")
    with pytest.raises(ValueError, match=r"^RHYTHM_CREDIT .*gamma=2"):
        train(Ours, toy, tmp_path)


class Blind(Ours):
    """A loss that reads one advantage a response."""

    def _compute_loss(self, model, model_inputs, grpo_batch, origin_data=None):
        mask = grpo_batch.completion_mask
        mean = (grpo_batch.advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        shaped, grpo_batch.advantages = grpo_batch.advantages, mean.expand_as(mask)
        loss = super()._compute_loss(model, model_inputs, grpo_batch, origin_data)
        grpo_batch.advantages = shaped
        return loss


class Skipping(Ours):
    """An ms-swift that brings its old log-probs from elsewhere."""

    def _get_per_token_logps_and_entropies(self, model, model_inputs, grpo_batch, **kwargs):
        if not torch.is_grad_enabled():
            return torch.zeros(grpo_batch.completion_mask.shape), None
        return super()._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, **kwargs)


@pytest.mark.parametrize(("kind", "said"), [(Blind, "does not see which tokens"), (Skipping, "no old-log-prob pass")])
def test_credit_that_does_not_happen_stops_the_first_step(toy, tmp_path, credit, kind, said):
    with pytest.raises(RuntimeError, match=said):
        train(kind, toy, tmp_path)


def test_groups_are_saved_and_resumed(toy, tmp_path, credit):
    first = train(Ours, toy, tmp_path / "first", save_strategy="steps", save_steps=1)
    folder = tmp_path / "first" / "checkpoint-1"
    saved = HeadGroups.load(folder / "rhythm_groups.json")
    assert saved == first.rhythm.groups
    other = HeadGroups(saved.global_, saved.local)  # not those that a calibration would find
    content = json.loads((folder / "rhythm_groups.json").read_text())
    content["local"], content["global"] = content["global"], content["local"]
    (folder / "rhythm_groups.json").write_text(json.dumps(content))
    resumed = train(Ours, toy, tmp_path / "resumed", resume_from_checkpoint=folder, max_steps=3)
    assert resumed.rhythm.groups == other
    assert [entry["step"] for entry in resumed.state.log_history if "rhythm/gamma_mean" in entry][-2:] == [2, 3]
    assert not any("rhythm/calibration_seconds" in e for e in resumed.state.log_history if e["step"] > 1)


@pytest.mark.parametrize("name", standin.SIGNATURES)
def test_the_stand_in_of_the_default_tests_is_like_ms_swift(name):
    owner, method = name.split(".")
    ours, theirs = (inspect.unwrap(getattr(getattr(where, owner), method)) for where in (standin, swift.rlhf_trainers))
    assert _parameters(ours) == _parameters(theirs)


def test_what_the_adapter_reads_is_there(toy, tmp_path, credit):
    trainer = train(Ours, toy, tmp_path)
    assert set(vars(standin.arguments())) <= set(dir(trainer.args))
    fields = {field.name for field in dataclasses.fields(GRPOBatch)}
    assert {field.name for field in dataclasses.fields(standin.GRPOBatch)} <= fields


def _parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

"""The ms-swift adapter over a stand-in of ms-swift; over the real one in the row `ms-swift` of tests/matrix.sh."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from rhythm_kernels import HeadGroups, reference
from rhythm_kernels.measured_credit import GROUPS_FILE

from . import ms_swift_standin as standin
from .ms_swift_maps import cases_of, gamma_of, groups_of, sequences
from .toy import build_model, eager_copy


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module, imported over the stand-in."""
    monkeypatch.setenv("RHYTHM_CREDIT", "window=4,horizon=2:8")
    standin.forget()
    for name, module in standin.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("rhythm_kernels.integrations.ms_swift")
    standin.forget()


@pytest.fixture
def make(adapter):
    def make_(kind=None, *, packed=False, multimodal=False, sequence_parallel=1, keywords=None, **changed):
        model = build_model().train()
        model.model_meta = SimpleNamespace(is_multimodal=multimodal)
        template = SimpleNamespace(padding_free=packed, sequence_parallel_size=sequence_parallel)
        kind = kind or adapter.RhythmGRPOTrainer
        return kind(model, args=standin.arguments(**changed), template=template, **(keywords or {}))

    return make_


def generation(trainer, packed=False, count=2):
    """What a generation batch becomes: micro-batches with old log-probs and advantages."""
    encoded = trainer._prepare_batch_inputs([standin.batch_of(packed) for _ in range(count)])
    trainer._postprocess_batch([], encoded)
    return encoded


def first_step(trainer):
    for one in generation(trainer):
        trainer.compute_loss(trainer.model, one)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gamma_is_that_of_full_maps(make, packed, beta):
    """Also where the model itself, its adapters off, makes the reference pass."""
    trainer = make(packed=packed, beta=beta)
    decoder = eager_copy(trainer.model)
    encoded = generation(trainer, packed)
    alone = [sequences(one, packed) for one in encoded]
    cases = [cases_of(decoder, one) for one in alone]
    groups = groups_of(cases[0])  # of the first micro-batch
    assert (trainer.rhythm.groups.local, trainer.rhythm.groups.global_) == (groups.local, groups.global_)
    plain = torch.linspace(-1, 1, 4)[:, None]
    for one, case, rows in zip(encoded, cases, alone):
        batch = one["grpo_batch"]
        expected = gamma_of(case, rows, groups, batch.completion_mask.shape[1])
        assert expected.unique().numel() > 1
        torch.testing.assert_close(batch.rhythm_gamma, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(batch.advantages, plain * expected)
    metrics = trainer._metrics["train"]
    assert len(metrics["rhythm/gamma_mean"]) == 2
    assert len(metrics["rhythm/calibration_seconds"]) == 1


def test_forwards_are_those_of_ms_swift_and_one_to_calibrate(make):
    counts = []
    for kind in (None, standin.GRPOTrainer):
        trainer = make(kind, beta=0.1)
        calls = []
        trainer.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        first_step(trainer)
        counts.append(len(calls))
    assert counts == [2 * 3 + 1, 2 * 3]


def test_sign_and_the_truncated_are_the_settings_and_the_arguments(make, monkeypatch):
    monkeypatch.setenv("RHYTHM_CREDIT", "window=4,horizon=2:8,sign=positive")
    trainer = make(overlong_filter=True)
    batch = generation(trainer)[0]["grpo_batch"]
    negative = torch.linspace(-1, 1, 4) < 0
    assert (batch.rhythm_gamma[0] == 1).all()  # cut off, hence not trained
    assert (batch.rhythm_gamma[1:] != 1).any(dim=1).all()
    assert (batch.advantages[negative] == torch.linspace(-1, 1, 4)[negative, None]).all()
    assert (batch.advantages[~negative] > torch.linspace(-1, 1, 4)[~negative, None]).any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mode", ["entropy", "random", "uniform"])
def test_modes_without_attention(make, monkeypatch, mode, packed):
    monkeypatch.setenv("RHYTHM_CREDIT", f"mode={mode}")
    trainer = make(packed=packed)
    batch = generation(trainer, packed)[0]["grpo_batch"]
    again = make(packed=packed)
    torch.manual_seed(0)
    inputs, other = standin.batch_of(packed)
    again._prepare_batch_inputs([(inputs, other)])
    assert trainer.rhythm.groups is None
    chosen = (batch.rhythm_gamma != 1).sum(1) / batch.completion_mask.sum(1)
    assert (batch.rhythm_gamma[~batch.completion_mask] == 1).all()
    if mode == "uniform":
        assert (chosen == 0).all() or (chosen == 1).all()
        return
    assert ((chosen > 0.25) & (chosen < 0.55)).all()
    assert ("rhythm/bonus_entropy_ratio" in trainer._metrics["train"]) == (mode == "entropy")
    if mode == "entropy":
        with torch.no_grad():
            found = standin.GRPOTrainer._get_per_token_logps_and_entropies(again, again.model, inputs, other, True)[1]
        nothing = torch.zeros(found.shape)
        expected = reference.rhythm_credit(nothing, nothing, other.completion_mask, mode="entropy", entropy=found)
        assert torch.equal(other.rhythm_gamma, expected)


def test_random_is_drawn_anew_for_each_micro_batch_and_repeats(make, monkeypatch):
    monkeypatch.setenv("RHYTHM_CREDIT", "mode=random")
    torch.manual_seed(0)
    sample = standin.batch_of(False)
    drawn = []
    for _ in range(2):
        trainer = make()
        encoded = trainer._prepare_batch_inputs([copy.deepcopy(sample), copy.deepcopy(sample)])
        drawn.append([one["grpo_batch"].rhythm_gamma for one in encoded])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_the_loss_is_watched_until_it_sees_credit(make):
    trainer = make()
    first, second = generation(trainer)
    assert not trainer._seen
    trainer.compute_loss(trainer.model, first).backward()
    assert trainer._seen
    trainer.compute_loss(trainer.model, second)
    assert trainer._watched is None  # holds no graph


def test_a_batch_without_a_response_gets_no_credit_and_the_next_one_calibrates(make):
    trainer = make()
    empty, full = standin.batch_of(False), standin.batch_of(False)
    empty[1].completion_mask[:] = False
    encoded = trainer._prepare_batch_inputs([empty, full])
    assert (encoded[0]["grpo_batch"].rhythm_gamma == 1).all()
    assert (encoded[1]["grpo_batch"].rhythm_gamma != 1).any()
    assert trainer._metrics["train"]["rhythm/gamma_mean"][0] == 1.0
    assert len(trainer._metrics["train"]["rhythm/calibration_seconds"]) == 1  # no forward for nothing


def test_groups_go_with_checkpoints(make, tmp_path):
    trainer = make(output_dir=str(tmp_path))
    generation(trainer)
    trainer.state.global_step = 7
    trainer._save_checkpoint(trainer.model, trial=None)
    folder = tmp_path / "checkpoint-7"
    assert HeadGroups.load(folder / GROUPS_FILE) == trainer.rhythm.groups
    resumed = make()
    resumed._load_optimizer_and_scheduler(str(folder))
    assert resumed.rhythm.groups == trainer.rhythm.groups
    generation(resumed)
    assert "rhythm/calibration_seconds" not in resumed._metrics["train"]
    make()._load_optimizer_and_scheduler(None)
    make()._load_optimizer_and_scheduler(str(tmp_path))  # of plain ms-swift


def test_announced_once(make, capfd, caplog):
    make()
    said = capfd.readouterr().err + caplog.text
    assert said.count("rhythm credit is on in RhythmGRPOTrainer (ms-swift 4.6.0): mode=coupled") == 1


REFUSED = {
    "use_liger_kernel must be False": {"use_liger_kernel": True},
    "async_generate must be False": {"async_generate": True},
    "advantage_reweight must be None": {"advantage_reweight": "rlsd"},
    "sdar_loss_coef must be 0.0": {"sdar_loss_coef": 0.1},
    "teacher_model must be left out": {"keywords": {"teacher_use_disable_adapter": True}},
    "teacher_model_server must be left out": {"keywords": {"teacher_model_server": "http://localhost:8000"}},
    "sequence_parallel_size must be 1": {"sequence_parallel": 2},
    "model must be one of text alone": {"multimodal": True},
    "loss_type must be another than 'real'": {"loss_type": "real"},
    "importance_sampling_level must be 'token' or 'sequence_token'": {"importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused_by_name(make, said):
    with pytest.raises(ValueError, match=f"^{said}.*, got"):
        make(**REFUSED[said])


@pytest.mark.parametrize(
    ("level", "loss"), [("sequence", "cispo"), ("sequence_token", "grpo"), ("token", "dapo"), ("token", "cispo")]
)
def test_losses_that_keep_tokens_apart(make, level, loss):
    make(importance_sampling_level=level, loss_type=loss)


def test_without_credit_any_loss_goes(make, monkeypatch):
    monkeypatch.setenv("RHYTHM_CREDIT", "mode=uniform")
    trainer = make(importance_sampling_level="sequence")
    trainer.compute_loss(trainer.model, generation(trainer)[0])


class Changed:
    """ms-swift as it might become, each time in one respect."""

    class Skipping(standin.GRPOTrainer):
        def _prepare_batch_inputs(self, samples):
            for _, batch in samples:
                batch.old_per_token_logps = torch.zeros(batch.completion_mask.shape)
            return super()._prepare_batch_inputs(samples)

    class Teaching(standin.GRPOTrainer):
        def _postprocess_batch(self, samples, batch_encoded_inputs):
            super()._postprocess_batch(samples, batch_encoded_inputs)
            batch_encoded_inputs[0]["grpo_batch"].teacher_per_token_logps = torch.zeros(1)

    class Splitting(standin.GRPOTrainer):
        def _prepare_batch_inputs(self, samples):
            self.dynamic_num_samples = True
            return super()._prepare_batch_inputs(samples)

    class Blind(standin.GRPOTrainer):
        def _compute_loss(self, model, model_inputs, grpo_batch, origin_data=None):
            log_probs, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch)
            mask = grpo_batch.completion_mask
            mean = (grpo_batch.advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
            return -((log_probs - grpo_batch.old_per_token_logps).exp() * mean * mask).sum()

    class Elsewhere(standin.GRPOTrainer):
        def _compute_loss(self, model, model_inputs, grpo_batch, origin_data=None):
            return model(input_ids=model_inputs["input_ids"]).logits.sum()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("Skipping", "no old-log-prob pass of the policy was measured"),
        ("Teaching", "dataset must have no column teacher_prompt"),
        ("Splitting", "a multi-turn scheduler must not split"),
        ("Blind", "does not see which tokens credit chose"),
        ("Elsewhere", "the loss was made of no log-probs of the policy"),
    ],
)
def test_credit_that_does_not_happen_stops_the_first_step(adapter, make, change, said):
    kind = type(change, (adapter.RhythmGRPOTrainer, getattr(Changed, change)), {})
    trainer = make(kind)
    with pytest.raises((RuntimeError, ValueError), match=said):
        first_step(trainer)


class Withholding:
    """A user's subclass that takes the place of the step which shapes advantages."""

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        standin.GRPOTrainer._postprocess_batch(self, samples, batch_encoded_inputs)


def test_advantages_that_were_not_shaped_stop_the_first_step(adapter, make):
    trainer = make(type("Mine", (Withholding, adapter.RhythmGRPOTrainer), {}))
    with pytest.raises(RuntimeError, match="does not see which tokens credit chose"):
        first_step(trainer)


def test_advantages_within_the_reach_of_kl_tell_nothing(adapter, make):
    trainer = make(type("Mine", (adapter.RhythmGRPOTrainer, Changed.Blind), {}), beta=2.0)
    first_step(trainer)
    assert not trainer._seen


def chosen(kind):
    return standin.TrainerFactory.get_cls(SimpleNamespace(rlhf_type=kind), standin.TrainerFactory.TRAINER_MAPPING)


def test_registered_by_the_import(adapter):
    assert chosen("grpo") is adapter.RhythmGRPOTrainer
    with pytest.raises(ValueError, match=r"^rlhf_type must be 'grpo' for rhythm credit, got 'gkd'"):
        chosen("gkd")
    adapter.register()  # again: a plug-in may be imported anew
    assert chosen("grpo") is adapter.RhythmGRPOTrainer


@pytest.mark.parametrize("before", [True, False])
def test_another_plugins_trainer_must_extend_ours(adapter, monkeypatch, before):
    monkeypatch.setitem(sys.modules, "theirs", theirs := SimpleNamespace(Theirs=type("Theirs", (), {})))
    standin.TrainerFactory.TRAINER_MAPPING["grpo"] = "theirs.Theirs"
    if before:
        adapter.register()
    with pytest.raises(ValueError, match=r"^external_plugins must register no GRPO trainer beside .*, got Theirs"):
        chosen("grpo")
    theirs.Theirs = type("Theirs", (adapter.RhythmGRPOTrainer,), {})
    assert chosen("grpo") is theirs.Theirs


@pytest.mark.parametrize("spelled", [None, "gamma=2"])
def test_settings_that_are_wrong_or_nowhere_stop_training_alone(adapter, make, monkeypatch, spelled):
    monkeypatch.delenv("RHYTHM_CREDIT") if spelled is None else monkeypatch.setenv("RHYTHM_CREDIT", spelled)
    adapter.register()
    mapping = standin.TrainerFactory.TRAINER_MAPPING
    assert standin.TrainerFactory.get_cls(SimpleNamespace(task_type="causal_lm"), mapping) is object
    for training in (lambda: chosen("grpo"), make):
        with pytest.raises(ValueError, match=r"^RHYTHM_CREDIT must be .*, got "):
            training()


def test_it_imports_nothing_of_trl(monkeypatch):
    """Whose version is another one there."""
    for name in [name for name in sys.modules if name.startswith("rhythm_kernels.integrations.trl")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in {"trl": None, **standin.modules()}.items():  # None: an import of it raises
        monkeypatch.setitem(sys.modules, name, module)
    standin.forget()
    importlib.import_module("rhythm_kernels.integrations.ms_swift")
    assert not any(name.startswith("rhythm_kernels.integrations.trl") for name in sys.modules)
    standin.forget()


def test_the_module_is_no_plugin_itself(adapter):
    """ms-swift would import it under a name of its own, as a second module, with its folder first on sys.path."""
    spec = importlib.util.spec_from_file_location("_swift_external_0", adapter.__file__)
    with pytest.raises(ImportError, match=r"^external_plugins must name a file of yours that holds"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_megatron_is_refused(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "swift.megatron", standin.modules()["swift"])
    with pytest.raises(ImportError, match=r"^rhythm credit must be used with 'swift rlhf', got Megatron"):
        importlib.reload(adapter)

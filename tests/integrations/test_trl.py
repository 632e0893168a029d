"""The TRL subclass against TRL: bit-equal where gamma is 1, and equal to TRL fed with gamma of full eager maps."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rhythm_kernels import HeadGroups, reference, shape_advantages
from rhythm_kernels.integrations.trl import RhythmGRPOConfig, RhythmGRPOTrainer
from rhythm_kernels.integrations.trl.inputs import last_token, response_mask

from ..test_settings import DEFAULTS
from .toy import RHYTHM, build_model, build_tokenizer, dataset, eager_copy, losses, options, reward, train, weights

WINDOW, (LOW, HIGH) = RHYTHM["rhythm_window"], RHYTHM["rhythm_horizon"]
LAYERS = [1, 2]  # `middle5` of four layers
GROUP = round(0.3 * 8)


def measures_from_maps(model, output, groups):
    """WAAD and FAI of the completion tokens, and groups by span where there are none, from maps kept in full."""
    tokens = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
    live = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
    batch, length = tokens.shape
    first = length - output["completion_ids"].shape[1]
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, first:] = response_mask(output).bool()
    with torch.no_grad():
        maps = model(input_ids=tokens, attention_mask=live, output_attentions=True, use_cache=False).attentions
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    if groups is None:
        rows = torch.zeros_like(mask)
        for b in range(batch):
            inside = mask[b].nonzero().flatten().tolist() or [0, -1]
            rows[b, inside[0] : inside[-1] + 1] = True
        spans = {
            (layer, head): (maps[layer][:, head] * distance.clamp(min=0)).sum(-1)[rows].mean().item()
            for layer in LAYERS
            for head in range(4)
        }
        ranked = sorted(spans, key=lambda head: (spans[head], head))
        groups = ranked[:GROUP], ranked[-GROUP:]
    local, global_ = (torch.stack([maps[layer][:, head] for layer, head in group]).mean(0) for group in groups)
    waad = (local * distance.clamp(0, WINDOW)).sum(-1)
    fai = torch.zeros(batch, length)
    for b in range(batch):
        inside = mask[b].nonzero().flatten().tolist()
        for s in range(inside[0], inside[-1] + 1) if inside else []:
            later = range(s + LOW, min(inside[-1], s + HIGH) + 1)
            if len(later):
                fai[b, s] = global_[b, later.start : later.stop, s].mean()
    return waad[:, first:], fai[:, first:], groups


class FedFromMaps(GRPOTrainer):
    """Plain TRL, whose advantages are shaped by gamma from full eager maps of the behaviour policy."""

    groups = None
    sign = "both"

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        waad, fai, self.groups = measures_from_maps(eager_copy(self.model), output, self.groups)
        gamma = reference.rhythm_credit(waad, fai, response_mask(output))
        output["advantages"] = shape_advantages(output["advantages"], gamma, self.sign)
        return output


def in_turn(names, quick):
    """All of `names` as parameters, those not in `quick` marked long."""
    return [pytest.param(n, marks=[] if n in quick else pytest.mark.long) for n in names]


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.parametrize("loss", in_turn(LOSSES, quick=("grpo", "dapo", "cispo")))
def test_gamma_of_one_is_trl_bit_for_bit(tmp_path, loss):
    plain = train(GRPOTrainer, GRPOConfig, tmp_path, loss_type=loss)
    ours = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, loss_type=loss, rhythm_gamma_amp=1.0, **RHYTHM)
    assert losses(ours) == losses(plain)
    assert len(losses(ours)) == 3
    assert torch.equal(weights(ours), weights(plain))


SCHEDULES = {
    "on-policy": {},
    "accumulated": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "off-policy": {"per_device_train_batch_size": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 1},
    "two iterations": {"num_iterations": 2, "max_steps": 4},
    "two iterations in one step": {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed, reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "sequence importance": {"loss_type": "cispo", "importance_sampling_level": "sequence", "num_iterations": 2},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "truncated masked": {"mask_truncated_completions": True},
}


QUICK = ("on-policy", "off-policy", "two iterations in one step", "checkpointed", "truncated masked")


@pytest.mark.parametrize("schedule", in_turn(SCHEDULES, QUICK))
def test_agrees_with_trl_fed_from_full_maps(tmp_path, schedule):
    changed = SCHEDULES[schedule]
    oracle = train(FedFromMaps, GRPOConfig, tmp_path, **changed)
    ours = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    assert ours.rhythm_groups.local == oracle.groups[0]
    assert ours.rhythm_groups.global_ == oracle.groups[1]
    torch.testing.assert_close(losses(ours), losses(oracle), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", ["on-policy", "off-policy", "two iterations in one step"])
def test_credit_changes_what_is_learned(tmp_path, schedule):
    """So that the agreements above are not those of two trainers that ignore gamma."""
    plain = train(GRPOTrainer, GRPOConfig, tmp_path, **SCHEDULES[schedule])
    ours = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **SCHEDULES[schedule], **RHYTHM)
    assert (weights(ours) - weights(plain)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", in_turn(["uniform", "random", "entropy", "local"], quick=("uniform", "entropy")))
@pytest.mark.parametrize("schedule", ["on-policy", "off-policy"])
def test_other_modes_are_trl_at_gamma_one(tmp_path, mode, schedule):
    plain = train(GRPOTrainer, GRPOConfig, tmp_path, **SCHEDULES[schedule])
    amplitude = 1.5 if mode == "uniform" else 1.0
    ours = train(
        RhythmGRPOTrainer,
        RhythmGRPOConfig,
        tmp_path,
        rhythm_mode=mode,
        rhythm_gamma_amp=amplitude,
        **SCHEDULES[schedule],
        **RHYTHM,
    )
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("mode", ["random", "entropy"])
@pytest.mark.parametrize("schedule", ["on-policy", "off-policy"])
def test_baselines_need_no_heads_and_repeat(tmp_path, mode, schedule):
    runs = [
        train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, rhythm_mode=mode, **SCHEDULES[schedule]) for _ in range(2)
    ]
    assert runs[0].rhythm_groups is None
    assert torch.equal(*map(weights, runs))
    history = runs[0].state.log_history[0]
    assert history["rhythm/gamma_mean"] > 1
    assert "rhythm/waad_mean" not in history


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["on-policy", "off-policy"])
def test_lora(tmp_path, beta, schedule):
    """With KL, the reference pass goes through the same model, adapters off: it must not be what is measured."""
    from peft import LoraConfig

    def run(kind, config, **changed):
        lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
        return train(kind, config, tmp_path, extra={"peft_config": lora}, beta=beta, **SCHEDULES[schedule], **changed)

    oracle = run(FedFromMaps, GRPOConfig)
    ours = run(RhythmGRPOTrainer, RhythmGRPOConfig, **RHYTHM)
    torch.testing.assert_close(losses(ours), losses(oracle), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=2e-6)


def count_passes(kind, config, folder, **changed):
    """Forwards of the decoder over whole sequences, generation left out."""
    model, passes = build_model(), []

    def count(module, args, kwargs):
        if kwargs.get("cache") is None and kwargs.get("past_key_values") is None:
            passes.append(1)

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    train(kind, config, folder, model=model, **changed)
    return len(passes)


@pytest.mark.parametrize("schedule", ["on-policy", "accumulated", "off-policy", "two iterations"])
def test_no_forward_is_added_but_the_calibration(tmp_path, schedule):
    changed = SCHEDULES[schedule]
    plain = count_passes(GRPOTrainer, GRPOConfig, tmp_path, **changed)
    calibrated = count_passes(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    chunks = 16 // changed.get("per_device_train_batch_size", 16)
    assert calibrated == plain + chunks

    path = tmp_path / "groups.json"
    HeadGroups([(1, 0)], [(2, 3)]).save(path)
    given = count_passes(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, rhythm_groups=str(path), **changed, **RHYTHM)
    assert given == plain


def test_heads_are_grouped_again(tmp_path):
    changed = {"max_steps": 4, "rhythm_regroup_steps": 2}
    for schedule in ("on-policy", "off-policy"):
        trainer = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **{**SCHEDULES[schedule], **changed}, **RHYTHM)
        grouped = [i for i, e in enumerate(trainer.state.log_history) if "rhythm/calibration_seconds" in e]
        assert grouped == [0, 2]


class Reading(dict):
    """Inputs of the loss that note whether the advantages were read before the forward."""

    def __getitem__(self, name):
        if name == "advantages":
            self["events"].append("advantages")
        return super().__getitem__(name)


def test_trl_reads_advantages_after_its_forward(tmp_path):
    """The contract that measuring inside the training forward rests on."""
    events = []

    class Spy(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return super()._compute_loss(model, Reading(inputs, events=events))

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            events.append("forward")
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    train(Spy, GRPOConfig, tmp_path)
    assert events[:2] == ["forward", "advantages"]
    assert events.count("forward") == 3


@pytest.mark.parametrize("schedule", ["on-policy", "off-policy"])
def test_gamma_is_left_for_subclasses(tmp_path, schedule):
    seen = []

    class Watching(RhythmGRPOTrainer):
        def _compute_loss(self, model, inputs):
            before = inputs["advantages"].clone()
            loss = super()._compute_loss(model, inputs)
            seen.append((inputs["rhythm_gamma"], response_mask(inputs)))
            assert torch.equal(inputs["advantages"], before)
            return loss

    train(Watching, RhythmGRPOConfig, tmp_path, **SCHEDULES[schedule], **RHYTHM)
    assert len(seen) == 3
    for gamma, mask in seen:
        assert gamma.shape == mask.shape
        assert gamma.dtype == torch.float32
        assert not gamma.requires_grad
        assert (gamma[mask == 0] == 1).all()
        assert (gamma > 1).any()


def test_statistics_are_logged(tmp_path):
    trainer = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **RHYTHM)
    for entry in trainer.state.log_history[:3]:
        assert 1 < entry["rhythm/gamma_mean"] < 1.5
        assert 0.2 < entry["rhythm/boosted_share"] < 0.9
        assert 0 < entry["rhythm/waad_mean"] < WINDOW
        assert 0 < entry["rhythm/fai_mean"] < 1
        assert 0 < entry["rhythm/seconds"] < entry["step_time"]


def test_evaluation(tmp_path):
    plain, ours = (
        train(
            kind,
            config,
            tmp_path,
            extra={"eval_dataset": dataset().select(range(4))},
            eval_strategy="steps",
            eval_steps=1,
            eval_on_start=True,
            per_device_eval_batch_size=16,
            **changed,
        )
        for kind, config, changed in (
            (GRPOTrainer, GRPOConfig, {}),
            (RhythmGRPOTrainer, RhythmGRPOConfig, {"rhythm_gamma_amp": 1.0, **RHYTHM}),
        )
    )
    assert torch.equal(weights(ours), weights(plain))
    found = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (plain, ours)]
    assert found[0] == found[1]
    assert "eval_rhythm/gamma_mean" in ours.state.log_history[0]


def test_tool_tokens_are_neither_scored_nor_counted(tmp_path):
    """A tool wrote the middle of every response, and also had the last word of some."""

    def mark(output):
        mask = torch.ones_like(output["completion_mask"])
        mask[:, 3:6] = 0
        mask[::3, 9:] = 0
        output["tool_mask"] = mask
        return output

    seen = []

    class Tools(RhythmGRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.append((eager_copy(self.model), inputs))
            return loss

    original = GRPOTrainer._generate_and_score_completions
    calibrations = []
    for schedule in ("on-policy", "two iterations"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GRPOTrainer, "_generate_and_score_completions", lambda s, i: mark(original(s, i)))
            trainer = train(Tools, RhythmGRPOConfig, tmp_path, **{**SCHEDULES[schedule], "max_steps": 1}, **RHYTHM)
        model, inputs = seen.pop()
        groups = trainer.rhythm_groups.local, trainer.rhythm_groups.global_
        calibrations.append(trainer.rhythm_groups.provenance)
        waad, fai, _ = measures_from_maps(model, inputs, groups)
        gamma = reference.rhythm_credit(waad, fai, response_mask(inputs))
        assert torch.equal(inputs["rhythm_gamma"], gamma)
        assert (gamma[:, 3:6] == 1).all()
    # Both passes group the heads by the same response, which ends where the model's own words do.
    first, second = calibrations
    assert first["calibration"] == second["calibration"]
    torch.testing.assert_close(first["span"], second["span"], rtol=0, atol=1e-5)


def test_settings_may_change_in_training(tmp_path):
    """By a callback, as TRL's own; and groups may be set."""

    class Rising(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            args.rhythm_gamma_amp = 1.0 + state.global_step

    groups = HeadGroups([(1, 0)], [(2, 3)])
    args = RhythmGRPOConfig(**options(tmp_path), **RHYTHM)
    trainer = RhythmGRPOTrainer(
        build_model(), reward, args, dataset(), processing_class=build_tokenizer(), callbacks=[Rising()]
    )
    trainer.rhythm_groups = groups
    trainer.train()
    assert trainer.rhythm_groups == groups
    means = [entry["rhythm/gamma_mean"] for entry in trainer.state.log_history[:3]]
    assert means[0] == 1
    assert means[0] < means[1] < means[2]


def test_a_mode_that_starts_to_read_attention_calibrates_first(tmp_path):
    class Later(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            args.rhythm_mode = "coupled" if state.global_step else "uniform"

    args = RhythmGRPOConfig(**options(tmp_path), rhythm_mode="uniform", **RHYTHM)
    trainer = RhythmGRPOTrainer(
        build_model(), reward, args, dataset(), processing_class=build_tokenizer(), callbacks=[Later()]
    )
    trainer.train()
    calibrated = ["rhythm/calibration_seconds" in entry for entry in trainer.state.log_history[:3]]
    assert calibrated == [False, True, False]
    assert [entry["rhythm/gamma_mean"] > 1 for entry in trainer.state.log_history[:3]] == [False, True, True]


def test_groups_are_saved_and_read_back(tmp_path):
    changed = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    saved = HeadGroups.load(tmp_path / "checkpoint-2" / "rhythm_groups.json")
    assert saved == whole.rhythm_groups
    args = RhythmGRPOConfig(**options(tmp_path, **changed), **RHYTHM)
    again = RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.rhythm_groups == saved
    assert not any("rhythm/calibration_seconds" in entry for entry in again.state.log_history[2:])
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=1e-6)


def test_a_checkpoint_of_trl_is_never_without_ours(tmp_path, monkeypatch):
    """Killed while TRL writes it, a run leaves no checkpoint that would go on as another run."""
    ours = []

    def dies(self, *_):
        ours.extend(sorted(path.name for path in (tmp_path / "checkpoint-1").iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(GRPOTrainer, "_save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, save_strategy="steps", save_steps=1, **RHYTHM)
    assert ours == ["rhythm_groups.json", "rhythm_progress_0.pt"]


def test_no_response_is_left(tmp_path):
    """Every response is cut off and masked: nothing to calibrate with, nothing to learn, no error."""
    trainer = train(
        RhythmGRPOTrainer,
        RhythmGRPOConfig,
        tmp_path,
        mask_truncated_completions=True,
        max_completion_length=1,
        num_generations=2,
        per_device_train_batch_size=2,
        **RHYTHM,
    )
    assert trainer.state.global_step == 3
    assert [entry["rhythm/gamma_mean"] for entry in trainer.state.log_history[:3]] == [1.0] * 3


def build(tmp_path, **changed):
    args = RhythmGRPOConfig(**options(tmp_path, **changed))
    return RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rhythm_mode": "coupling"}, "rhythm_mode must be one of .*, got 'coupling'"),
        ({"rhythm_gamma_amp": 0.0}, "rhythm_gamma_amp must be above 0 and finite, got 0.0"),
        ({"rhythm_top": 0.0}, "rhythm_top must be .*, got 0.0"),
        ({"rhythm_alpha": 2.0}, "rhythm_alpha must be .*, got 2.0"),
        ({"rhythm_neighbors": 0}, "rhythm_neighbors must be at least 1, got 0"),
        ({"rhythm_head_quantile": 0.0}, "rhythm_head_quantile must be .*, got 0.0"),
        ({"rhythm_regroup_steps": -1}, "rhythm_regroup_steps must be at least 0, got -1"),
        ({"rhythm_window": 0}, "rhythm_window must be at least 1, got 0"),
        ({"rhythm_horizon": (10,)}, r"rhythm_horizon must be a pair .*, got \(10,\)"),
        ({"rhythm_horizon": (10, 5)}, r"rhythm_horizon\[1\] must be at least 10, got 5"),
        ({"rhythm_sign": "plus"}, "rhythm_sign must be one of both, positive, negative, got 'plus'"),
        ({"rhythm_groups": "no/such.json"}, "rhythm_groups must be a file .*, got 'no/such.json': No such file"),
        ({"rhythm_layers": "middle"}, "rhythm_layers must be 'middle5', .*, got 'middle'"),
        ({"rhythm_layers": [7]}, "layer 7"),
    ],
)
def test_wrong_settings_are_refused_at_construction(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **changed)


def test_wrong_groups_are_refused_at_construction(tmp_path):
    HeadGroups([(1, 0)], [(2, 9)]).save(tmp_path / "groups.json")
    with pytest.raises(ValueError, match="head 9 of layer 2"):
        build(tmp_path, rhythm_groups=str(tmp_path / "groups.json"))


def test_liger_loss_of_old_versions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda: None, raising=False)
    args = RhythmGRPOConfig(**options(tmp_path))
    args.use_liger_kernel = True
    with pytest.raises(ValueError, match=r"use_liger_kernel must be False .*, got True"):
        RhythmGRPOTrainer(build_model(), reward, args, dataset(), processing_class=build_tokenizer())


def test_a_plain_configuration_is_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be a RhythmGRPOConfig, got GRPOConfig"):
        RhythmGRPOTrainer(build_model(), reward, GRPOConfig(**options(tmp_path)), dataset())


def test_defaults_are_those_of_the_method():
    names = {f.name: f for f in dataclasses.fields(RhythmGRPOConfig) if f.name.startswith("rhythm_")}
    defaults = {n: f.default_factory() if f.default is dataclasses.MISSING else f.default for n, f in names.items()}
    assert defaults == {f"rhythm_{name}": default for name, default in DEFAULTS.items()}


def test_configuration_from_the_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--rhythm_mode", "global", "--rhythm_horizon", "4", "20"]
    (config,) = HfArgumentParser(RhythmGRPOConfig).parse_args_into_dataclasses([*words, "--bf16", "False"])
    assert config.rhythm_mode == "global"
    assert list(config.rhythm_horizon) == [4, 20]
    assert config.rhythm_layers == "middle5"
    assert config.rhythm_sign == "both"
    left_out = [*words[:4], "--bf16", "False"]
    (config,) = HfArgumentParser(RhythmGRPOConfig).parse_args_into_dataclasses(left_out)
    assert tuple(config.rhythm_horizon) == (10, 100)


def test_an_open_horizon_is_typed_as_null(tmp_path):
    """On a command line and in a file of settings, and it reaches the measures."""
    words = ["--output_dir", str(tmp_path), "--rhythm_horizon", "10", "null", "--bf16", "False"]
    (typed,) = HfArgumentParser(RhythmGRPOConfig).parse_args_into_dataclasses(words)
    (tmp_path / "settings.yaml").write_text(f"output_dir: {tmp_path}\nrhythm_horizon: [10, null]\nbf16: false\n")
    (read,) = HfArgumentParser(RhythmGRPOConfig).parse_yaml_file(str(tmp_path / "settings.yaml"))
    assert list(typed.rhythm_horizon) == list(read.rhythm_horizon) == [10, None]
    with pytest.raises(SystemExit):
        HfArgumentParser(RhythmGRPOConfig).parse_args_into_dataclasses([*words[:4], "ten"])
    ours, to_the_end = (
        train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, rhythm_window=4, rhythm_horizon=horizon)
        for horizon in ([2, 8], [2, None])
    )
    fai, wide = (trainer.state.log_history[0]["rhythm/fai_mean"] for trainer in (ours, to_the_end))
    assert 0 < wide < fai  # more of the later rows, and the far ones look back less


@pytest.mark.parametrize("schedule", ["on-policy", "off-policy"])
@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_one_sign_alone(tmp_path, sign, schedule):
    """As TRL with maps and `shape_advantages` of that sign learns, and not as with both."""
    changed = SCHEDULES[schedule]
    oracle = train(type("OneSign", (FedFromMaps,), {"sign": sign}), GRPOConfig, tmp_path, **changed)
    ours = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, rhythm_sign=sign, **changed, **RHYTHM)
    torch.testing.assert_close(weights(ours), weights(oracle), rtol=0, atol=1e-6)
    both = train(RhythmGRPOTrainer, RhythmGRPOConfig, tmp_path, **changed, **RHYTHM)
    assert (weights(ours) - weights(both)).abs().max() > 1e-4


def test_last_token():
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]])
    assert last_token(mask).tolist() == [4, 0, 1]


@pytest.mark.long
@pytest.mark.parametrize("iterations", [1, 2])
def test_two_processes_agree(tmp_path, iterations):
    """Each process measures its own half of the batch: all must use the same groups and learn the same."""
    root = Path(__file__).parents[2]
    words = ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    script = ["tests/integrations/two_processes.py", str(tmp_path), str(iterations)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *script],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["local"] == second["local"]
    assert first["global"] == second["global"]
    assert first["weights"] == second["weights"]
    assert first["gamma"]
    assert all(1 < gamma < 1.5 for gamma in first["gamma"])

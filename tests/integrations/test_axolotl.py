"""axolotl's trainer with credit: built as axolotl builds it, and in real runs of its command where it is installed.

`AXOLOTL=required` makes a missing axolotl an error; `make matrix` has a row for it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from trl import GRPOConfig, GRPOTrainer

from .toy import PROMPTS, build_model, build_tokenizer, dataset, options, reward, weights

ROOT = Path(__file__).parents[2]
MODULE = "rhythm_kernels.integrations.axolotl"
real = pytest.mark.skipif(
    find_spec("axolotl") is None and os.environ.get("AXOLOTL") != "required", reason="axolotl is not installed"
)


class AxolotlGRPOTrainer(GRPOTrainer):
    """A stand-in: what axolotl 0.21 makes of TRL's constructor."""

    def __init__(self, *args, data_collator=None, **kwargs):
        super().__init__(*args, **kwargs)
        if data_collator is not None:
            self.data_collator = data_collator


@pytest.fixture
def stand_in(monkeypatch):
    """Our module, over an axolotl that has nothing but its trainer."""
    path = ["axolotl", "core", "trainers", "grpo", "trainer"]
    for end in range(1, len(path) + 1):
        monkeypatch.setitem(sys.modules, ".".join(path[:end]), ModuleType(".".join(path[:end])))
    sys.modules[".".join(path)].AxolotlGRPOTrainer = AxolotlGRPOTrainer
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE).RhythmAxolotlGRPOTrainer
    sys.modules.pop(MODULE, None)


def as_axolotl_does(kind, folder, **changed):
    """The call of its builder: model and rewards by place, the rest by name."""
    return kind(
        build_model(),
        [reward],
        args=GRPOConfig(**options(folder, **changed)),
        train_dataset=dataset(),
        callbacks=[],
        processing_class=build_tokenizer(),
    )


def test_it_is_built_as_axolotl_builds_it(tmp_path, monkeypatch, stand_in):
    monkeypatch.setenv("RHYTHM_CREDIT", "window=4,horizon=2:8,gamma_amp=1.0")
    ours = as_axolotl_does(stand_in, tmp_path, max_steps=1)
    ours.train()
    plain = as_axolotl_does(AxolotlGRPOTrainer, tmp_path, max_steps=1)
    plain.train()
    assert torch.equal(weights(ours), weights(plain))
    assert ours.state.log_history[0]["rhythm/waad_mean"] > 0


def test_without_settings_it_says_where_they_go(tmp_path, monkeypatch, stand_in):
    monkeypatch.delenv("RHYTHM_CREDIT", raising=False)
    with pytest.raises(TypeError, match=r"got GRPOConfig: .* set the environment variable RHYTHM_CREDIT"):
        as_axolotl_does(stand_in, tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted", "given"),
    [("context_parallel_size", 1, 2), ("async_prefetch", False, True), ("use_data_producer", False, True)],
)
def test_what_its_other_trainers_are_for_is_refused(tmp_path, monkeypatch, stand_in, name, wanted, given):
    monkeypatch.setenv("RHYTHM_CREDIT", "")
    monkeypatch.setattr(GRPOConfig, name, given, raising=False)
    with pytest.raises(ValueError, match=f"{name} must be {wanted}, got {given}: "):
        as_axolotl_does(stand_in, tmp_path)


YAML = """
base_model: {folder}/model
rl: grpo
trl:
  num_generations: 4
  max_completion_length: 24
  beta: 0.0
  loss_type: dapo
  reward_funcs: [tests.integrations.toy.reward]
datasets:
  - path: {folder}/questions.jsonl
    ds_type: json
    split: train
    type: axolotl_parts.questions
skip_prepare_dataset: true
remove_unused_columns: false
sequence_len: 64
micro_batch_size: 16
gradient_accumulation_steps: 1
max_steps: 2
seed: 7
learning_rate: 0.01
optimizer: adamw_torch
lr_scheduler: constant
bf16: false
tf32: false
attn_implementation: sdpa
gradient_checkpointing: false
logging_steps: 1
save_strategy: "no"
val_set_size: 0
special_tokens: {{pad_token: <pad>}}
"""
OURS = f"{MODULE}.RhythmAxolotlGRPOTrainer"


def axolotl(folder, name, trainer, credit=None):
    """`axolotl train` with a class for its trainer, if any: what it printed, and the weights that it saved."""
    if not (folder / "model").exists():
        build_model().save_pretrained(folder / "model")
        build_tokenizer().save_pretrained(folder / "model")
        rows = [json.dumps({"question": prompt}) for prompt in PROMPTS * 8]
        (folder / "questions.jsonl").write_text("\n".join(rows))
    chosen = f"trainer_cls: {trainer}\n" if trainer else ""
    (folder / f"{name}.yaml").write_text(YAML.format(folder=folder) + f"output_dir: {folder}/{name}\n" + chosen)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'integrations'}"  # a dataset's `type` is of a module in no package
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("RHYTHM_CREDIT", None)
    environment |= {} if credit is None else {"RHYTHM_CREDIT": credit}
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", str(folder / f"{name}.yaml")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    printed = done.stdout + done.stderr
    if done.returncode:
        return printed, None
    saved = load_file(folder / name / "model.safetensors")
    return printed, torch.cat([saved[key].flatten() for key in sorted(saved)])


@real
def test_a_run_of_axolotl(tmp_path):
    """Bit for bit its own run where gamma is 1; with credit, as with gamma of full eager maps."""
    credit = "window=4,horizon=2:8"
    printed, plain = axolotl(tmp_path, "plain", None)
    assert plain is not None, printed[-3000:]
    printed, of_one = axolotl(tmp_path, "one", OURS, f"{credit},gamma_amp=1")
    assert of_one is not None and torch.equal(of_one, plain), printed[-3000:]
    printed, ours = axolotl(tmp_path, "ours", OURS, credit)
    assert "rhythm credit is on in RhythmAxolotlGRPOTrainer (TRL " in printed and "rhythm/gamma_mean" in printed
    printed, oracle = axolotl(tmp_path, "maps", "axolotl_parts.Fed")
    assert oracle is not None, printed[-3000:]
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-6)
    assert (ours - plain).abs().max() > 1e-3
    printed, none = axolotl(tmp_path, "unset", OURS)
    assert none is None and "got AxolotlGRPOConfig" in printed and "RHYTHM_CREDIT" in printed


@real
def test_the_trainers_of_axolotl_that_are_refused():
    from axolotl.core.trainers.ebft.trainer import AxolotlAsyncEBFTTrainer, AxolotlEBFTTrainer
    from axolotl.core.trainers.grpo.trainer import AxolotlAsyncGRPOTrainer, AxolotlGRPOContextParallelTrainer

    from rhythm_kernels.integrations.trl import RhythmMixin

    for kind, named in {
        AxolotlAsyncGRPOTrainer: "AxolotlAsyncGRPOTrainer: it packs",
        AxolotlGRPOContextParallelTrainer: "AxolotlGRPOContextParallelTrainer: it divides",
        AxolotlEBFTTrainer: "AxolotlEBFTTrainer: its rewards",
        AxolotlAsyncEBFTTrainer: "Axolotl(AsyncGRPO|EBFT)Trainer: it",
    }.items():
        with pytest.raises(TypeError, match=f"must heed token advantages, got {named}"):
            type("Mine", (RhythmMixin, kind), {})

"""Settings that are wrong: one line that names the setting, status 2, and nothing loaded, measured or changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing
from pathlib import Path

import pytest
import torch

from rhythm_kernels.integrations.trl import RhythmGRPOConfig
from training import train as training
from training.__main__ import main
from training.grpo import Recorder, build_trainer, trainer_config
from training.models import load
from training.reading import read_yaml
from training.recipe import ROOT, RecipeError, load_recipe
from training.settings import _REFUSED, TRL_WORDS, LossType, checked
from training.task import make
from training.trials import try_out

from .runs import FEW, TINY, save_model

HARD = ["grpo.lr_scheduler_type=cosine_with_restarts", "grpo.max_steps=3"]
WORKER = "grpo.dataloader_num_workers=1"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command that has to fail: returns its one line. Nothing may be evaluated, and no folder may be left."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(training, "evaluate_both", lambda *_: pytest.fail("something was evaluated"))
    run = tmp_path / "runs" / "run"

    def command(*words, recipe=TINY):
        assert main(["train", recipe, *FEW, f"output.path={run}", *words]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error)
        assert not run.parent.exists()
        return error.removeprefix("error: ")

    return command


# Each is refused before the model is loaded, by a message that holds the second column, or its parts around " ... ".
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.max_steps=true", "grpo.max_steps must be a whole number, got True"),
        ("grpo.max_steps=-1", "grpo.max_steps must be at least 1, got -1"),
        ("grpo.max_steps=1000000000000000000000", "a whole number below 2**63"),
        ("grpo.max_steps=2001-99-99", "must be YAML, got"),
        (f"grpo.seed={'1' * 5000}", "must be YAML, got"),
        ("grpo.seed=-1", "grpo.seed must be at least 0 and below 2**32, got -1"),
        (f"grpo.seed={2**40}", "at least 0 and below 2**32"),
        ("grpo.data_seed=-1", "grpo.data_seed must be at least 0 and below 2**32, got -1"),
        ("eval.seed=-1", "eval.seed must be at least 0 and below 2**32, got -1"),
        (f"eval.seed={2**70}", "must be a whole number below 2**63"),
        ("eval.temperature=.inf", "eval.temperature must be a finite number, got inf"),
        ("eval.temperature=-1", "eval.temperature must be at least 0, where 0 is greedy, got -1.0"),
        ("eval.batch_size=0", "eval.batch_size must be at least 1, got 0"),
        ("eval.size=1000000000", "eval.size must be at least 1 and at most 1000000, got 1000000000"),
        ("task.train_size=1000000000", "at least 1 and at most 1000000"),
        ("task.train_size=0", "task.train_size must be at least 1 and at most 1000000, got 0"),
        ("task.numbers=[1]", "numbers must be between 2 and 6, got [1]"),
        ("task.numbers=[]", "numbers must be between 2 and 6, got []"),
        ("task.numbers=[9]", "numbers must be between 2 and 6, got [9]"),
        ("task.numbers=[0]", "numbers must be between 2 and 6, got [0]"),
        ("task.name=chess", "or module:Class for your own, got 'chess'"),
        ("task.prompt=short", "task.prompt must be one of tiny, base, chat, rows, got 'short'"),
        ("task.level=hard", "task.level must be one of paper, tiny, got 'hard'"),
        ("grpo.rewards=[]", "grpo.rewards must be a list of at least one, got []"),
        ("grpo.rewards=[corectness]", "must hold only score, correctness, format, answered, got 'corectness'"),
        ("grpo.rewards=correctness", "grpo.rewards must be a list, each entry a word, got 'correctness'"),
        ("grpo.per_device_train_batch_size=5", "grpo, rhythm: ... (5) must be divisible by num_generations (2)"),
        ("grpo.per_device_train_batch_size=0", "must be at least 1"),
        ("grpo.num_generations=1", "grpo.num_generations must be at least 2, got 1"),
        ("grpo.learning_rate=fast", "grpo.learning_rate must be a number, got 'fast'"),
        ("grpo.learning_rate=.nan", "grpo.learning_rate must be a finite number, got nan"),
        ("grpo.learning_rate=-1", "grpo.learning_rate must be at least 0, got -1.0"),
        ("grpo.weight_decay=-.inf", "grpo.weight_decay must be a finite number, got -inf"),
        (f"grpo.beta={10**400}", "grpo.beta must be a number, got 1000"),
        ("grpo.beta=abc", "grpo.beta must be a number, got 'abc'"),
        ("grpo.adam_beta1=1", "grpo.adam_beta1 must be at least 0 and below 1, got 1.0"),
        ("grpo.num_iterations=abc", "grpo.num_iterations must be a whole number, got 'abc'"),
        ("grpo.num_iterations=1.5", "grpo.num_iterations must be a whole number, got 1.5"),
        ("grpo.num_iterations=0", "grpo.num_iterations must be at least 1, got 0"),
        ("grpo.top_entropy_quantile=[1]", "grpo.top_entropy_quantile must be a number, got [1]"),
        ("grpo.top_entropy_quantile=2", "must be at least 0 and at most 1"),
        ("grpo.epsilon=abc", "grpo.epsilon must be a number, got 'abc'"),
        ("grpo.top_p=0", "grpo.top_p must be above 0 and at most 1, got 0.0"),
        ("grpo.min_p=oft", "grpo.min_p must be a number or null, got 'oft'"),
        ("grpo.pad_to_multiple_of=0", "grpo.pad_to_multiple_of must be at least 1, got 0"),
        ("grpo.gradient_checkpointing=maybe", "must be true or false"),
        ("grpo.lr_scheduler_kwargs=3", "must be a mapping or a word or null, got 3"),
        ("grpo.lr_scheduler_type=liner", "grpo.lr_scheduler_type must be one of linear, cosine ... got 'liner'"),
        ("grpo.lr_scheduler_type=reduce_lr_on_plateau", "requires an eval strategy"),
        ("grpo.loss_type=dap", "grpo.loss_type must be one of grpo, dr_grpo, dapo ... got 'dap'"),
        ("grpo.importance_sampling_level=word", "must be one of token, sequence"),
        ("grpo.importance_sampling_level=sequence", "'token' for rhythm_mode='coupled'"),
        ("grpo.scale_rewards=maybe", "grpo.scale_rewards must be one of group, batch, none ... got 'maybe'"),
        ("grpo.multi_objective_aggregation=sum", "must be one of sum_then_normalize, normalize_then_sum"),
        ("grpo.max_completion_length=0", "grpo.max_completion_length must be at least 1, got 0"),
        ("grpo.max_completion_length=-5", "grpo.max_completion_length must be at least 1, got -5"),
        ("grpo.temperature=0", "grpo.temperature must be above 0, got 0.0"),
        ("grpo.temperature=-1", "grpo.temperature must be above 0, got -1.0"),
        ("grpo.gradient_accumulation_steps=0", "must be at least 1"),
        ("grpo.steps_per_generation=0", "must be at least 1"),
        ("grpo.warmup_steps=-1", "grpo.warmup_steps must be at least 0 ... got -1"),
        ("grpo.auto_find_batch_size=true", "auto_find_batch_size is not supported by GRPO"),
        ("grpo.ds3_gather_for_generation=true", "nothing heeds it without a launch with training/launch/zero3.yaml"),
        ("grpo.deepspeed=x.json", "the file of accelerate launch says: training/launch/zero3.yaml"),
        ("grpo.fsdp=full_shard", "the file of accelerate launch says: training/launch/fsdp2.yaml"),
        ("grpo.fsdp_config={version: 1}", "grpo.fsdp_config must not be set ... training/launch/fsdp2.yaml"),
        ("grpo.ddp_timeout=7200", "grpo.ddp_timeout must not be set, got 7200 ... without several processes"),
        ("grpo.ddp_timeout=0", "grpo.ddp_timeout must be at least 1, got 0"),
        ("grpo.local_rank=1", "grpo.local_rank must not be set, got 1: accelerate launch tells each process"),
        ("grpo.parallelism_config={tp_size: 2}", "must not be set ... by FSDP2 or ZeRO-3: no layer is divided"),
        ("grpo.log_on_each_node=false", "must not be set, got False: the main process writes"),
        ("grpo.report_to=comet", "must be one of none, wandb, tensorboard or a list, each entry one of wandb"),
        ("grpo.run_name=first", "grpo.run_name must not be set ... without grpo.report_to=wandb"),
        ("grpo.project=rhythm", "grpo.project must not be set ... without grpo.report_to=wandb"),
        ("grpo.trackio_space_id=me/mine", "must not be set ... grpo.report_to knows wandb and tensorboard"),
        ("grpo.vllm_mode=serve", "grpo.vllm_mode must be one of colocate, server, got 'serve'"),
        ("grpo.vllm_server_port=8001", "grpo.vllm_server_port must not be set ... without grpo.use_vllm=true"),
        ("grpo.vllm_gpu_memory_utilization=2", "must be above 0 and at most 1, got 2.0"),
        ("model.lora={rank: 8}", "model.lora must not have the key 'rank'; known: r, alpha, dropout, target_modules"),
        ("model.lora={target: all-linear}", "must not have the key 'target'; did you mean target_modules?"),
        ("model.lora={r: 0}", "model.lora.r must be at least 1, got 0"),
        ("model.lora={alpha: 0}", "model.lora.alpha must be above 0, got 0.0"),
        ("model.lora={dropout: 1}", "model.lora.dropout must be at least 0 and below 1, got 1.0"),
        ("model.lora={target_modules: []}", "model.lora.target_modules must be a list of at least one, got []"),
        ("model.lora=16", "model.lora must be a mapping or null, got 16"),
        ("grpo.logging_strategy=epoch", "grpo.logging_strategy must not be set ... metrics are written"),
        ("grpo.resume_from_checkpoint=nope", "must not be set, got 'nope': train --resume RUN goes on with a run"),
        ("grpo.resume_from_checkpoint=", "must not be set, got None: train --resume RUN goes on with a run"),
        ("grpo.eval_strategy=steps", "grpo.eval_strategy must not be set ... a run evaluates before and after"),
        ("grpo.load_best_model_at_end=true", "must not be set, got True: a run evaluates before and after"),
        ("grpo.per_device_eval_batch_size=2", "a run evaluates before and after"),
        ("grpo.push_to_hub=true", "grpo.push_to_hub must not be set ... nothing is uploaded"),
        ("grpo.hub_model_id=me/mine", "grpo.hub_model_id must not be set ... nothing is uploaded"),
        ("grpo.num_train_epochs=1", "grpo.max_steps says how long a run is"),
        ("grpo.chat_template_kwargs={enable_thinking: false}", "evaluation asks without them"),
        ("grpo.generation_batch_size=8", "grpo.steps_per_generation says"),
        ("grpo.remove_unused_columns=true", "the task gives the prompts"),
        ("grpo.optim=lion", "the optimizer is grpo.optimizer"),
        ("model.dtype=int8", "model.dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        ("model.dtype=complex64", "must be one of float32"),
        ("model.path=''", "model.path must be the name of a folder, got ''"),
        ("rhythm.mode=couple", "rhythm.mode must be one of local, global, coupled ... got 'couple'"),
        ("rhythm.gamma_amp=.nan", "rhythm.gamma_amp must be a finite number, got nan"),
        ("rhythm.top=0", "rhythm.top must be above 0 and at most 1, got 0.0"),
        ("rhythm.window=0", "rhythm.window must be at least 1, got 0"),
        ("rhythm.horizon=[10]", "must be a list of 2: a whole number, a whole number or null, got [10]"),
        ("rhythm.horizon=[10, 5]", "rhythm.horizon[1] must be at least 10, got 5"),
        ("rhythm.head_quantile=0", "rhythm.head_quantile must be above 0 and at most 1, got 0.0"),
        ("rhythm.groups=nope.json", "rhythm.groups must be a file that ... 'nope.json': No such file"),
        ("rhythm.groups=''", "rhythm.groups must be a file that HeadGroups.save wrote, got ''"),
        (f"rhythm.groups={ROOT}", f"got '{ROOT}': Is a directory"),
        (f"rhythm.groups={ROOT / 'pyproject.toml'}", "path must be a file of head groups"),
        ("output.path=''", "output.path must be the name of a folder, got ''"),
        ("output.path=' '", "output.path must be the name of a folder, got ' '"),
        ('output.path="a\\0b"', "must be the name of a folder"),
        ("output.path=/", "output.path must be a folder of the run's own, got '/'"),
        ("output.path=3", "output.path must be a word, got 3"),
        (f"output.path={TINY}", f"File exists: '{TINY}'"),
        (f"output.path={TINY}/run", f"Not a directory: '{TINY}/run'"),
        ("output.path=/proc/nope/run", "No such file or directory: '/proc/nope'"),
        ("grpo=3", "an override must be section.key=value, got 'grpo=3'"),
        ("grpo.loss_type=sapo grpo.sapo_temperature_neg=0", "grpo.sapo_temperature_neg must be above 0, got 0.0"),
        ("grpo.sapo_temperature_neg=2", "nothing heeds it without grpo.loss_type=sapo"),
        (
            "grpo.dataloader_persistent_workers=true",
            "must not be set, got True: with workers that stay, a run that goes",
        ),
        ("grpo.save_steps=1", "must not be set, got 1: output.checkpoint_steps and output.checkpoints_kept say it"),
        ("grpo.save_total_limit=2", "output.checkpoint_steps and output.checkpoints_kept say it"),
        ("grpo.save_strategy=epoch", "output.checkpoint_steps and output.checkpoints_kept say it"),
        ("output.checkpoint_steps=0", "output.checkpoint_steps must be at least 1, got 0"),
        ("output.checkpoints_kept=0", "output.checkpoints_kept must be at least 1, got 0"),
        ("grpo.gradient_checkpointing_kwargs={debug: true}", "without grpo.gradient_checkpointing=true"),
        ("grpo.vllm_mode=server", "nothing heeds it without grpo.use_vllm=true"),
        ("grpo.generation_kwargs={temperature: 0}", "must not hold temperature, got 0: grpo.temperature says it"),
        ("grpo.generation_kwargs={top_p: 7}", "grpo.generation_kwargs must not hold top_p ... grpo.top_p says"),
        ("grpo.generation_kwargs={max_length: 4}", "must not hold max_length, got 4: grpo.max_completion_length says"),
        ("grpo.generation_kwargs={max_new_tokens: 3}", "max_new_tokens, got 3: grpo.max_completion_length says"),
        ("grpo.generation_kwargs={num_return_sequences: 2}", "num_return_sequences, got 2: grpo.num_generations says"),
        ("grpo.generation_kwargs={pad_token_id: 0}", "the tokens are those of the model's tokenizer"),
        ("grpo.generation_kwargs={output_scores: true}", "of a response, its tokens are read"),
        ("grpo.generation_kwargs={nonsense: 1}", "nonsense, got 1: transformers' GenerationConfig has no such field"),
        ("grpo.generation_kwargs={1: 1}", "must not hold 1, got 1: transformers' GenerationConfig"),
        ("grpo.generation_kwargs={early_stopping: maybe}", "`early_stopping` must be a boolean or 'never'"),
        ("grpo.generation_kwargs={typical_p: 7}", "generation_kwargs.typical_p must be above 0 and at most 1, got 7"),
        ("grpo.generation_kwargs={a: 1, a: 2}", "line 1: a is given twice, first in line 1"),
        ("grpo.generation_kwargs=" + "{a: " * 60 + "}" * 60, "nested deeper than 50"),
        ("grpo.generation_kwargs=&x {a: *x}", "found unconstructable recursive node"),
        ("grpo.max_steps=!!int ''", "must be YAML, got \"!!int ''\": IndexError"),
        ("grpo.accelerator_config=/none.json", "must be a file of JSON, got '/none.json': No such file"),
        (f"grpo.accelerator_config={TINY}", f"got '{TINY}': Expecting value"),
        ("grpo.accelerator_config={nonsense: 1}", "unexpected keyword argument 'nonsense'"),
        ("grpo.warmup_ratio=0.1", "use warmup_steps=0.1, where a number below 1 is a share of the steps"),
        ("grpo.warmup_steps=1.5", "a whole number of steps, or below 1 a share of them"),
        ("model.dtype=float16 grpo.temperature=0.001", "grpo.temperature must be at least 0.01 with ... got 0.001"),
        ("model.dtype=float16 eval.temperature=0.001", "eval.temperature must be at least 0.01 with ... got 0.001"),
    ],
)
def test_before_the_model(refused, monkeypatch, override, message):
    monkeypatch.setattr(training, "load", lambda *_: pytest.fail("the model was loaded"))
    error = refused(*re.split(r" (?=\w+\.\w+=)", override))
    assert all(part in error for part in message.split(" ... ")), error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.use_vllm=true", "grpo.use_vllm must be false, got True: the package vllm is not installed"),
        ("grpo.use_liger_kernel=true", "must be false, got True: the package liger_kernel is not installed"),
        ("grpo.report_to=wandb", "grpo.report_to must be none, got 'wandb': the package wandb is not installed"),
        ("grpo.report_to=[wandb]", "grpo.report_to must be none, got ['wandb']: the package wandb is not installed"),
        ("grpo.report_to=tensorboard", "must be none, got 'tensorboard': the package tensorboard is not installed"),
        ("model.lora={r: 8}", "model.lora must be null, got {'r': 8}: the package peft is not installed"),
    ],
)
def test_packages_that_are_not_there(refused, monkeypatch, override, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(override).endswith(f"{message}\n")


def test_settings_of_an_engine_that_the_run_does_not_use(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    server = ("grpo.use_vllm=true", "grpo.vllm_mode=server")
    assert "without grpo.vllm_mode=colocate" in refused(*server, "grpo.vllm_gpu_memory_utilization=0.5")
    assert "without grpo.vllm_mode=server" in refused(server[0], "grpo.vllm_server_base_url=http://localhost:8000")
    taken = trainer_config(load_recipe(TINY, [*server, "grpo.vllm_server_host=HOST", "grpo.vllm_server_port=8001"]))
    assert (taken.vllm_mode, taken.vllm_server_host, taken.vllm_server_port) == ("server", "HOST", 8001)
    colocated = ["grpo.vllm_gpu_memory_utilization=0.5", "grpo.vllm_tensor_parallel_size=2"]
    assert trainer_config(load_recipe(TINY, [server[0], *colocated])).vllm_mode == "colocate"


def test_reports_elsewhere(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("WANDB_PROJECT", "another")
    words = ["grpo.report_to=[wandb, tensorboard]", "grpo.project=rhythm", "output.path=runs/first"]
    config = trainer_config(load_recipe(TINY, words))
    assert (config.report_to, config.run_name) == (["wandb", "tensorboard"], "first")
    assert os.environ["WANDB_PROJECT"] == "rhythm"


def test_settings_of_several_processes(monkeypatch):
    words = ["grpo.ddp_timeout=7200", "grpo.ddp_find_unused_parameters=false"]
    with pytest.raises(RecipeError, match="without several processes"):
        trainer_config(load_recipe(TINY, words))
    monkeypatch.setattr(RhythmGRPOConfig, "world_size", 2)
    for name in ("split_batches", "dispatch_batches"):  # of which a process would get a part as if it were all
        with pytest.raises(
            RecipeError, match="accelerator_config must hold neither split_batches nor dispatch_batches"
        ):
            trainer_config(load_recipe(TINY, [f"grpo.accelerator_config={{{name}: true}}"]))
    config = trainer_config(load_recipe(TINY, words))
    assert (config.ddp_timeout, config.ddp_find_unused_parameters) == (7200, False)


def test_a_world_without_a_launcher_is_of_another_program(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    trainer_config(load_recipe(TINY))
    assert "WORLD_SIZE" not in os.environ  # where accelerate would read it


def test_the_recipe_says_the_precision_and_not_the_launch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RecipeError, match="mixed_precision of accelerate must be no, got bf16: the recipe says it"):
        trainer_config(load_recipe(TINY))
    assert trainer_config(load_recipe(TINY, ["grpo.bf16=true"])).mixed_precision == "bf16"


def test_half_precision_that_would_be_ignored(refused):
    if torch.cuda.is_available():
        assert "with model.dtype=float16" in refused("grpo.fp16=true", "model.dtype=float16")
    else:
        assert "grpo.fp16 must be false without a GPU" in refused("grpo.fp16=true")


@pytest.mark.parametrize(
    "content",
    [
        b"task: [1, 2\n x: :",
        b"task: !!python/object/apply:os.system ['echo']\n",
        b"\xff\xfe\x00",
        b"[" * 400,
        b"",
        b"task: &a {level: *a}\n",
        b"grpo: {seed: 1}\ntask: {}\ngrpo: {seed: 2}\n",
        b"grpo:\n  seed: 1\n  seed: 2\n",
    ],
)
def test_files_that_are_no_recipe(refused, tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert refused(recipe=str(path)).startswith(f"{path}: ")


@pytest.mark.parametrize("content", ["grpo: []\n", "grpo: 0\n", "task: [3]\n"])
def test_sections_that_hold_no_settings(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match="must be a mapping of settings, got"):
        load_recipe(path)


def test_a_key_given_twice_is_named_with_its_lines(tmp_path):
    """But not one that a merge brings along, which the own one overrules; and an alias stands for what it names."""
    path = tmp_path / "recipe.yaml"
    path.write_text("grpo:\n  seed: 1\n  beta: 0\n  seed: 2\n")
    with pytest.raises(RecipeError, match=f"{path}: not YAML: line 4: seed is given twice, first in line 2"):
        load_recipe(path)
    path.write_text(
        "task: {name: countdown}\nmodel: {path: null}\ngrpo: &g {seed: 1, beta: 0.5}\neval: {seed: &s 4, size: *s}\n"
    )
    assert (load_recipe(path).eval.seed, load_recipe(path).eval.size) == (4, 4)
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")["b"] == {"x": 3, "y": 2}


def test_paths_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    recipe = load_recipe(TINY, ["output.path=~/run", "model.path=~/model", "rhythm.groups=~/groups.json"])
    assert (recipe.output.path, recipe.model.path) == ("/home/her/run", "/home/her/model")
    assert recipe.rhythm.groups == "/home/her/groups.json"


@pytest.mark.parametrize(("given", "steps"), [("0.1", 2), ("3", 3), ("2.0", 2), ("0", 0)])
def test_a_warmup_below_one_is_a_share(given, steps, tmp_path):
    recipe = load_recipe(TINY, [f"grpo.warmup_steps={given}", "grpo.max_steps=20", f"output.path={tmp_path}"])
    assert trainer_config(recipe).get_warmup_steps(20) == steps


def test_good_values_keep_their_meaning():
    """What YAML 1.1 reads otherwise than it was meant, and what TRL takes beside words."""
    changed = ["grpo.epsilon=2e-1", "grpo.scale_rewards=false", "grpo.top_k=5"]
    changed += ["grpo.lr_scheduler_kwargs={num_cycles: 2}", "grpo.delta=null", "grpo.bf16=true", "grpo.min_p=1e-2"]
    assert load_recipe(TINY, changed).grpo.more == {
        "gradient_checkpointing": False,
        "epsilon": 0.2,
        "scale_rewards": False,
        "top_k": 5,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "delta": None,
        "bf16": True,
        "min_p": 0.01,
    }
    assert load_recipe(TINY, ["grpo.lr_scheduler_type=cosine", "grpo.loss_type=cispo"]).grpo.loss_type == "cispo"
    assert checked("x", 3, typing.Literal["three", 3]) == 3
    with pytest.raises(RecipeError, match="x must be one of three, 1, got True"):
        checked("x", True, typing.Literal["three", 1])


def test_the_words_are_those_of_the_installed_trl():
    """TRL tells its words in its help alone: a release that has others shows here."""
    from trl import GRPOConfig

    fields = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    for name, words in {"loss_type": LossType, **TRL_WORDS}.items():
        said = fields[name].metadata["help"]
        assert all(str(word) in said for word in typing.get_args(words)), name
    supported = re.search(r"Supported values are (.*?)\.", fields["loss_type"].metadata["help"])
    assert set(re.findall(r"'(\w+)'", supported[1])) == set(typing.get_args(LossType))
    for names, _ in _REFUSED:  # no reason without a field
        assert any(re.fullmatch(names, name) for name in fields), names


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), hidden=16, layers=2, heads=2)


def test_what_the_model_and_the_trainer_refuse(refused, model, tmp_path):
    """Late refusals, all in one: each needs a model, most a trainer; none costs an evaluation or leaves a folder."""
    other, bare, cut, deep = (tmp_path / name for name in ("other.json", "bare", "cut", "deep"))
    other.write_text('{"local": [[90, 0]], "global": [[0, 0]]}')
    shutil.copytree(model, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    del settings["pad_token"], settings["eos_token"]
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(model, cut)
    os.truncate(cut / "model.safetensors", 100)
    lists = [Path(shutil.copytree(model, tmp_path / name), f"{name}.json") for name in ("tokenizer_config", "config")]
    for path in lists:
        path.write_text("[]")
    shutil.copytree(model, deep)
    (deep / "config.json").write_text('{"a": ' + "[" * 200_000)
    (shutil.copytree(model, tmp_path / "none") / "tokenizer.json").write_text("{}")
    checkpointing = "grpo.gradient_checkpointing=true"
    for words, message in (
        (["model.path=no/such/model"], "model: no/such/model cannot be loaded"),
        ([f"model.path={ROOT / 'docs'}"], f"model: {ROOT / 'docs'} cannot be loaded"),
        ([f"model.path={cut}"], f"model: {cut} cannot be loaded"),
        *(([f"model.path={path.parent}"], f"{path}: it must be a mapping, got []") for path in lists),
        ([f"model.path={deep}"], f"{deep / 'config.json'}: nested too deep"),
        ([f"model.path={tmp_path / 'none'}"], f"model: {tmp_path / 'none'} cannot be loaded: "),
        ([f"model.path={bare}"], "task.prompt must suit the tokenizer, got 'tiny': Asking to pad"),
        (["model.attn_implementation=flsh"], '`attn_implementation="flsh"` is not supported'),
        (["task.prompt=chat", "task.level=paper"], "task.prompt must suit the tokenizer, got 'chat': Cannot"),
        (["grpo.max_completion_length=10000000"], "must be at most 246, got 10000000: the model has 256 positions"),
        (["rhythm.layers=[99]"], "layers must have softmax attention to measure, got layer 99"),
        (["rhythm.layers=[99]", "rhythm.mode=uniform"], "layers must have softmax attention to measure, got layer 99"),
        ([f"rhythm.groups={other}"], "groups.local must be of layers with softmax attention to measure, got layer 90"),
        (["grpo.sync_ref_model=true"], "sync_ref_model=True"),
        (["grpo.lr_scheduler_kwargs={foo: 1}"], "foo"),
        ([*HARD, "grpo.lr_scheduler_kwargs={num_cycles: abc}"], "grpo.lr_scheduler_kwargs: ValueError"),
        (["grpo.lr_scheduler_type=polynomial", "grpo.lr_scheduler_kwargs={power: -1}", *HARD[1:]], "ZeroDivisionError"),
        ([checkpointing, "grpo.gradient_checkpointing_kwargs={nonsense: 1}"], "grpo.gradient_checkpointing_kwargs: "),
        (["grpo.torch_compile_mode=max"], "grpo.torch_compile_mode: RuntimeError: Unrecognized mode=max"),
        (
            ["grpo.dataloader_multiprocessing_context=nonsense"],
            "grpo.dataloader_*: ValueError: multiprocessing_context",
        ),
        ([WORKER, "grpo.dataloader_multiprocessing_context=nonsense"], "should specify a valid start method"),
        (["grpo.generation_kwargs={num_beams: abc}"], "grpo.generation_kwargs and the settings of sampling: "),
        (["grpo.cache_implementation=nonsense"], "cache_implementation"),
        (["grpo.lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
        (["task.train_size=5000"], "the train pool of level 'tiny' with 3 numbers gave"),
    ):
        assert message in refused(f"model.path={model}", *words)


def test_trying_leaves_no_trace(model, tmp_path):
    recipe = load_recipe(TINY, [*FEW, f"model.path={model}", f"output.path={tmp_path}", WORKER, HARD[0]])
    task = make(recipe.task)
    parts, recorder = load(recipe), Recorder(tmp_path / "metrics.jsonl", 1)
    trainer = build_trainer(recipe, trainer_config(recipe), *parts, task, recorder)
    before, state = trainer.model.train(), torch.get_rng_state()
    limits = trainer.generation_config.to_dict()
    try_out(trainer, [[5, 6, 7]] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.lr_scheduler is None and before.training and trainer.generation_config.to_dict() == limits


def test_a_model_that_loads_but_does_not_run(refused, model, monkeypatch):
    def forward(*_, **__):
        raise RuntimeError("this kernel takes\nhalf precision only")

    monkeypatch.setattr("transformers.Qwen3ForCausalLM.forward", forward)
    assert refused(f"model.path={model}") == (
        "model: cannot run with attn_implementation=sdpa and dtype=float32: this kernel takes half precision only\n"
    )

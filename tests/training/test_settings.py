"""Settings that are wrong: one line that names the setting, status 2, and nothing loaded, measured or changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import sys
import typing
from pathlib import Path

import pytest
import torch
import yaml

from training import train as training
from training.__main__ import main
from training.folder import replacing, saving
from training.grpo import Recorder, build_trainer, trainer_config
from training.models import load
from training.puzzles import Countdown, reward_functions
from training.reading import read_yaml
from training.recipe import ROOT, RecipeError, load_recipe
from training.settings import _REFUSED, TRL_WORDS, LossType, checked
from training.trials import try_out
from training.warmstart.model import build_model, build_tokenizer

TINY = str(ROOT / "training" / "recipes" / "countdown_tiny.yaml")
FEW = ["task.numbers=[3]", "task.train_size=8", "eval.size=4", "grpo.per_device_train_batch_size=4"]
HARD = ["grpo.lr_scheduler_type=cosine_with_restarts", "grpo.max_steps=3"]
WORKER = "grpo.dataloader_num_workers=1"
FEW += ["grpo.num_generations=2", "grpo.max_completion_length=8", "grpo.max_steps=1"]


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


# Each is refused before the model is loaded, by a message that holds the second column.
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("grpo.max_steps=-1", "grpo.max_steps is -1: it must be at least 1"),
        ("grpo.max_steps=1000000000000000000000", "a whole number below 2**63"),
        ("grpo.max_steps=2001-99-99", "is not YAML"),
        (f"grpo.seed={'1' * 5000}", "is not YAML"),
        ("grpo.seed=-1", "grpo.seed is -1: it must be at least 0 and below 2**32"),
        (f"grpo.seed={2**40}", "at least 0 and below 2**32"),
        ("grpo.data_seed=-1", "grpo.data_seed is -1"),
        ("eval.seed=-1", "eval.seed is -1: it must be at least 0 and below 2**32"),
        (f"eval.seed={2**70}", "it must be a whole number below 2**63"),
        ("eval.temperature=.inf", "eval.temperature is inf: it must be a finite number"),
        ("eval.temperature=-1", "eval.temperature is -1.0: it must be at least 0, where 0 is greedy"),
        ("eval.batch_size=0", "eval.batch_size is 0: it must be at least 1"),
        ("eval.size=1000000000", "eval.size is 1000000000: it must be at least 1 and at most 1000000"),
        ("task.train_size=1000000000", "at least 1 and at most 1000000"),
        ("task.train_size=0", "task.train_size is 0"),
        ("task.numbers=[1]", "numbers must be between 2 and 6, got [1]"),
        ("task.numbers=[]", "numbers must be between 2 and 6, got []"),
        ("task.numbers=[9]", "numbers must be between 2 and 6, got [9]"),
        ("task.numbers=[0]", "numbers must be between 2 and 6, got [0]"),
        ("task.name=chess", "task.name is 'chess': it must be one of countdown"),
        ("task.level=hard", "task.level is 'hard': it must be one of paper, tiny"),
        ("grpo.rewards=[]", "grpo.rewards is []: it must be a list of at least one"),
        ("grpo.rewards=[corectness]", "grpo.rewards holds 'corectness': known are score, correctness"),
        ("grpo.rewards=correctness", "grpo.rewards is 'correctness': it must be a list, each entry a word"),
        ("grpo.per_device_train_batch_size=5", "(5) must be divisible by num_generations (2)"),
        ("grpo.per_device_train_batch_size=0", "it must be at least 1"),
        ("grpo.num_generations=1", "grpo.num_generations is 1: it must be at least 2"),
        ("grpo.learning_rate=fast", "grpo.learning_rate is 'fast': it must be a number"),
        ("grpo.learning_rate=.nan", "grpo.learning_rate is nan: it must be a finite number"),
        ("grpo.learning_rate=-1", "grpo.learning_rate is -1.0: it must be at least 0"),
        ("grpo.weight_decay=-.inf", "grpo.weight_decay is -inf: it must be a finite number"),
        (f"grpo.beta={10**400}", "it must be a number"),
        ("grpo.beta=abc", "grpo.beta is 'abc': it must be a number"),
        ("grpo.adam_beta1=1", "grpo.adam_beta1 is 1.0: it must be at least 0 and below 1"),
        ("grpo.num_iterations=abc", "grpo.num_iterations is 'abc': it must be a whole number"),
        ("grpo.num_iterations=1.5", "grpo.num_iterations is 1.5: it must be a whole number"),
        ("grpo.num_iterations=0", "grpo.num_iterations is 0: it must be at least 1"),
        ("grpo.top_entropy_quantile=[1]", "grpo.top_entropy_quantile is [1]: it must be a number"),
        ("grpo.top_entropy_quantile=2", "it must be at least 0 and at most 1"),
        ("grpo.epsilon=abc", "grpo.epsilon is 'abc': it must be a number"),
        ("grpo.top_p=0", "grpo.top_p is 0.0: it must be above 0 and at most 1"),
        ("grpo.min_p=oft", "grpo.min_p is 'oft': it must be a number or null"),
        ("grpo.save_steps=abc", "grpo.save_steps is 'abc': it must be a number"),
        ("grpo.pad_to_multiple_of=0", "grpo.pad_to_multiple_of is 0: it must be at least 1"),
        ("grpo.gradient_checkpointing=maybe", "it must be true or false"),
        ("grpo.lr_scheduler_kwargs=3", "it must be a group of settings or a word or null"),
        ("grpo.lr_scheduler_type=liner", "grpo.lr_scheduler_type is 'liner': it must be one of linear, cosine"),
        ("grpo.lr_scheduler_type=reduce_lr_on_plateau", "requires an eval strategy"),
        ("grpo.save_strategy=often", "grpo.save_strategy is 'often': it must be one of no, steps, epoch, best"),
        ("grpo.loss_type=dap", "grpo.loss_type is 'dap': it must be one of grpo, dr_grpo, dapo"),
        ("grpo.importance_sampling_level=word", "it must be one of token, sequence"),
        ("grpo.importance_sampling_level=sequence", "must be 'token' for rhythm_mode='coupled'"),
        ("grpo.scale_rewards=maybe", "grpo.scale_rewards is 'maybe': it must be one of group, batch, none"),
        ("grpo.multi_objective_aggregation=sum", "it must be one of sum_then_normalize, normalize_then_sum"),
        ("grpo.max_completion_length=0", "grpo.max_completion_length is 0: it must be at least 1"),
        ("grpo.max_completion_length=-5", "grpo.max_completion_length is -5: it must be at least 1"),
        ("grpo.temperature=0", "grpo.temperature is 0.0: it must be above 0"),
        ("grpo.temperature=-1", "grpo.temperature is -1.0: it must be above 0"),
        ("grpo.gradient_accumulation_steps=0", "it must be at least 1"),
        ("grpo.steps_per_generation=0", "it must be at least 1"),
        ("grpo.warmup_steps=-1", "grpo.warmup_steps is -1: it must be at least 0"),
        ("grpo.auto_find_batch_size=true", "auto_find_batch_size is not supported by GRPO"),
        ("grpo.deepspeed=x.json", "grpo.deepspeed: a run is one process"),
        ("grpo.fsdp=full_shard", "grpo.fsdp: a run is one process"),
        ("grpo.report_to=wandb", "grpo.report_to: metrics are written to metrics.jsonl"),
        ("grpo.logging_strategy=epoch", "grpo.logging_strategy: metrics are written to metrics.jsonl"),
        ("grpo.resume_from_checkpoint=nope", "runs cannot be resumed yet"),
        ("grpo.eval_strategy=steps", "grpo.eval_strategy: a run evaluates before and after"),
        ("grpo.load_best_model_at_end=true", "grpo.load_best_model_at_end: a run evaluates before and after"),
        ("grpo.per_device_eval_batch_size=2", "a run evaluates before and after"),
        ("grpo.push_to_hub=true", "grpo.push_to_hub: nothing is uploaded"),
        ("grpo.hub_model_id=me/mine", "grpo.hub_model_id: nothing is uploaded"),
        ("grpo.num_train_epochs=1", "grpo.max_steps says how long a run is"),
        ("grpo.generation_batch_size=8", "grpo.steps_per_generation says"),
        ("grpo.remove_unused_columns=true", "the task gives the prompts"),
        ("grpo.optim=lion", "the optimizer is grpo.optimizer"),
        ("model.dtype=int8", "model.dtype is 'int8': it must be one of float32, bfloat16, float16, float64"),
        ("model.dtype=complex64", "it must be one of float32"),
        ("model.path=''", "model.path is '': it must be the name of a folder"),
        ("rhythm.mode=couple", "rhythm.mode is 'couple': it must be one of local, global, coupled"),
        ("rhythm.gamma_amp=.nan", "rhythm.gamma_amp is nan: it must be a finite number"),
        ("rhythm.top=0", "rhythm.top must be above 0 and at most 1, got 0.0"),
        ("rhythm.window=0", "rhythm.window must be at least 1, got 0"),
        ("rhythm.horizon=[10]", "it must be a list of 2: a whole number, a whole number or null"),
        ("rhythm.horizon=[10, 5]", "rhythm.horizon[1] must be at least 10, got 5"),
        ("rhythm.head_quantile=0", "rhythm.head_quantile must be above 0 and at most 1, got 0.0"),
        (
            "rhythm.groups=nope.json",
            "rhythm.groups must be a file that HeadGroups.save wrote, got 'nope.json': No such file",
        ),
        ("rhythm.groups=''", "rhythm.groups must be a file that HeadGroups.save wrote, got ''"),
        (f"rhythm.groups={ROOT}", f"got '{ROOT}': Is a directory"),
        (f"rhythm.groups={ROOT / 'pyproject.toml'}", "pyproject.toml: not a file of head groups"),
        ("output.path=''", "output.path is '': it must be the name of a folder"),
        ("output.path=' '", "output.path is ' ': it must be the name of a folder"),
        ('output.path="a\\0b"', "it must be the name of a folder"),
        ("output.path=/", "/: a run needs a folder of its own"),
        ("output.path=3", "output.path is 3: it must be a word"),
        (f"output.path={TINY}", f"File exists: '{TINY}'"),
        (f"output.path={TINY}/run", f"Not a directory: '{TINY}/run'"),
        ("output.path=/proc/nope/run", "No such file or directory: '/proc/nope'"),
        ("grpo=3", "an override is typed group.key=value"),
        ("grpo.loss_type=sapo grpo.sapo_temperature_neg=0", "grpo.sapo_temperature_neg is 0.0: it must be above 0"),
        ("grpo.sapo_temperature_neg=2", "nothing heeds it without grpo.loss_type=sapo"),
        ("grpo.save_steps=1", "grpo.save_steps is 1.0: nothing heeds it without grpo.save_strategy=steps"),
        ("grpo.save_total_limit=2", "nothing heeds it without grpo.save_strategy=steps"),
        ("grpo.save_only_model=true", "nothing heeds it without grpo.save_strategy=steps"),
        ("grpo.save_strategy=epoch grpo.save_steps=1", "nothing heeds it without grpo.save_strategy=steps"),
        ("grpo.gradient_checkpointing_kwargs={debug: true}", "without grpo.gradient_checkpointing=true"),
        ("grpo.vllm_mode=server", "nothing heeds it without grpo.use_vllm=true"),
        ("grpo.generation_kwargs={temperature: 0}", "grpo.generation_kwargs holds temperature: grpo.temperature"),
        ("grpo.generation_kwargs={top_p: 7}", "grpo.generation_kwargs holds top_p: grpo.top_p says it"),
        ("grpo.generation_kwargs={max_length: 4}", "holds max_length: grpo.max_completion_length says"),
        ("grpo.generation_kwargs={max_new_tokens: 3}", "holds max_new_tokens: grpo.max_completion_length says"),
        ("grpo.generation_kwargs={num_return_sequences: 2}", "num_return_sequences: grpo.num_generations says"),
        ("grpo.generation_kwargs={pad_token_id: 0}", "the tokens are those of the model's tokenizer"),
        ("grpo.generation_kwargs={output_scores: true}", "of a response, its tokens are read"),
        ("grpo.generation_kwargs={nonsense: 1}", "nonsense: transformers' GenerationConfig has no such field"),
        ("grpo.generation_kwargs={1: 1}", "grpo.generation_kwargs holds 1: transformers' GenerationConfig"),
        ("grpo.generation_kwargs={early_stopping: maybe}", "`early_stopping` must be a boolean or 'never'"),
        ("grpo.generation_kwargs={typical_p: 7}", "typical_p: it is 7 and must be above 0 and at most 1"),
        ("grpo.generation_kwargs={a: 1, a: 2}", "line 1: a is given twice, first in line 1"),
        ("grpo.generation_kwargs=" + "{a: " * 60 + "}" * 60, "nested deeper than 50"),
        ("grpo.generation_kwargs=&x {a: *x}", "found unconstructable recursive node"),
        ("grpo.max_steps=!!int ''", "is not YAML: IndexError"),
        ("grpo.accelerator_config=/none.json", "grpo.accelerator_config is '/none.json': No such file or directory"),
        (f"grpo.accelerator_config={TINY}", f"grpo.accelerator_config is '{TINY}': Expecting value"),
        ("grpo.accelerator_config={nonsense: 1}", "unexpected keyword argument 'nonsense'"),
        ("grpo.warmup_ratio=0.1", "use warmup_steps=0.1, where a number below 1 is a share of the steps"),
        ("grpo.warmup_steps=1.5", "a whole number of steps, or below 1 a share of them"),
        ("model.dtype=float16 grpo.temperature=0.001", "grpo.temperature is 0.001: it must be at least 0.01"),
        ("model.dtype=float16 eval.temperature=0.001", "eval.temperature is 0.001: it must be at least 0.01"),
    ],
)
def test_before_the_model(refused, monkeypatch, override, message):
    monkeypatch.setattr(training, "load", lambda *_: pytest.fail("the model was loaded"))
    assert message in refused(*re.split(r" (?=\w+\.\w+=)", override))


@pytest.mark.parametrize(("name", "package"), [("use_vllm", "vllm"), ("use_liger_kernel", "liger_kernel")])
def test_packages_that_are_not_there(refused, monkeypatch, name, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(f"grpo.{name}=true") == f"grpo.{name} is True: the package {package} is not installed\n"


def test_half_precision_that_would_be_ignored(refused):
    if torch.cuda.is_available():
        assert "model.dtype that is not float16" in refused("grpo.fp16=true", "model.dtype=float16")
    else:
        assert "grpo.fp16 is True: it needs a GPU" in refused("grpo.fp16=true")


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
def test_groups_that_hold_no_settings(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match="must hold settings"):
        load_recipe(path)


def test_a_key_given_twice_is_named_with_its_lines(tmp_path):
    """But not one that a merge brings along, which the own one overrules; and an alias stands for what it names."""
    path = tmp_path / "recipe.yaml"
    path.write_text("grpo:\n  seed: 1\n  beta: 0\n  seed: 2\n")
    with pytest.raises(RecipeError, match=f"{path}: not YAML: line 4: seed is given twice, first in line 2"):
        load_recipe(path)
    path.write_text("grpo: &g {seed: 1, beta: 0.5}\neval: {seed: &s 4, size: *s}\n")
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
    changed = ["grpo.epsilon=2e-1", "grpo.save_strategy=no", "grpo.scale_rewards=false", "grpo.top_k=5"]
    changed += ["grpo.lr_scheduler_kwargs={num_cycles: 2}", "grpo.delta=null", "grpo.bf16=true", "grpo.min_p=1e-2"]
    assert load_recipe(TINY, changed).grpo.more == {
        "gradient_checkpointing": False,
        "epsilon": 0.2,
        "save_strategy": "no",
        "scale_rewards": False,
        "top_k": 5,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "delta": None,
        "bf16": True,
        "min_p": 0.01,
    }
    assert load_recipe(TINY, ["grpo.lr_scheduler_type=cosine", "grpo.loss_type=cispo"]).grpo.loss_type == "cispo"
    assert checked("x", 3, typing.Literal["three", 3]) == 3
    with pytest.raises(RecipeError, match="x is True: it must be one of three, 1"):
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
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden=16, layers=2, heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


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
        *(([f"model.path={path.parent}"], f"{path}: it is not a group of values") for path in lists),
        ([f"model.path={deep}"], f"{deep / 'config.json'}: nested too deep"),
        ([f"model.path={tmp_path / 'none'}"], f"model: {tmp_path / 'none'} cannot be loaded: "),
        ([f"model.path={bare}"], "task.prompt is 'tiny': Asking to pad"),
        (["model.attn_implementation=flsh"], '`attn_implementation="flsh"` is not supported'),
        (["task.prompt=chat", "task.level=paper"], "task.prompt is 'chat': Cannot use chat template functions"),
        (["grpo.max_completion_length=10000000"], "it must be at most 246, as the model has 256 positions"),
        (["rhythm.layers=[99]"], "layers: layer 99 has no softmax attention to measure"),
        (["rhythm.layers=[99]", "rhythm.mode=uniform"], "layers: layer 99 has no softmax attention to measure"),
        ([f"rhythm.groups={other}"], "groups.local: layer 90 has no softmax attention"),
        (["grpo.sync_ref_model=true"], "sync_ref_model=True"),
        (["grpo.save_strategy=best"], "metric_for_best_model"),
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
    task = Countdown(recipe.task)
    parts, recorder = load(recipe), Recorder(tmp_path / "metrics.jsonl", 1)
    trainer = build_trainer(recipe, trainer_config(recipe), *parts, task, reward_functions(["score"] * 3), recorder)
    before, state = trainer.model.train(), torch.get_rng_state()
    limits = trainer.generation_config.to_dict()
    try_out(trainer, ["1 2 3 ="] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.lr_scheduler is None and before.training and trainer.generation_config.to_dict() == limits


def test_a_model_that_loads_but_does_not_run(refused, model, monkeypatch):
    def forward(*_, **__):
        raise RuntimeError("this kernel takes\nhalf precision only")

    monkeypatch.setattr("transformers.Qwen3ForCausalLM.forward", forward)
    assert refused(f"model.path={model}") == (
        "model: cannot run with attn_implementation=sdpa and dtype=float32: this kernel takes half precision only\n"
    )


def test_faults_of_the_program_show_where(tmp_path, monkeypatch):
    def wrong(*_):
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(training, "load", wrong)
    with pytest.raises(AttributeError, match="a fault of ours"):
        main(["train", TINY, *FEW, f"output.path={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [ImportError("No module named 'trl'"), UnicodeError("no such\nletter"), OSError(28, "No space left", "a/file")],
)
def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    for module, command in (
        ("train.load", "train"),
        ("evaluate_run.read_run", "evaluate"),
        ("compare.read_run", "compare"),
    ):
        monkeypatch.setattr(f"training.{module}", fail)
        words = [TINY, *FEW, f"output.path={tmp_path / 'run'}"] if command == "train" else [str(tmp_path)]
        assert main([command, *words]) == 2
        assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


@pytest.fixture
def small_disk():
    """A disk on which no file grows beyond 4 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_names_the_file(small_disk, tmp_path):
    """Python's own writes, which know of no name, and torch's and safetensors', which are no `OSError`."""
    from safetensors.torch import save_file

    for write in (
        lambda path: path.write_text("x" * 10_000),
        lambda path: torch.save(torch.zeros(10_000), path),
        lambda path: save_file({"x": torch.zeros(10_000)}, path),
    ):
        path = tmp_path / "file"
        with pytest.raises(OSError, match=re.escape(str(path))), replacing(path) as partial:
            write(partial)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="another"), saving(path):
        raise RuntimeError("another")


def finished(folder: Path) -> Path:
    """The files of a run that `compare` and `evaluate` read."""
    folder.mkdir()
    answers = {"accuracy": 0.5, "standard_error": 0.3, "tokens": 9.0, "instances": 2, "right": "10"}
    kinds = {"sampled": answers, "greedy": answers}
    result = {
        "mode": "coupled",
        "seed": 0,
        "split": "test",
        "before": kinds,
        "after": kinds,
        "seconds": {"training": 1.0},
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n')
    (folder / "config.yaml").write_text(yaml.safe_dump(load_recipe(TINY).to_dict()))
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", '{"half": '),
        ("result.json", "{}"),
        ("result.json", "[]"),
        ("result.json", "\udcff"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"step": 1}\n{"st'),
        ("config.yaml", "a: ["),
        ("config.yaml", "{task: , model: , grpo: , rhythm: , eval: , output: }"),
        ("config.yaml", "\udcff"),
        ("config.yaml", "[" * 200),
        ("config.yaml", "task: &a {x: *a}"),
        ("config.yaml", ("grpo.seed", {})),
        ("config.yaml", ("grpo.seed", [1])),
        ("config.yaml", ("more", 3)),
        ("result.json", "[" * 200_000),
        ("metrics.jsonl", "[" * 200_000),
        ("metrics.jsonl", '{"step": "one"}'),
        ("metrics.jsonl", '{"step": 1, "accuracy": "half"}'),
        *(
            ("result.json", (name, value))
            for name in ("before", "after", "after.sampled", "before.greedy", "seconds", "after.greedy.right", "split")
            for value in (5, None, {}, [], "x")
            if (name, value) != ("split", "x")
        ),
        *(("result.json", ("mode", value)) for value in (5, None, {}, [])),
        ("result.json", ("after.sampled.accuracy", float("nan"))),
        ("result.json", ("after.sampled.instances", 3)),
        ("result.json", ("seconds.training", True)),
    ],
)
def test_runs_whose_files_are_broken(tmp_path, capsys, name, content):
    run = finished(tmp_path / "run")
    page = ["--output", str(tmp_path / "page.html")]
    assert main(["compare", str(run), *page]) == 0
    if isinstance(content, tuple):  # one value of the whole, by its name
        whole = yaml.safe_load((run / name).read_text())
        *groups, last = content[0].split(".")
        group = whole
        for key in groups:
            group = group[key]
        group[last] = content[1]
        content = json.dumps(whole)
    (run / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    capsys.readouterr()
    for words in (["compare", str(run), *page], ["evaluate", str(run)]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"error: {run}: no finished run \({re.escape(name)} .*\)\n", error)


def test_evaluate_names_the_file_whose_setting_is_wrong(tmp_path, capsys):
    run = finished(tmp_path / "run")
    (run / "model").mkdir()
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("dtype: float32", "dtype: int4"))
    assert main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: model.dtype is 'int4': it must be one of")


def test_evaluate_takes_what_it_heeds(tmp_path, capsys):
    run = finished(tmp_path / "run")
    for override in ("grpo.max_steps=5", "rhythm.mode=uniform", "output.path=x", "model.path=y"):
        assert main(["evaluate", str(run), override]) == 2
        assert f"{override!r}: evaluate trains nothing" in capsys.readouterr().err


def test_pages_that_cannot_be_written(tmp_path, capsys, request):
    run = finished(tmp_path / "run")
    for output, file in ((tmp_path, tmp_path), (run / "result.json" / "page.html", run / "result.json")):
        assert main(["compare", str(run), "--output", str(output)]) == 2
        assert str(file) in capsys.readouterr().err
    request.getfixturevalue("small_disk")
    assert main(["compare", str(run), "--output", str(tmp_path / "page.html")]) == 2
    assert re.fullmatch(rf"error: \[Errno 27\] .*: '{tmp_path / 'page.html'}'\n", capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_terminal_without_our_letters(tmp_path, monkeypatch):
    """The table holds ±, which ASCII has not: a question mark is printed, and the status is 0."""
    run, screen = finished(tmp_path / "run"), (tmp_path / "screen").open("w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["compare", str(run), "--output", str(tmp_path / "page.html")]) == 0
    screen.close()
    assert "50.0% ? 30.0%" in (tmp_path / "screen").read_text()


@pytest.mark.parametrize("name", [".", "..", "link", "project", "''", "dangling"])
def test_nothing_of_others_is_deleted(tmp_path, monkeypatch, capsys, name):
    """A run that gets as far as its first evaluation in folders that hold other things, reached in several ways."""
    project = tmp_path / "project"
    (project / "inside").mkdir(parents=True)
    for path in (tmp_path / "mine.txt", project / "model.py", project / "inside" / "config.json"):
        path.write_text("mine")
    (project / "results").mkdir()
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}

    def cut(*_):
        raise RecipeError("cut off")

    for what in ("load", "check_model", "build_trainer"):
        monkeypatch.setattr(training, what, lambda *_: (None, None))
    monkeypatch.setattr(training, "_headline", lambda *_: "")
    monkeypatch.setattr(training, "evaluate_both", cut)
    monkeypatch.chdir(project / "inside" if name == ".." else project if name in (".", "''") else tmp_path)
    for _ in range(2):
        assert main(["train", TINY, *FEW, f"output.path={name}"]) == 2
        assert ("cut off" in capsys.readouterr().err) == (name not in ("''", "dangling"))
        after = {path: path.is_file() and path.read_text() for path in tmp_path.rglob("*")}
        assert before.items() <= after.items()

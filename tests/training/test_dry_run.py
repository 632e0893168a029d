"""`train --dry-run`: what it checks, what it says that it did not check, and that it leaves nothing behind."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import Qwen3Config

from training import row_files
from training import train as training
from training.__main__ import main
from training.dry_run import command as dry
from training.dry_run import trial_model
from training.dry_run.cut_down import check_sizes, cut_down, few, left_out
from training.recipe import ROOT, RecipeError, load_recipe
from training.row_files import Unreachable
from training.stand_in import byte_tokenizer
from training.task import Task, TaskSettings

from .fake_run import interrupt
from .runs import TINY, interrupted

RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))
QWEN = ["model.path=Qwen/Qwen3-0.6B-Base", "model.architecture=Qwen3ForCausalLM"]


class Sums(Task):
    """A user's own task: two test sets, rows of its own that may be out of reach."""

    @dataclass
    class Settings(TaskSettings):
        train_size: int | None = 40
        reach: bool = True
        broken: bool = False
        deaf: bool = False

    def instances(self, split, size):
        if not self.settings.reach:
            raise Unreachable("sums.jsonl: there is no such file")
        first, end = {"test": (0, 6), "validation": (6, 14), "train": (20, 60)}[split]
        rows = [{"a": i, "answer": i + 1} for i in range(first, end)]
        if split == "test":
            rows = [row | {"set": "even" if row["a"] % 2 == 0 else "odd"} for row in rows]
        if size is not None and size > len(rows):
            raise ValueError(f"{split} has {len(rows)}")
        return rows[:size]

    def prompt(self, instance):
        return f"{instance['a']} + 1 ="

    def correct(self, response, instance):
        if self.settings.deaf:
            return False
        return float("nan") if self.settings.broken else response == rf"So it is \boxed{{{instance['answer']}}}."

    def stand_in(self):
        return Sums(Sums.Settings(name=self.settings.name, train_size=None))


@pytest.fixture
def offline(monkeypatch):
    """No hub, whatever the machine has."""
    for module in (trial_model, row_files):
        monkeypatch.setattr(module, "unreachable", lambda: "no hub in this test")


@pytest.fixture
def own(tmp_path):
    """A recipe for the task above, without the keys of Countdown."""
    content = yaml.safe_load((ROOT / "training" / "recipes" / "countdown_tiny.yaml").read_text())
    content["task"] = {"name": f"{__name__}:Sums"}
    content["grpo"] |= {"rewards": ["correctness"], "per_device_train_batch_size": 16}
    content["eval"] |= {"size": None, "samples": {"odd": 16}}
    content["output"] = {"path": str(tmp_path / "out")}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder for temporary folders, to see what is left there."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def lines(text):
    """The list of a dry run: about what, in which half, and what is said."""
    checked, unchecked = text.split("\nNot checked:\n")
    entry = re.compile(r"^  (\w+) +(.*(?:\n {15}.*)*)", re.MULTILINE)
    return dict(entry.findall(checked)), dict(entry.findall(unchecked))


def test_the_demos_recipe(tmp_path, scratch, monkeypatch, capsys):
    monkeypatch.setattr(dry, "_PATIENCE", 600.0)
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("here before")
    assert main(["train", TINY, "--dry-run", f"output.path={output}"]) == 0
    checked, unchecked = lines(capsys.readouterr().out)
    assert set(checked) == {
        *("settings", "rows", "sizes", "prompt", "positions", "memory", "rewards", "training", "credit", "evaluation"),
        *("report", "saving"),
    }
    assert set(unchecked) == {"speed", "answers"}
    assert "4,400 to train on and 512 of split test, of its own" in checked["rows"]
    assert "128 responses a batch, 8 to each of 16 prompts" in checked["sizes"]
    assert "| use 9 , 11 , 11 to make 31 :" in checked["prompt"]
    assert checked["positions"] == "12 and a response of 128 fit into 256"
    assert "1,000,512 parameters; by arithmetic, 15.3 MiB" in checked["memory"]
    assert "2 steps of 2 responses of up to 32 tokens, loss dapo" in checked["training"]
    assert 1 < float(re.search(r"mean gamma ([\d.]+)", checked["credit"])[1]) < 1.5
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    assert list(scratch.iterdir()) == []


def test_what_stands_in_is_said(own, offline, scratch, capsys):
    """Neither rows nor model within reach: the task's rows, a random model of the class, a tokenizer of bytes."""
    overrides = [*QWEN, "task.reach=false", "model.dtype=bfloat16", "model.attn_implementation=flash_attention_2"]
    assert main(["train", own, *overrides, "grpo.use_vllm=true", "grpo.vllm_mode=colocate", "--dry-run"]) == 0
    checked, unchecked = lines(capsys.readouterr().out)
    assert "40 to train on and 6 of split test (even, odd), that come with the task" in checked["rows"]
    assert "sums.jsonl: there is no such file; stood in: the rows that come" in unchecked["data"]
    assert "no hub in this test); stood in: a random Qwen3ForCausalLM of 0.18M" in unchecked["weights"]
    assert unchecked["tokenizer"].endswith("a token a byte")
    assert unchecked["attention"] == "flash_attention_2; stood in: sdpa"
    assert unchecked["numbers"] == "bfloat16; stood in: float32"
    assert unchecked["settings"] == "vLLM (grpo.use_vllm, grpo.vllm_mode): left out here"
    assert "unknown" in unchecked["memory"]
    assert "1  for 'So it is \\\\boxed{1}.'" in checked["rewards"]
    assert checked["evaluation"] == "4 instances before and after, 6 responses and the greedy"
    assert list(scratch.iterdir()) == []


def test_a_large_model_on_this_machine_lends_its_tokenizer_and_sizes(own, tmp_path, offline, monkeypatch, capsys):
    """Its weights are not read: they are none here. Memory and positions are those of its configuration."""
    folder = tmp_path / "large"
    byte_tokenizer().save_pretrained(folder)
    Qwen3Config(
        vocab_size=258, num_hidden_layers=28, hidden_size=1024, max_position_embeddings=200, eos_token_id=256
    ).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    monkeypatch.setattr(trial_model, "SMALL", 5)
    wanted = [f"model.path={folder}", "model.dtype=bfloat16"]
    assert main(["train", own, *wanted, "--dry-run"]) == 0
    checked, unchecked = lines(capsys.readouterr().out)
    assert checked["positions"] == "8 and a response of 128 fit into 200"
    assert re.match(
        r"[\d,]+ parameters; by arithmetic, [\d.]+ GiB for weights, gradients, two moments in bfloat16",
        unchecked["memory"],
    )
    assert "a random Qwen3ForCausalLM" in unchecked["weights"]
    for extra, message in (
        (["grpo.max_completion_length=195"], "grpo.max_completion_length must be at most 192, got 195"),
        (["eval.max_tokens=195"], "eval.max_tokens must be at most 192, got 195"),
        (["rhythm.layers=[27, 28]"], "rhythm.layers must be below 28, the layers of"),
        (["model.architecture=LlamaForCausalLM"], "model.architecture must be Qwen3ForCausalLM, the class of"),
    ):
        assert main(["train", own, *wanted, *extra, "--dry-run"]) == 2
        assert message in capsys.readouterr().err


def test_a_broken_file_is_not_hidden_by_one_that_is_not_there(own, offline, tmp_path, capsys):
    """What stands in for rows out of reach does not stand in for rows that are wrong."""
    (tmp_path / "broken.jsonl").write_text('{"question": "1 + 1", "answer"')
    (tmp_path / "fine.jsonl").write_text('{"question": "1 + 1", "answer": "2"}')
    recipe = yaml.safe_load(Path(own).read_text())
    for good, status in ((False, 2), (True, 0)):
        files = {"a": "none.jsonl", "b": str(tmp_path / ("fine.jsonl" if good else "broken.jsonl"))}
        recipe["task"] = {"name": "maths", "train": "none.jsonl", "test": files}
        recipe["eval"] |= {"samples": 1}
        Path(own).write_text(yaml.safe_dump(recipe))
        assert (
            main(["train", own, "model.path=null", QWEN[1], "grpo.per_device_train_batch_size=8", "--dry-run"])
            == status
        )
        assert ("broken.jsonl: line 1 is not JSON" in capsys.readouterr().err) == (not good)


def test_a_gpu_is_not_used(own, monkeypatch, capsys):
    """On a machine that has one, too: here it would fail."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert main(["train", own, "model.path=null", QWEN[1], "--dry-run"]) == 0
    assert torch.cuda.is_available()


def test_what_would_train_nothing_in_silence_is_said(own, capsys):
    """Rounding that swallows steps, responses too short for the horizon, a judge that never said yes."""
    small = ["model.path=null", QWEN[1], "eval.samples=1"]
    wanted = ["model.dtype=bfloat16", "grpo.learning_rate=1e-6", "grpo.max_completion_length=16", "rhythm.top=0.4"]
    assert main(["train", own, *small, *wanted, "--dry-run"]) == 0
    _, unchecked = lines(capsys.readouterr().out)
    lost = "stood in: float32. A step of grpo.learning_rate=1e-06 is lost in weights above about 3e-04"
    assert unchecked["numbers"] == f"bfloat16; {lost}"
    assert unchecked["credit"].startswith("whether responses are longer than 10 tokens: in shorter ones no token gets")
    assert "answers" not in unchecked
    assert main(["train", own, *small, "model.dtype=bfloat16", "task.deaf=true", "--dry-run"]) == 0
    _, unchecked = lines(capsys.readouterr().out)
    assert unchecked["numbers"] == "bfloat16; stood in: float32"
    assert unchecked["answers"] == "whether a right one is rewarded: none of those made up here was right"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path=Qwen/Qwen3-0.6B-Base"], "model.architecture must name a class of transformers for a dry run"),
        ([*QWEN[:1], "model.architecture=Qwen4ForCausalLM"], "must be a causal language model of transformers"),
        (["grpo.rewards=[score]"], "grpo.rewards must hold only correctness, got 'score'"),
        (["grpo.per_device_train_batch_size=12"], "error: grpo, rhythm: "),
        (["grpo.per_device_train_batch_size=512"], "grpo.per_device_train_batch_size must be at most 320, got 512"),
        (["eval.size=7"], "test has 6"),
        (["eval.samples={three: 2}"], "eval.samples must name test sets of the task (even, odd), got 'three'"),
        (["task.broken=true"], ":Sums: rewards['correctness'] must give a finite number for each response"),
        (["model.path=null", QWEN[1], "grpo.beta=0.1"], "grpo.beta must be 0 with model.path=null, got 0.1"),
        (["grpo.max_step=3"], "did you mean max_steps"),
    ],
)
def test_mistakes_end_in_one_line(own, overrides, message, offline, scratch, tmp_path, capsys):
    assert main(["train", own, *overrides, "--dry-run"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert message in error[0]
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_the_tokenizer_cannot_write(scratch, capsys):
    assert main(["train", TINY, "task.prompt=chat", "--dry-run"]) == 2
    assert "error: task.prompt must suit the tokenizer, got 'chat'" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("moment", ["load", "evaluate_both", "write_report"])
def test_ctrl_c_leaves_nothing(own, moment, scratch, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, moment, interrupt)
    assert main(["train", own, "--dry-run"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was changed"
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_the_shape_of_batches_stays():
    """On-policy and off-policy steps, accumulation and repeats are there in the small one if they were in the large."""
    for given, wanted in (
        ({"steps_per_generation": 16, "gradient_accumulation_steps": 1}, (2, 1)),
        ({"steps_per_generation": 128, "gradient_accumulation_steps": 8}, (4, 2)),
        ({"steps_per_generation": 8, "gradient_accumulation_steps": 8}, (2, 2)),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 1}, (1, 1)),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 4, "num_iterations": 6}, (1, 2)),
    ):
        recipe = load_recipe(TINY, [f"grpo.{name}={value}" for name, value in given.items()])
        small = cut_down(recipe, random=True, attention="sdpa").grpo
        assert (small.steps_per_generation, small.gradient_accumulation_steps) == wanted
        assert small.more.get("num_iterations", 1) == min(given.get("num_iterations", 1), 2)
        assert small.per_device_train_batch_size * small.steps_per_generation % small.num_generations == 0
    recipe = load_recipe(TINY, ["eval.samples={a: 16, b: 1}", "rhythm.layers=[9]"])
    small = cut_down(recipe, random=True, attention="sdpa")
    assert (small.eval.samples, small.rhythm.layers) == ({"a": 2, "b": 1}, "middle5")
    assert cut_down(recipe, random=False, attention="sdpa").rhythm.layers == (9,)
    assert recipe.grpo.max_steps == 60


def test_sizes_are_told_in_words():
    recipe = load_recipe(TINY, ["grpo.num_iterations=2", "grpo.steps_per_generation=2"])
    said = "256 responses a batch, 8 to each of 32 prompts, make 4 optimizer steps; in 60 steps "
    assert check_sizes(recipe, 4800) == said + "10% of the prompts are seen"
    assert check_sizes(recipe, 240) == said + "each prompt is seen 2 times"
    assert check_sizes(recipe, None) == said + "480 prompts are answered"
    with pytest.raises(RecipeError, match="must be at most 124, got 128: a batch of responses would answer 32 prompts"):
        check_sizes(recipe, 31)


def test_rows_that_take_long_are_not_all_made(monkeypatch):
    class Slow(Sums):
        def instances(self, split, size):
            clock[0] += size / 16
            return [{"a": i, "answer": i + 1} for i in range(size)]

    clock = [0.0]
    monkeypatch.setattr(dry.time, "perf_counter", lambda: clock[0])
    slow = Slow(Sums.Settings(name="slow"))
    some, left = dry._some(slow, "train", 10_000)
    assert (len(some), left) == (128, "9,872 more rows of split train, which take long to make")
    assert [len(dry._some(slow, "test", size)[0]) for size in (5, 40)] == [5, 40]


def test_few_of_each_test_set():
    rows = [{"n": i, "set": "abc"[i % 3]} for i in range(30)]
    assert [(one["set"], one["n"]) for one in few(rows)] == [("a", 0), ("a", 3), ("b", 1), ("b", 4), ("c", 2), ("c", 5)]
    assert few([{"n": i} for i in range(30)]) == [{"n": i} for i in range(4)]


def test_settings_that_need_a_gpu_are_left_out_by_name():
    content = {"grpo": {"bf16": True, "use_vllm": False, "vllm_mode": "server", "torch_compile": False, "beta": 0.1}}
    assert left_out(content) == ["vLLM (grpo.vllm_mode)", "mixed precision (grpo.bf16)"]
    assert content == {"grpo": {"beta": 0.1}}
    assert left_out({"grpo": 3}) == left_out({}) == []


@pytest.mark.long
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(path, scratch, tmp_path, capsys):
    """Under two minutes of one core, whether or not the hub is there."""
    started = sum(os.times()[:4])  # of this process and those it has ended
    assert main(["train", str(path), "--dry-run", f"output.path={tmp_path / 'run'}"]) == 0
    seconds = sum(os.times()[:4]) - started
    checked, _ = lines(capsys.readouterr().out)
    assert {"rows", "prompt", "rewards", "training", "credit", "evaluation", "report", "saving"} <= set(checked)
    assert float(re.search(r"mean gamma ([\d.]+)", checked["credit"])[1]) > 1
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "run").exists()
    print(f"{path.stem}: {seconds:.0f} CPU seconds")
    assert seconds < 120


@pytest.mark.long
def test_ctrl_c_in_a_process(tmp_path):
    """SIGINT in the middle of a dry run: status 130, one line, an empty folder."""
    words = ["train", TINY, "--dry-run", "task.train_size=200000", f"output.path={tmp_path / 'run'}"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    error = interrupted(words, lambda: list(scratch.glob("dry-run-*")), TMPDIR=str(scratch))
    assert error.strip().splitlines()[-1] == "interrupted; nothing was changed"
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_what_would_reach_others_is_left_out():
    content = {"grpo": {"report_to": ["wandb"], "run_name": "first", "ddp_timeout": 7200, "seed": 1}}
    said = ["several processes (grpo.ddp_timeout)", "reports elsewhere (grpo.report_to, grpo.run_name)"]
    assert left_out(content) == said and content == {"grpo": {"seed": 1}}
    assert left_out({"grpo": {"report_to": "none"}}) == []


def test_the_memory_of_an_adapter():
    recipe = load_recipe(TINY, ["model.lora={r: 8}", "grpo.beta=0.1"])
    assert dry._memory(recipe, 2**28) == "by arithmetic, 1.0 GiB for weights in float32, and little more for LoRA"

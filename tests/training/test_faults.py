"""A real run of seconds in which something goes wrong in the middle: it ends in one line, and what it had is kept."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from training import train as training
from training.__main__ import main
from training.divergence import DivergedError, in_step
from training.recorder import Recorder
from training.task import Figure, Task, TaskSettings

from .runs import FEW, save_model

FIRST = {"train": 1, "validation": 1000, "test": 2000}


class Faulty(Task):
    """Rewards a text by its length, until `fault` says otherwise: a function of what was asked, and how often."""

    fault = staticmethod(lambda what, times, right: right)

    def __init__(self, settings: TaskSettings) -> None:
        super().__init__(settings)
        self.times: dict[str, int] = {}

    def told(self, what, right):
        self.times[what] = self.times.get(what, 0) + 1
        return type(self).fault(what, self.times[what], right)

    def instances(self, split, size):
        return [{"n": n} for n in range(FIRST[split], FIRST[split] + size)]

    def prompt(self, instance):
        return self.told("prompt", f"make {instance['n']}")

    @property
    def rewards(self):
        return {
            "correctness": lambda texts, _: [float(len(text) % 2) for text in texts],
            "length": lambda texts, _: self.told("length", [len(text) % 3 / 2 for text in texts]),
        }

    def counts(self, response, instance):
        return self.told("counts", {"letters": len(response)})

    def figures(self, totals, responses, right):
        return self.told("figures", {"letters": Figure("letters", totals["letters"] / responses)})

    def remark(self, before, after):
        return self.told("remark", "longer")

    def describe(self):
        return self.told("describe", "lengths")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Four steps of a model of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("start")
    model = save_model(folder / "model", 16, 2, 2)
    recipe = folder / "faulty.yaml"
    recipe.write_text(
        f"task: {{name: '{__name__}:Faulty'}}\nrhythm: {{horizon: [2, 8]}}\ngrpo: {{rewards: [length]}}\n"
    )
    few = [word for word in FEW if not word.startswith(("task.numbers", "grpo.max_steps"))]
    return [str(recipe), *few, "grpo.max_steps=4", f"model.path={model}"]


def ends(words, run, capsys, status=2):
    """The one line that a run ends with; its metrics must be JSON as strict readers have it."""
    capsys.readouterr()
    assert main(["train", *words, f"output.path={run}"]) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == (status == 2)
    return lines[0] if lines else ""


def steps(run):
    def strict(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=strict) for line in (run / "metrics.jsonl").read_text().splitlines()]


def raises(error):
    raise error


FAULTS = {
    "raises": (lambda right: raises(KeyError("no")), "must not raise, got KeyError: 'no' (test_faults.py, line "),
    "leaves": (lambda right: sys.exit(0), "must not raise, got SystemExit: 0 (test_faults.py, line "),
    "nan": (lambda right: [math.nan, *right[1:]], "must give a finite number for each response, got nan"),
    "infinite": (lambda right: [-math.inf, *right[1:]], "must give a finite number for each response, got -inf"),
    "none": (lambda right: [None, *right[1:]], "must give a finite number for each response, got None: 0.0 where"),
    "nothing": (lambda right: None, "must give a list, a number a response, got None"),
    "few": (lambda right: right[1:], "must give 4 numbers, one a response, got ["),
    "text": (lambda right: "1111", "must give a list, a number a response, got '1111'"),
}


def kept(run, count):
    """What the line says of a run that ended after so many steps, with a checkpoint of each."""
    assert [one["step"] for one in steps(run)] == list(range(1, count + 1))
    assert (run / "checkpoints" / f"checkpoint-{count}").is_dir()
    assert not (run / "checkpoints" / f"checkpoint-{count + 1}").exists()
    return f"the metrics of {count} steps in {run / 'metrics.jsonl'}"


def later(what, after, change):
    """A fault of one of the methods, from its n-th call on."""
    return lambda asked, times, right: change(right) if asked == what and times > after else right


@pytest.mark.parametrize("fault", [x if x == "leaves" else pytest.param(x, marks=pytest.mark.long) for x in FAULTS])
def test_a_reward_that_is_wrong_in_the_third_step(words, tmp_path, monkeypatch, capsys, fault):
    """The line names task, reward and place, and says that two steps and their checkpoints are kept."""
    run, (change, said) = tmp_path / "run", FAULTS[fault]
    monkeypatch.setattr(Faulty, "fault", later("length", 2, change))
    line = ends([*words, "output.checkpoint_steps=1"], run, capsys)
    assert line.startswith(f"error: {__name__}:Faulty: rewards['length'] {said}")
    assert kept(run, 2) in line and not (run / "model").exists()


@pytest.mark.long
def test_a_reward_that_was_mended_goes_on(words, tmp_path, monkeypatch, capsys):
    """The same model, bit for bit, as that of a run in which the reward was never wrong."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    ends(words, whole, capsys, status=0)
    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "fault", later("length", 2, FAULTS["raises"][0]))
        assert f"--resume {run}" in ends([*words, "output.checkpoint_steps=1"], run, capsys)
    assert main(["train", "--resume", str(run)]) == 0
    one, two = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, run))
    assert one == two


@pytest.mark.long
def test_ctrl_c_in_a_reward(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "fault", later("length", 2, lambda right: raises(KeyboardInterrupt())))
    assert main(["train", *words, "output.checkpoint_steps=1", f"output.path={tmp_path / 'run'}"]) == 130
    assert kept(tmp_path / "run", 2) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "after", "said"),
    [
        ("counts", 8, "counts must not raise, got ZeroDivisionError: division by zero (test_faults.py, line "),
        pytest.param("figures", 2, "figures must not raise, got ZeroDivisionError: ", marks=pytest.mark.long),
        pytest.param("describe", 1, "describe must not raise, got ZeroDivisionError: ", marks=pytest.mark.long),
    ],
)
def test_a_task_that_fails_after_the_training(words, tmp_path, monkeypatch, capsys, what, after, said):
    """In the second evaluation, or while the result is written: the model is there, and the rest is made of it."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Faulty, "fault", later(what, after, lambda right: 1 / 0))
        line = ends(words, run, capsys)
    assert line.startswith(f"error: {__name__}:Faulty: {said}")
    assert f"the model in {run / 'model'}" in line and len(steps(run)) == 4 and not (run / "result.json").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == 4


@pytest.mark.long
def test_a_remark_that_fails_takes_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "fault", later("remark", 0, lambda right: 1 / 0))
    ends(words, tmp_path / "run", capsys, status=0)
    said = json.loads((tmp_path / "run" / "result.json").read_text())["remark"]
    assert said.startswith(f"{__name__}:Faulty: remark must not raise, got ZeroDivisionError")


def broken(monkeypatch, change, step, *, drawing=False):
    """A model whose training forwards, or those that draw responses in training, change from the n-th on."""
    load = training.load

    def loaded(*given):
        model, tokenizer = load(*given)
        times = iter(range(1, 10**6))

        def hook(module, arguments, states):
            counted = model.training and torch.is_grad_enabled() != drawing
            return change(states) if counted and next(times) >= step else states

        model.model.norm.register_forward_hook(hook)
        return model, tokenizer

    monkeypatch.setattr(training, "load", loaded)


@pytest.mark.parametrize("mode", ["coupled", pytest.param("uniform", marks=pytest.mark.long)])
def test_a_loss_that_is_not_finite(words, tmp_path, monkeypatch, capsys, mode):
    """It ends the run in that step, before a checkpoint is made of it; what is written of it are finite numbers."""
    broken(monkeypatch, lambda states: states * math.nan, 3)
    run = tmp_path / "run"
    line = ends([*words, "output.checkpoint_steps=1", f"rhythm.mode={mode}"], run, capsys)
    assert line.startswith("error: step 3: the loss is nan; the model has diverged: try a smaller grpo.learning_rate")
    assert [one["step"] for one in steps(run)] == [1, 2, 3] and "loss" not in steps(run)[2]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]


@pytest.mark.long
def test_a_gradient_that_is_not_finite(words, tmp_path, monkeypatch, capsys):
    """Of a loss that is: as of a division by a number that is nearly 0."""

    def change(states):
        states.register_hook(lambda gradient: gradient * math.inf)
        return states

    broken(monkeypatch, change, 2)
    line = ends(words, tmp_path / "run", capsys)
    assert line.startswith("error: step 2: the gradient norm is nan; the model has diverged")
    assert "grad_norm" not in steps(tmp_path / "run")[1] and "loss" in steps(tmp_path / "run")[1]


def test_no_token_can_be_drawn(words, tmp_path, monkeypatch, capsys):
    """As of weights that a step made infinite, or of half precision that overflows."""
    broken(monkeypatch, lambda states: states * math.nan, 9, drawing=True)  # a response has eight tokens
    line = ends(words, tmp_path / "run", capsys)
    said = (
        "error: step 2: the model's probabilities are not finite, so that no token can be drawn; the model has diverged"
    )
    assert line.startswith(said) and len(steps(tmp_path / "run")) == 1


@pytest.mark.long
def test_steps_that_are_too_large(words, tmp_path, capsys):
    line = ends([*words, "grpo.learning_rate=1e30", "grpo.warmup_steps=0"], tmp_path / "run", capsys)
    assert re.match(r"error: step [234]: the .* (nan|not finite).*; the model has diverged", line)


def test_gradients_of_float16_may_overflow(tmp_path):
    """The scaler takes no step then, and scales the next one less."""
    recorder = Recorder(tmp_path / "metrics.jsonl", 2)
    logs, state = {"loss": 0.5, "grad_norm": math.inf}, SimpleNamespace(global_step=1)
    with recorder:
        recorder.on_log(SimpleNamespace(fp16=True), state, None, logs)
        assert recorder.lines == [{"step": 1, "loss": 0.5}]
        with pytest.raises(DivergedError, match="step 1: the gradient norm is inf"):
            recorder.on_log(SimpleNamespace(fp16=False), state, None, logs)
        with pytest.raises(DivergedError, match="step 1: the loss is nan"):
            recorder.on_log(SimpleNamespace(fp16=True), state, None, {"loss": math.nan})


def test_what_torch_says_of_other_things_is_not_divergence():
    with pytest.raises(RuntimeError, match=r"^out of memory$"), in_step(1):
        raise RuntimeError("out of memory")
    with pytest.raises(DivergedError, match=r"^step 1: the model's probabilities"), in_step(1):
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_fewer_questions_than_a_batch_has(words, tmp_path, capsys):
    """TRL would make no batch of them, and the run would end without a step, as if it had trained."""
    line = ends([*words, "task.train_size=1"], tmp_path / "run", capsys)
    assert line == "error: task.train_size must be at least 2, as many questions as a batch has prompts, got 1"
    assert not (tmp_path / "run").exists()


def test_a_prompt_of_training_that_is_too_long(words, tmp_path, monkeypatch, capsys):
    """Not only those of the evaluation are looked at before anything is done."""
    long = "make 1 " * 1000
    monkeypatch.setattr(Faulty, "prompt", lambda self, one: long if one["n"] == 3 else f"make {one['n']}")
    line = ends(words, tmp_path / "run", capsys)
    assert line.startswith("error: task: no response fits: the model has ")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_is_full_in_the_third_step(words, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    class Full:
        """A file that takes two lines."""

        def __init__(self, file):
            self.file, self.left = file, 2

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(text)

    opened = Path.open

    def open_file(path, *mode, **more):
        file = opened(path, *mode, **more)
        return Full(file) if path.name == "metrics.jsonl" and mode[:1] == ("a",) else file

    monkeypatch.setattr(Path, "open", open_file)
    line = ends([*words, "output.checkpoint_steps=1"], run, capsys)
    monkeypatch.undo()
    assert line.startswith(f"error: [Errno 28] No space left on device: '{run / 'metrics.jsonl'}'; ")
    assert kept(run, 2) in line


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_a_folder_that_cannot_be_made(words, tmp_path, capsys, place):
    (tmp_path / "file").write_text("mine")
    line = ends(words, tmp_path / place, capsys)
    assert str(tmp_path / place) in line and (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(words, tmp_path, monkeypatch, capsys):
    """As of another user, or of a disk that is mounted to be read. Told before the model is loaded."""

    def refuse(*_, **more):
        raise PermissionError(13, "Permission denied", str(more["dir"]))

    monkeypatch.setattr("training.open_run.TemporaryFile", refuse)
    monkeypatch.setattr(training, "load", lambda *_: pytest.fail("too late"))
    line = ends(words, tmp_path / "run", capsys)
    assert line == f"error: [Errno 13] Permission denied: '{tmp_path / 'run'}'"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_tokenizer_without_a_token_to_pad_with(words, tmp_path, capsys):
    """The end token stands for it, as in TRL."""
    model = save_model(tmp_path / "model", 16, 2, 2)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := model / name).exists():
            content = json.loads(path.read_text())
            content.pop("pad_token", None)
            path.write_text(json.dumps(content))
    assert AutoTokenizer.from_pretrained(model).pad_token is None
    ends([*words[:-1], f"model.path={model}"], tmp_path / "run", capsys, status=0)
    assert len(steps(tmp_path / "run")) == 4

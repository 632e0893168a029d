"""Runs that go on: cut off anywhere they end as if they had not been, and no run is touched that was not meant."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import random
import shutil
import time
from dataclasses import dataclass

import pytest
from safetensors.torch import load_file

from training import checkpoints
from training import train as training
from training.__main__ import main
from training.recipe import RecipeError, load_recipe
from training.task import Task, TaskSettings

from .fake_run import begin, start, whole
from .runs import TINY, save_model
from .test_cut_off import DISK, EVERY, count_changes

SHORT = [
    *("task.numbers=[3]", "task.train_size=8", "eval.size=4", "grpo.per_device_train_batch_size=8"),
    *("grpo.num_generations=4", "grpo.max_completion_length=12", "grpo.max_steps=7", "output.checkpoint_steps=2"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), hidden=32, layers=3, heads=2)


def carry_out(folder, model, *overrides):
    training.run(load_recipe(TINY, [*SHORT, f"model.path={model}", f"output.path={folder}", *overrides]))


def found(folder):
    """All that must not depend on where a run was cut off: metrics but for times, weights, and the result."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]
    result = json.loads((folder / "result.json").read_text())
    for evaluation in (result["before"], result["after"]):
        for kind in evaluation.values():
            kind.pop("seconds")
    for name in ("name", "seconds", "cost", "resumed"):
        result.pop(name)
    weights = {name: x.tolist() for name, x in load_file(folder / "model" / "model.safetensors").items()}
    return metrics, result, weights


class CutError(Exception):
    """Stands for the death of a run."""


def cut_off(folder, model, *overrides, at):
    """A run that dies before step `at` + 1."""

    def dies(self, args, state, control, **_):
        if state.global_step == at:
            raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Recorder, "on_step_begin", dies, raising=False)
        with pytest.raises(CutError):
            carry_out(folder, model, *overrides)


STALE = ("grpo.steps_per_generation=2", "grpo.num_iterations=2", "output.checkpoint_steps=3")
PASSES = ("task.train_size=4", "grpo.max_steps=10")  # four steps a pass over the questions


@pytest.mark.parametrize("mode", ["random", pytest.param("coupled", marks=pytest.mark.long)])
def test_a_resumed_run_is_the_same_run(model, tmp_path, capsys, mode):
    """Over several passes of the data set, from within a generation batch that is trained on four times."""
    given = (f"rhythm.mode={mode}", *STALE, *PASSES)
    carry_out(tmp_path / "whole", model, *given)
    cut_off(tmp_path / "cut", model, *given, at=7)
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["checkpoint-6"]
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert "Goes on after step 6." in capsys.readouterr().out
    assert found(tmp_path / "cut") == found(tmp_path / "whole")
    assert json.loads((tmp_path / "cut" / "result.json").read_text())["resumed"] == [6]


def test_the_learning_rate_of_a_longer_run(model, tmp_path, capsys, monkeypatch):
    """It falls to 0 at the end of four steps; the fifth of six has the rate that the longer run's schedule gives it."""
    taken = []

    def step(self, args, state, control, optimizer, **_):
        taken.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(training.Recorder, "on_pre_optimizer_step", step, raising=False)
    for steps in (4, 6):
        carry_out(tmp_path, model, f"grpo.max_steps={steps}", "grpo.warmup_steps=1")
    logged = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == taken
    assert taken[4:] == pytest.approx([1e-3 * 2 / 5, 1e-3 * 1 / 5])


def _carry_out_in_child(folder, model, overrides):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    carry_out(folder, model, *overrides)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["uniform", "coupled", "random"])
def test_killed_at_random_moments(model, tmp_path, mode):
    """kill -9 after a random time, again and again, until a run comes to its end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.train", "trl", "tests.training.test_resume"])
    given = (f"rhythm.mode={mode}", "output.checkpoint_steps=1", *STALE[:2])
    began = time.monotonic()
    carry_out(tmp_path / "whole", model, *given)
    whole_run = time.monotonic() - began
    moments = random.Random(mode)
    run, kills = tmp_path / "cut", 0
    while not (run / "result.json").exists():
        child = context.Process(target=_carry_out_in_child, args=(run, model, given))
        child.start()
        child.join(whole_run * (moments.uniform(0.1, 0.7) if kills < 6 else 100))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0
    assert kills >= 2
    assert found(run) == found(tmp_path / "whole")


@EVERY
def test_cut_off_at_any_change_of_a_file_a_run_goes_on(fast, tmp_path, capsys, stride):
    """Also while a checkpoint is written: the next start ends the run, with every step once and nothing left over."""
    first = tmp_path / "first"
    start(first, 1)
    shutil.copytree(first, tmp_path / "all" / "run")
    changes = count_changes(tmp_path / "all", lambda: start(tmp_path / "all" / "run", 2))
    names = {path.name for path in first.iterdir()}
    untouched = 0
    for n in range(0, changes + 1, stride):
        run = tmp_path / str(n) / "run"
        shutil.copytree(first, run)
        DISK.run(run, n, lambda: start(run, 2))  # noqa: B023
        if finished := whole(run, fast, tmp_path):  # before the first change, or after the last but a few
            with pytest.raises(RecipeError, match="holds a finished run"):
                start(run, 2, overwrite=False)
            untouched += finished == 1
        else:
            start(run, 2, overwrite=False)
            assert {path.name for path in run.iterdir()} == names
        assert finished == 1 or whole(run, fast, tmp_path) == 2
        shutil.rmtree(run.parent)
    assert 0 < untouched < changes / stride / 3
    capsys.readouterr()


@EVERY
def test_a_longer_run_goes_on_with_a_finished_one(fast, tmp_path, capsys, stride):
    """Cut off anywhere on its way, the finished one is here or in `previous`, and the longer one can still be had."""
    first = tmp_path / "first"
    start(first, 1)
    shutil.copytree(first, tmp_path / "all" / "run")
    longer = "grpo.max_steps=4"

    def go_on(run):
        start(run, 1, longer, overwrite=False)

    changes = count_changes(tmp_path / "all", lambda: go_on(tmp_path / "all" / "run"))
    capsys.readouterr()
    for n in range(0, changes + 1, stride):
        run = tmp_path / str(n) / "run"
        shutil.copytree(first, run)
        DISK.run(run, n, lambda: go_on(run))  # noqa: B023
        steps = [_steps(place) for place in (run, run / "previous")]
        assert 2 in steps or 4 in steps
        if steps[0] != 4:
            go_on(run)
        assert _steps(run) == 4
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
        shutil.rmtree(run.parent)


def _steps(folder):
    """Those of the finished run in a folder; None where none is."""
    if not (folder / "result.json").exists() or not (folder / "model").is_dir():
        return None
    return json.loads((folder / "result.json").read_text())["steps"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("grpo.seed=2", "of another recipe (grpo.seed was 1, is 2)"),
        ("task.train_size=100", "of another recipe (task.train_size was 8, is 100)"),
        ("grpo.max_steps=1", "of another recipe (grpo.max_steps was 2, is 1)"),
        ("rhythm.mode=random", "of another recipe (rhythm.mode was coupled, is random)"),
    ],
)
def test_another_recipe_is_refused(fast, tmp_path, capsys, change, said):
    run = tmp_path / "run"
    for make, what in ((begin, "an unfinished"), (start, "a finished")):
        make(run, 1)
        before = {path: path.is_file() and path.read_bytes() for path in run.rglob("*")}
        with pytest.raises(RecipeError, match="holds") as error:
            start(run, 1, change, overwrite=False)
        assert f"holds {what} run {said}" in str(error.value)
        assert "--overwrite" in str(error.value)
        assert {path: path.is_file() and path.read_bytes() for path in run.rglob("*")} == before
    with pytest.raises(RecipeError, match=r"holds a finished run: .*; grpo\.max_steps above 2 goes on with it"):
        start(run, 1, overwrite=False)


def test_what_may_change(fast, tmp_path, capsys):
    """Another evaluation is carried out anew, with the model before training; a finished run is left alone."""
    run = tmp_path / "run"
    begin(run, 1)
    start(run, 1, "eval.size=7", "eval.seed=5", "output.checkpoints_kept=null", "grpo.max_steps=3", overwrite=False)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    with pytest.raises(RecipeError, match="holds a finished run: "):
        start(run, 1, "eval.size=6", "grpo.max_steps=3", overwrite=False)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RecipeError, match="a finished run without a checkpoint to go on from"):
        start(run, 1, "grpo.max_steps=4", overwrite=False)


def test_resume_names_what_is_wrong(fast, tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert f"--resume must be the folder of a run, got '{tmp_path}'" in capsys.readouterr().err
    run = tmp_path / "run"
    start(run, 1)
    assert main(["train", "--resume", str(run)]) == 2
    assert "holds a finished run: --overwrite begins anew" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "output.path=elsewhere"]) == 2
    assert "output.path must not be set with --resume, got 'output.path=elsewhere'" in capsys.readouterr().err
    for words in (["train"], ["train", "--resume", str(run), "--overwrite"]):
        with pytest.raises(SystemExit):
            main(words)
    moved = tmp_path / "moved"
    begin(run, 2)  # unfinished
    shutil.move(run, moved)
    assert main(["train", "grpo.max_steps=3", "--resume", str(moved)]) == 0
    assert _steps(moved) == 3
    assert not run.exists()


def test_a_checkpoint_of_something_else(fast, tmp_path, capsys):
    """Other questions, another number of processes, or a file that is not what was written: one line, nothing lost."""
    run = tmp_path / "run"
    start(run, 1)
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    about = run / "checkpoints" / "checkpoint-2" / checkpoints.RUN
    right = json.loads(about.read_text())
    for change, said in (
        ({"questions": "others"}, "task must give the questions that .* was trained on, got others"),
        ({"processes": 2}, "the number of processes must be 2, as when .* was written, got 1"),
        ({"processes": "two"}, "cannot be read: ValueError: run.json: processes must be a whole number, got 'two'"),
    ):
        about.write_text(json.dumps(right | change))
        with pytest.raises(RecipeError, match=said):
            start(run, 1, overwrite=False)
    about.write_text(json.dumps(right))
    start(run, 1, overwrite=False)
    assert whole(run, fast, tmp_path) == 1


def test_a_damaged_checkpoint(model, tmp_path, capsys):
    run = tmp_path / "run"
    cut_off(run, model, at=2)
    (checkpoint,) = (run / "checkpoints").iterdir()
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "rhythm_progress_0.pt"):
        kept = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(kept[: len(kept) // 2])
        assert main(["train", "--resume", str(run)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {checkpoint} cannot be read: ")
        assert "remove it to go on from the checkpoint before it" in error
        (checkpoint / name).write_bytes(kept)
    assert (run / "metrics.jsonl").read_text().count("\n") == 2


def test_other_intervals_between_checkpoints(model, tmp_path):
    """A run that goes on heeds `output.checkpoint_steps` as it is now."""
    run = tmp_path / "run"
    cut_off(run, model, at=3)
    cut_off(run, model, "output.checkpoint_steps=1", "output.checkpoints_kept=null", at=4)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"checkpoint-{i}" for i in (2, 3, 4)]


def test_a_finished_run_without_its_model(fast, tmp_path, capsys):
    """Its user has removed what is large: it is a finished run still, and nothing of it is removed unasked."""
    run = tmp_path / "run"
    start(run, 1)
    shutil.rmtree(run / "model")
    with pytest.raises(RecipeError, match=r"holds a finished run without its model: .*; grpo\.max_steps above 2 goes"):
        start(run, 1, overwrite=False)
    assert (run / "result.json").exists()
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RecipeError, match="a finished run without its model and a checkpoint to go on from"):
        start(run, 1, "grpo.max_steps=3", overwrite=False)
    assert (run / "result.json").exists()


def test_killed_before_the_first_file_was_moved(fast, tmp_path, capsys):
    """A start that was to begin anew has changed nothing yet: the run is there as it was."""
    run = tmp_path / "run"
    start(run, 1)
    (run / "previous.partial").mkdir()
    with pytest.raises(RecipeError, match="holds a finished run: "):
        start(run, 1, overwrite=False)
    start(run, 1, "grpo.max_steps=3", overwrite=False)
    assert _steps(run) == 3
    assert not any("previous" in path.name for path in run.iterdir())


def test_advice_that_can_be_taken(fast, tmp_path, capsys):
    """A larger `grpo.max_steps` is named only where it would be taken."""
    run = tmp_path / "run"
    start(run, 1)
    longer = r"grpo\.max_steps above 2"
    with pytest.raises(RecipeError, match=longer):
        start(run, 1, overwrite=False)
    for change in ("grpo.seed=2",), ("grpo.seed=2", "grpo.max_steps=3"):
        with pytest.raises(RecipeError) as error:
            start(run, 1, *change, overwrite=False)
        assert "grpo.max_steps above" not in str(error.value)
    shutil.rmtree(run / "checkpoints")
    for change in (), ("grpo.max_steps=3",):
        with pytest.raises(RecipeError) as error:
            start(run, 1, *change, overwrite=False)
        assert "grpo.max_steps above" not in str(error.value)


def test_nothing_half_written_is_left(fast, tmp_path, capsys):
    """Of a checkpoint that was being written or removed when a run died after its last step."""
    run = tmp_path / "run"
    start(run, 1)
    (run / "result.json").unlink()
    half = run / "checkpoints" / ".partial"
    half.mkdir()
    (half / "weights").write_text("large")
    start(run, 1, overwrite=False)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_no_room_when_a_checkpoint_reaches_the_disk(tmp_path, monkeypatch):
    """Some file systems say only then that they are full: what was written is removed, to make room."""
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"), checkpoints.writing(tmp_path, {}, 1) as folder:
        (folder / "checkpoint-1").mkdir()
    assert not list(tmp_path.iterdir())


def test_seconds_of_a_run_without_checkpoints(fast, tmp_path, capsys):
    run = tmp_path / "run"
    start(run, 1, "output.checkpoint_steps=null")
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    start(run, 1, overwrite=False)
    assert json.loads((run / "result.json").read_text())["seconds"]["training"] == 2.0  # of two steps of a second


@dataclass
class DatedSettings(TaskSettings):
    since: datetime.date | None = None


class Dated(Task):
    """A task with a setting that is not of JSON."""

    Settings = DatedSettings

    def instances(self, split, size):
        return [{"n": f"{split} {i}"} for i in range(size)]

    def prompt(self, instance):
        return instance["n"]

    def correct(self, response, instance):
        return False


def test_settings_of_a_task_may_be_of_any_type(fast, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"task: {{name: '{__name__}:Dated', since: 2026-01-02, train_size: 8}}\nmodel: {{path: x}}\n")
    words = ["train", str(recipe), f"output.path={run}", "eval.size=8", "grpo.seed=1"]
    assert main([*words, "grpo.max_steps=2"]) == 0
    assert main([*words, "grpo.max_steps=3"]) == 0
    assert main([*words, "grpo.max_steps=3", "task.since=2026-01-03"]) == 2
    assert "(task.since was 2026-01-02, is 2026-01-03)" in capsys.readouterr().err


def test_a_run_is_named_as_its_folder(fast, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    begin(run, 1)
    monkeypatch.chdir(run)
    assert main(["train", "--resume", "."]) == 0
    assert json.loads((run / "result.json").read_text())["name"] == "run"


@pytest.mark.long
def test_an_adapter_is_merged_once(model, tmp_path, monkeypatch):
    """A run cut off in its last evaluation goes on with the model that it saved, to which no adapter is added."""
    given = ("model.lora={r: 2}", "grpo.max_steps=2")
    carry_out(tmp_path / "whole", model, *given)
    evaluate = training.evaluate_both

    def dies(*args):
        if args[-1] == "after":
            raise CutError
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_both", dies)
        with pytest.raises(CutError):
            carry_out(tmp_path / "cut", model, *given)
    carry_out(tmp_path / "cut", model, *given)
    assert found(tmp_path / "cut") == found(tmp_path / "whole")

"""Tasks by name: those that come with the repository, a user's own, and what is no task."""

from __future__ import annotations

import json
import sys

import pytest

from training.__main__ import main
from training.recipe import RecipeError, load_recipe
from training.task import TaskSettings, find, instances_of, make, names

from .runs import FEW, TINY, save_model

OWN = """
from dataclasses import dataclass

from training.task import Task, TaskSettings


class Doubling(Task):
    @dataclass
    class Settings(TaskSettings):
        largest: int = 9

    def instances(self, split, size):
        start = {"train": 1, "validation": 30, "test": 60}[split]
        return [{"number": n, "odd": [n % 2 == 1, None, "x"]} for n in range(start, start + size)]

    def prompt(self, instance):
        return f"make {instance['number']} from {self.settings.largest}"

    def correct(self, response, instance):
        return len(response.split()) % 2 == 0


class NoPrompt(Task):
    def instances(self, split, size):
        return []

    def correct(self, response, instance):
        return True


class Bare:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN)
    (tmp_path / "broken_tasks.py").write_text("import nonsense_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_tasks"
    for name in ("own_tasks", "broken_tasks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", names())
def test_every_task_here_is_one(name):
    assert issubclass(find(name).Settings, TaskSettings)


def test_a_task_of_ones_own_is_trained_and_evaluated(own, tmp_path):
    model, run = save_model(tmp_path / "start", 16, 2, 2), tmp_path / "run"
    few = [word for word in FEW if not word.startswith("task.numbers")]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"task: {{name: '{own}:Doubling', largest: 7}}\nrhythm: {{horizon: [2, 8]}}\n")
    assert main(["train", str(recipe), *few, f"model.path={model}", f"output.path={run}", "grpo.max_steps=2"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["task"] == "own_tasks:Doubling" and result["steps"] == 2
    assert result["examples"][0]["label"].startswith("make ")
    assert "own_tasks:Doubling" in (run / "report.html").read_text()
    assert main(["evaluate", str(run), "eval.size=3"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["sampled"]["instances"] == 3


def test_settings_are_those_of_the_task(own):
    with pytest.raises(RecipeError, match=r"'level' is not a key of task"):
        load_recipe(TINY, [f"task.name={own}:Doubling"])
    with pytest.raises(RecipeError, match=r"task.numbers must be a list, each entry a whole number, got 3"):
        load_recipe(TINY, ["task.numbers=3"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chess", "task.name must be one of countdown"),
        ("own_tasks:Missing", "own_tasks:Missing cannot be imported: AttributeError"),
        ("own_tasks:OWN", "cannot be imported"),
        ("broken_tasks:Any", "broken_tasks:Any cannot be imported: ModuleNotFoundError: No module named 'nonsense_"),
        ("own_tasks:Bare", "got 'own_tasks:Bare': it does not extend training.task.Task"),
        ("own_tasks:NoPrompt", "got 'own_tasks:NoPrompt': it has no prompt"),
        (":", "cannot be imported"),
    ],
)
def test_what_is_no_task(own, name, message):
    with pytest.raises(RecipeError, match=message):
        find(name)


def test_errors_of_a_task_are_about_its_section():
    with pytest.raises(RecipeError, match=r"task\.level must be one of paper, tiny, got 'hard'"):
        load_recipe(TINY, ["task.level=hard"])
    task = make(load_recipe(TINY).task)
    with pytest.raises(RecipeError, match="task, eval: size must be a number, got None"):
        instances_of(task, "test", None)

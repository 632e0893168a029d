"""Tasks of a user's own that are wrong: one line that names the task, and never a figure."""

from __future__ import annotations

import json
import re
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from training.__main__ import main
from training.checked import Checked
from training.settings import RecipeError
from training.task import Figure, Task, TaskSettings, make

from .runs import FEW, save_model

FIRST = {"train": 1, "validation": 1000, "test": 2000}


class Own(Task):
    def instances(self, split, size):
        return [{"n": n} for n in range(FIRST[split], FIRST[split] + size)]

    def prompt(self, instance):
        return f"make {instance['n']}"

    def correct(self, response, instance):
        return response == "good"


class Unmakeable(Own):
    def __init__(self, settings):
        raise KeyError("nothing")


class Leaving(Own):
    def __init__(self, settings):
        sys.exit(0)


def own(**methods) -> Checked:
    """A task that is right but for some methods."""
    return Checked(type("Wrong", (Own,), methods)(TaskSettings("mine:Wrong")))


def rewarding(*given, name="correctness"):
    return property(lambda _: {"correctness": lambda r, i: [1] * len(r), name: lambda r, i: given[0]})


def test_what_is_right_passes():
    task = own(figures=lambda *_: {"f": Figure("f", np.float32(0.5))}, counts=lambda *_: {"a": 1})
    held_out = task.instances("test", 3)
    assert held_out == [{"n": 2000}, {"n": 2001}, {"n": 2002}] == task.instances("test", 3)
    assert task.prompt(held_out[0]) == task.label(held_out[0]) == "make 2000" and task.describe() == "mine:Wrong"
    assert task.rewards["correctness"](["good", "bad"], held_out[:2]) == [1.0, 0.0]
    assert task.correct("good", held_out[0]) is True and task.counts("", held_out[0]) == {"a": 1}
    assert type(task.figures({}, 0, 0)["f"].value) is float and task.stand_in() is None
    assert own(rewards=rewarding(np.ones(2, dtype=np.float32))).rewards["correctness"](["", ""], [{}, {}]) == [1.0, 1.0]
    for given in (
        [True, False],
        (np.True_, np.False_),
        np.array([1, 0]),
        [np.float16(1), np.float64(0)],
        torch.tensor([1, 0], dtype=torch.bfloat16),
        torch.tensor([[1.0], [0.0]], requires_grad=True),
        [torch.tensor(1), torch.tensor(False)],
        iter([1, 0]),
    ):
        judged = own(rewards=rewarding(given)).rewards["correctness"](["", ""], [{}, {}])
        assert judged == [1.0, 0.0] and {type(one) for one in judged} == {float}


def test_what_instances_says_of_a_setting_stays_as_it_is():
    def instances(*_):
        raise ValueError("level must be one of a, b, got 'c'")

    with pytest.raises(ValueError, match=r"^level must be one of a, b, got 'c'$"):
        own(instances=instances).instances("test", 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "give a list, got None"),
        ([{"n": 1}], "give 2 of split test, got 1"),
        ([{"n": n} for n in range(3)], "give 2 of split test, got 3"),
        ([1, 2], "give mappings of what JSON has, got 1"),
        ([{"n": {1}}, {"n": 2}], "give mappings of what JSON has, got {'n': {1}}"),
        ([{"n": 1, "set": None}, {"n": 2}], "give all of a split a text as set, or none, got {'n': 1, 'set': None}"),
        ([{"n": 1, "set": "a"}, {"n": 2}], "give all of a split a text as set, or none, got {'n': 2}"),
        ([{"n": 1}, {"n": 1}], "give no question of test twice, got 'make 1'"),
        (np.arange(2), "give a list, got array"),
    ],
)
def test_instances(given, said):
    with pytest.raises(RecipeError, match=re.escape(f"mine:Wrong: instances must {said}")):
        own(instances=lambda *_: given).instances("test", 2)


def test_a_question_may_be_in_two_sets_and_not_in_two_splits():
    task = own(instances=lambda *_: [{"n": 1, "set": "a"}, {"n": 1, "set": "b"}])
    assert len(task.instances("test", None)) == 2
    with pytest.raises(RecipeError, match="instances must give no question to both test and train, got 'make 1'"):
        task.instances("train", None)


@pytest.mark.parametrize("given", [None, "", [], 3, [{"role": "user"}], ["a"], [{"role": "user", "content": ""}]])
def test_prompts(given):
    task = own(prompt=lambda *_: given)
    with pytest.raises(RecipeError) as caught:
        task.instances("test", 1)
    assert str(caught.value).startswith("mine:Wrong: prompt must give text, or chat messages of role and content, got")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "give a list, a number a response, got None"),
        (1.0, "give a list, a number a response, got 1.0"),
        ([1.0], "give 2 numbers, one a response, got [1.0]"),
        ([1.0] * 3, "give 2 numbers, one a response, got [1.0, 1.0, 1.0]"),
        (np.float32(1), "give a list, a number a response, got np.float32(1.0)"),
        (np.array(1.0), "give a list, a number a response, got array(1.)"),
        (torch.tensor(1.0), "give a list, a number a response, got tensor(1.)"),
        ("11", "give a list, a number a response, got '11'"),  # a list of two texts, to a loop
        (b"11", "give a list, a number a response, got b'11'"),
        ({0: 1.0, 1: 0.0}, "give a list, a number a response, got {0: 1.0, 1: 0.0}"),  # of which a loop sees the keys
        ({1.0, 0.0}, "give a list, a number a response, got {0.0, 1.0}"),
        ([1.0, None], "give a finite number for each response, got None: 0.0 where it says nothing"),
        ([1.0, float("nan")], "give a finite number for each response, got nan"),
        ([1.0, float("inf")], "give a finite number for each response, got inf"),
        ([1.0, 10**400], "give a finite number for each response, got 1000"),
        ([1.0, 1e300], "give numbers of at most 1e+18 in size, got 1e+300"),
        ([1.0, -(10**19)], "give numbers of at most 1e+18 in size, got -10000000000000000000"),
        ([1.0, "1"], "give a finite number for each response, got '1'"),
        ([1.0, 1j], "give a finite number for each response, got 1j"),
        ([1.0, torch.ones(2)], "give a finite number for each response, got tensor([1., 1.])"),
        ([1.0, 0.5], "give 1 or 0 for each response, got 0.5"),
    ],
)
def test_rewards(given, said):
    wrong = own(rewards=rewarding(given))
    with pytest.raises(RecipeError, match=re.escape(f"mine:Wrong: rewards['correctness'] must {said}")):
        wrong.rewards["correctness"](["", ""], [{}, {}])
    if "1 or 0" in said:
        assert own(rewards=rewarding(given, name="part")).rewards["part"](["", ""], [{}, {}]) == given


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"rewards": property(lambda _: {"score": len})}, "rewards must hold correctness, got ['score']"),
        ({"correct": lambda *_: None}, "rewards['correctness'] must give a finite number for each response, got None"),
        (
            {"correct": lambda *_: 1 / 0},
            "rewards['correctness'] must not raise, got ZeroDivisionError: division by zero (test_checked.py, line ",
        ),
        ({"counts": lambda *_: {"a": None}}, "counts must give numbers by name, got {'a': None}"),
        ({"figures": lambda *_: {"a": 1.0}}, "figures must give Figures of finite numbers by name, got {'a': 1.0}"),
        ({"label": lambda *_: 7}, "label must give text, got 7"),
        ({"prompt": lambda _, one: one["x"]}, "prompt must not raise, got KeyError: 'x' (test_checked.py, line "),
        ({"correct": lambda *_: sys.exit(0)}, "rewards['correctness'] must not raise, got SystemExit: 0 (test_checked"),
        (
            {"rewards": rewarding(1 / 0 for _ in range(2))},
            "rewards['correctness'] must not raise, got ZeroDivisionError: division by zero (test_checked.py, line ",
        ),
    ],
)
def test_what_else_may_be_wrong(methods, said):
    task = own(**methods)

    def use():
        (one,) = task.instances("test", 1)
        task.rewards["correctness"]([""], [one])
        task.figures(task.counts("", one), 1, 0)

    with pytest.raises(RecipeError) as caught:
        use()
    assert str(caught.value).startswith(f"mine:Wrong: {said}")


def test_a_remark_comes_after_the_training_and_does_not_end_the_run():
    assert own(remark=lambda *_: 1 / 0).remark({}, {}).startswith("mine:Wrong: remark must not raise, got ZeroDiv")


def test_a_task_that_does_not_close_hides_no_other_error(capsys):
    task = own(close=lambda _: 1 / 0, correct=lambda *_: sys.exit("no"))
    with pytest.raises(RecipeError, match="got SystemExit: no"), closing(task):
        task.correct("", {})
    assert capsys.readouterr().err.startswith("warning: mine:Wrong: close must not raise, got ZeroDivisionError")


def test_ctrl_c_in_a_judge_is_no_mistake_of_its():
    with pytest.raises(KeyboardInterrupt):
        own(correct=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)).correct("", {})


def test_the_line_to_mend_is_the_tasks_own():
    """Not that of the library which it called, nor of what calls judges one by one here."""

    class UnprintableError(Exception):
        def __str__(self):
            raise RuntimeError

    def strange(*_):
        raise UnprintableError

    def far(*_):
        return json.loads("{")

    def further(*_):
        return np.zeros(2).reshape(3)

    for correct, said in (
        (far, "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (further, "ValueError: cannot reshape array of size 2 into shape (3,)"),
        (strange, "UnprintableError: a UnprintableError without text"),
    ):
        with pytest.raises(RecipeError) as caught:
            own(correct=correct).correct("", {})
        place = f"({Path(__file__).name}, line {correct.__code__.co_firstlineno + 1})"
        assert str(caught.value) == f"mine:Wrong: rewards['correctness'] must not raise, got {said} {place}"


def test_a_judge_that_is_written_in_c_has_no_line():
    """That of its caller here would be no place to mend."""
    task = own(correct=staticmethod(len), counts=staticmethod(len))
    for method in (task.correct, task.counts):
        with pytest.raises(RecipeError, match=r"got TypeError: len\(\) takes exactly one argument \(2 given\)$"):
            method("", {})


@pytest.mark.parametrize(("kind", "said"), [("Unmakeable", "KeyError: 'nothing'"), ("Leaving", "SystemExit: 0")])
def test_a_task_that_cannot_be_made(kind, said):
    name = f"{__name__}:{kind}"
    with pytest.raises(RecipeError, match=rf"task.name: {name} cannot be made: {said} \(test_checked"):
        make(TaskSettings(name))


def test_a_module_that_leaves_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"task\.name: leaving:Task cannot be imported: SystemExit: 0"):
        make(TaskSettings("leaving:Task"))


class Half(Own):
    def instances(self, split, size):
        return [{"n": n} for n in range(size)] if split == "train" else [{"n": n} for n in range(50, 50 + size)]

    def correct(self, response, instance):
        return 0.5


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_say_so_in_one_line(tmp_path, capsys, command):
    model = save_model(tmp_path / "start", 16, 2, 2)
    capsys.readouterr()
    few = [word for word in FEW if not word.startswith("task.numbers") and (command == "train" or "grpo" not in word)]
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"task: {{name: '{__name__}:Half'}}\nrhythm: {{horizon: [2, 8]}}\n")
    given = [command, str(recipe), *few, f"model.path={model}"]
    out = tmp_path / "out"
    assert main([*given, f"output.path={out}"] if command == "train" else [*given, "--output", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"error: {__name__}:Half: rewards['correctness'] must give 1 or 0 for each response, got 0.5" in said
    assert "Traceback" not in said and not (out / "result.json").exists() and not (out / "evaluation.json").exists()

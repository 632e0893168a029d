"""The task `recall`: its questions and splits, what it takes for right, and what it pays for less."""

from __future__ import annotations

import pytest

from training.recipe import RecipeError, parse_recipe
from training.task import Task, instances_of, make

from .hostile import hostile


def recall(**settings: object) -> Task:
    content = {"task": {"name": "recall", **settings}, "model": {"path": None, "architecture": "Qwen3ForCausalLM"}}
    return make(parse_recipe(content).task)


def test_questions_of_three_splits_that_share_none() -> None:
    task = recall(lines=5)
    prompts: set[object] = set()
    for split in ("train", "validation", "test"):
        found = task.instances(split, None)  # held to by `checked`: no question twice, none in two splits
        assert len(found) > 1600 and found[:7] == recall(lines=5).instances(split, 7)
        prompts |= {task.prompt(one) for one in found}
        assert all(len({line.split()[0] for line in one["lines"]}) == 5 for one in found)
    assert len(prompts) > 4800
    with pytest.raises(RecipeError, match="test must have 2000 questions, got 1633"):
        instances_of(task, "test", 2000)


def test_only_the_whole_list_so_many_times_over_is_right() -> None:
    task = recall(lines=3, times=2)
    (one,) = task.instances("test", 1)
    answer = "\n".join(one["lines"] * 2)
    assert len(answer) == 3 * 2 * 8 - 1
    assert one["lines"][0] in task.prompt(one) and "2 times over" in task.prompt(one)
    shares = task.rewards["lines"]
    for response, right, share in (
        (answer, True, 1.0),
        (f" {answer}\n", True, 1.0),
        ("\n".join(one["lines"]), False, 0.5),
        ("\n".join(one["lines"] * 3), False, 1.0),
        (answer[:-1] + "x", False, 5 / 6),
        ("\n".join(reversed(one["lines"] * 2)), False, None),
        ("", False, 0.0),
    ):
        assert task.correct(response, one) is right, response
        assert share is None or shares([response], [one]) == [share], response
    given = {"lines": ["bada 10", "kilo 20", "muno 10"]}
    assert task.rewards["numbers"](["", "x10x", "2 0", answer], [given] * 3 + [one]) == [0.0, 2 / 3, 0.0, 1.0]


def test_hostile_answers_are_not_right() -> None:
    task = recall(lines=4, times=2)
    (one,) = task.instances("test", 1)
    responses = [response for _, response in hostile(10_000)]
    assert not any(task.rewards["correctness"](responses, [one] * len(responses)))
    for name in ("lines", "numbers"):
        assert all(0 <= reward <= 1 for reward in task.rewards[name](responses, [one] * len(responses)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lines": 0}, "task.lines must be from 1 to 4900, the names there are, got 0"),
        ({"lines": 5000}, "task.lines must be from 1 to 4900, the names there are, got 5000"),
        ({"times": 0}, "task.times must be at least 1, got 0"),
    ],
)
def test_settings_that_it_does_not_take(settings: dict[str, int], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recall(**settings)

"""What a run needs of a task, and how a task is found by its name.

A task is a class: `Settings`, the keys of a recipe's section `task`; `instances`, the questions of a split; `prompt`, a
question in words; `correct`, or `rewards`, which judge responses. The rest has defaults. The tasks that come with this
repository are the files and folders of `training/tasks/`; a user's own is named `module:Class`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from textwrap import shorten
from typing import Any, ClassVar, Literal

from . import tasks
from .settings import RecipeError

SplitName = Literal["train", "validation", "test"]
Instance = dict[str, Any]  # a question: values that JSON has. The key `set`, if any, names the test set it belongs to
Prompt = str | list[dict[str, str]]  # text as it stands, or chat messages
Reward = Callable[[Sequence[str], Sequence[Instance]], list[float]]  # responses, and the instances they answer
CORRECTNESS = "correctness"  # the reward that evaluation counts: 1.0 for a right answer, 0.0 otherwise


@dataclass
class TaskSettings:
    """The section `task` of a recipe. A task's `Settings` adds its own keys, with defaults.

    `__post_init__` may check them: its `ValueError`s begin with the key, as in `level must be one of ..., got ...`.
    """

    name: str
    train_size: int | None = None  # instances to train on; None: all of a split that has an end


@dataclass(frozen=True)
class Figure:
    """A line of the report's table about what responses are made of.

    Attributes:
        name: in words, `equations a response`.
        value: of all responses together.
        share: printed as a percentage.
    """

    name: str
    value: float
    share: bool = False


class Task:
    """What is trained on. Subclasses must have `instances`, `prompt`, and `correct` or `rewards`.

    A run holds them to what is said here (`checked.py`): a mistake is a line that names the task.
    """

    Settings: ClassVar[type[TaskSettings]] = TaskSettings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        """The first `size` instances of a split, always the same; all of them for None.

        No question is in two splits, none is held out twice (in one `set`), and a longer list begins with the shorter.

        Raises:
            ValueError: where the split has fewer, or no end and `size` is None.
        """
        raise NotImplementedError

    def prompt(self, instance: Instance) -> Prompt:
        """The question as a model is asked: text, or chat messages for an instruct model."""
        raise NotImplementedError

    def correct(self, response: str, instance: Instance) -> bool:
        """Whether a response answers rightly. Must not raise, whatever the text, and must take bounded time."""
        raise NotImplementedError

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """What a recipe may name in `grpo.rewards`; `correctness` must be among them."""
        return {CORRECTNESS: one_by_one(self.correct)}

    def label(self, instance: Instance) -> str:
        """A few words that tell an instance from others, for the report."""
        prompt = self.prompt(instance)
        return shorten(prompt if isinstance(prompt, str) else prompt[-1]["content"], 48, placeholder=" ...")

    def describe(self) -> str:
        """The task in a few words, for headlines."""
        return str(self.settings.name)

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        """Counts of what a response holds, which add up over responses; the same keys for every response."""
        return {}

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        """Lines for the report, by key, from the sums of `counts` over all responses and the number of right ones."""
        return {}

    def remark(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        """A sentence for the report about how two evaluations differ: their summaries, `figures` included."""
        return ""

    def stand_in(self) -> Task | None:
        """This task on a few rows that come with it, for dry runs where its own cannot be read; None if it has none."""
        return None

    def close(self) -> None:
        """End what the task started, such as worker processes. A closed task may be used again."""


def one_by_one(judge: Callable[[str, Instance], float]) -> Reward:
    """A reward from a function of one response and its instance."""

    def reward(responses: Sequence[str], instances: Sequence[Instance]) -> list[float]:
        return [judge(response, instance) for response, instance in zip(responses, instances, strict=True)]

    return reward


@dataclass(frozen=True)
class Asked:
    """A prompt as the model reads it: as text, and as tokens."""

    text: str
    tokens: list[int]


def as_asked(prompt: Prompt, tokenizer: Any) -> Asked:
    """A prompt as TRL asks it in training: a chat template writes the special tokens itself, a text has them added."""
    plain = isinstance(prompt, str)
    text = prompt if plain else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return Asked(text, tokenizer(text, add_special_tokens=plain)["input_ids"])


def asked(task: Task, instances: Sequence[Instance], tokenizer: Any) -> list[Asked]:
    """The prompts of instances as the model reads them."""
    return [as_asked(task.prompt(instance), tokenizer) for instance in instances]


def names() -> list[str]:
    """The tasks that come with this repository."""
    return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__) if not module.name.startswith("_"))


def find(name: str) -> type[Task]:
    """The class of a task: `countdown` is `training/tasks/countdown`, `module:Class` is the user's own.

    `training/tasks/NAME` holds a class of that name in capitals, as `multiple_choice` holds `MultipleChoice`.

    Raises:
        RecipeError: where there is none, it cannot be imported, or it is no task.
    """
    module, colon, wanted = name.partition(":")
    if not colon:
        if name not in names():
            known = ", ".join(names())
            raise RecipeError(f"task.name must be one of {known}, or module:Class for your own, got {name!r}")
        module, wanted = f"{tasks.__name__}.{name}", "".join(word.capitalize() for word in name.split("_"))
    try:
        found = getattr(importlib.import_module(module), wanted)
    except (Exception, SystemExit) as error:  # of any kind: the module may be anybody's
        raise RecipeError(f"task.name: {name} cannot be imported: {type(error).__name__}: {error}") from error
    if said := _misfit(found):
        raise RecipeError(f"task.name must name a task, got {name!r}: {said}; training/task.py says what a task has")
    return found


def _misfit(found: Any) -> str:
    """What a class lacks of a task; empty where it is one."""
    if not inspect.isclass(found):
        return "it is not a class"
    if not issubclass(found, Task):
        return "it does not extend training.task.Task"
    if not (is_dataclass(found.Settings) and issubclass(found.Settings, TaskSettings)):
        return "its Settings are not a dataclass that extends training.task.TaskSettings"
    missing = [name for name in ("instances", "prompt") if getattr(found, name) is getattr(Task, name)]
    if found.correct is Task.correct and found.rewards is Task.rewards:
        missing.append("correct or rewards")
    return f"it has no {missing[0]}" if missing else ""


def make(settings: TaskSettings) -> Task:
    """The task that a recipe's section `task` describes, held to what a task must give.

    Raises:
        RecipeError: for settings it does not take.
    """
    from .checked import Checked, raised  # which extends `Task`

    try:
        return Checked(find(settings.name)(settings))
    except (ValueError, OSError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"task.{error}") from error
    except (Exception, SystemExit) as error:  # of any kind: the task may be anybody's
        raise RecipeError(f"task.name: {settings.name} cannot be made: {raised(error)}") from error


def instances_of(task: Task, split: SplitName, size: int | None) -> list[Instance]:
    """The instances of a split; errors of the task are about the sections `task` and `eval`.

    Raises:
        RecipeError: for a split that the task does not have or is smaller.
    """
    try:
        return task.instances(split, size)
    except (ValueError, OSError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"task, eval: {error}") from error


def check_rewards(task: Task, wanted: Sequence[str]) -> None:
    """Raise `RecipeError` for a reward that the task does not have."""
    for name in wanted:
        if name not in task.rewards:
            raise RecipeError(f"grpo.rewards must hold only {', '.join(task.rewards)}, got {name!r}")

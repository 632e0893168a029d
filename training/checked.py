"""A task held to what `task.py` asks of one: a mistake of a user's own ends a run as one line that names it.

Everything that comes of a task passes here, before a figure is made of it. What can be seen before anything is trained
is seen then: instances, their prompts and labels, and whether a question is in two splits or held out twice.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from textwrap import shorten
from typing import Any

from .settings import RecipeError
from .task import CORRECTNESS, Figure, Instance, Prompt, Reward, SplitName, Task


class Checked(Task):
    """Another task, of which every call raises `RecipeError` where it raises or gives something else.

    Only `instances` lets the `ValueError`s and `OSError`s of the task through, which are about its settings.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task.settings)
        self.task = task
        self._name = task.settings.name
        self._asked: dict[str, set[int]] = {}  # hashes of the prompts of the splits so far

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        found = self._call("instances", self.task.instances, split, size, through=(ValueError, OSError))
        if not isinstance(found, list):
            raise self._wrong("instances", "give a list", found)
        if len(found) != size and (size is not None or not found):
            raise self._wrong("instances", f"give {size or 'some'} of split {split}", len(found))
        keys: set[int] = set()
        seen: set[int] = set()
        for one in found:
            self._check(one, found[0])
            prompt = self.prompt(one)
            key = hash(json.dumps(prompt))
            if other := next((other for other in self._asked if other != split and key in self._asked[other]), ""):
                raise self._wrong("instances", f"give no question to both {other} and {split}", prompt)
            if split != "train" and hash((key, one.get("set"))) in seen:
                raise self._wrong("instances", f"give no question of {split} twice", prompt)
            seen.add(hash((key, one.get("set"))))
            keys.add(key)
            if not isinstance(label := self.label(one), str):
                raise self._wrong("label", "give text", label)
        self._asked.setdefault(split, set()).update(keys)
        return found

    def _check(self, instance: Any, first: Any) -> None:
        try:
            fits = isinstance(instance, dict) and isinstance(json.dumps(instance), str)
        except (TypeError, ValueError, RecursionError):
            fits = False
        if not fits:
            raise self._wrong("instances", "give mappings of what JSON has", instance)
        if ("set" in instance) != ("set" in first) or not isinstance(instance.get("set", ""), str):
            raise self._wrong("instances", "give all of a split a text as set, or none", instance)

    def prompt(self, instance: Instance) -> Prompt:
        prompt = self._call("prompt", self.task.prompt, instance)
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        if not messages or not all(map(_is_message, messages)) or not any(one["content"] for one in messages):
            raise self._wrong("prompt", "give text, or chat messages of role and content", prompt)
        return prompt

    def correct(self, response: str, instance: Instance) -> bool:
        return self.rewards[CORRECTNESS]([response], [instance]) == [1.0]

    @property
    def rewards(self) -> Mapping[str, Reward]:
        rewards = self._call("rewards", lambda: self.task.rewards)
        if not isinstance(rewards, Mapping) or CORRECTNESS not in rewards:
            named = list(rewards) if isinstance(rewards, Mapping) else rewards
            raise self._wrong("rewards", f"hold {CORRECTNESS}", named)
        return {name: self._held(name, judge) for name, judge in rewards.items()}

    def _held(self, name: str, judge: Reward) -> Reward:
        what = f"rewards[{name!r}]"

        def reward(responses: Sequence[str], instances: Sequence[Instance]) -> list[float]:
            given = self._call(what, judge, responses, instances)
            if not isinstance(given, Iterable):
                raise self._wrong(what, "give a list, a number a response", given)
            numbers = [one.item() if hasattr(one, "item") else one for one in given]
            if len(numbers) != len(responses):
                raise self._wrong(what, f"give {len(responses)} numbers, one a response", numbers)
            for one in numbers:
                if not (isinstance(one, Real) and math.isfinite(one)):
                    raise self._wrong(what, "give a finite number for each response", one)
                if name == CORRECTNESS and one not in (0, 1):
                    raise self._wrong(what, "give 1 or 0 for each response", one)
            return [float(one) for one in numbers]

        return reward

    def label(self, instance: Instance) -> str:
        return self._call("label", self.task.label, instance)

    def describe(self) -> str:
        return self._call("describe", self.task.describe)

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        counts = self._call("counts", self.task.counts, response, instance)
        if not isinstance(counts, Mapping) or not all(
            isinstance(n, Real) and math.isfinite(n) for n in counts.values()
        ):
            raise self._wrong("counts", "give numbers by name", counts)
        return dict(counts)

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        figures = self._call("figures", self.task.figures, totals, responses, right)
        fits = isinstance(figures, Mapping) and all(isinstance(one, Figure) for one in figures.values())
        if not fits or not all(isinstance(one.value, Real) and math.isfinite(one.value) for one in figures.values()):
            raise self._wrong("figures", "give Figures of finite numbers by name", figures)
        return {name: replace(one, value=float(one.value)) for name, one in figures.items()}

    def remark(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        try:
            return str(self._call("remark", self.task.remark, before, after))
        except RecipeError as error:  # the model is trained, and not yet saved
            return str(error)

    def stand_in(self) -> Task | None:
        task = self._call("stand_in", self.task.stand_in)
        return None if task is None else Checked(task)

    def close(self) -> None:
        self._call("close", self.task.close)

    def _call(self, what: str, call: Callable[..., Any], *given: Any, through: tuple[type[Exception], ...] = ()) -> Any:
        try:
            return call(*given)
        except through:
            raise
        except Exception as error:  # of any kind: the task may be anybody's
            raise RecipeError(f"{self._name}: {what} must not raise, got {raised(error)}") from error

    def _wrong(self, what: str, must: str, value: Any) -> RecipeError:
        return RecipeError(f"{self._name}: {what} must {must}, got {shorten(repr(value), 100, placeholder=' ...')}")


def raised(error: Exception) -> str:
    """An error in a line: its type, what it says, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"{shorten(said, 200, placeholder=' ...')} ({Path(place.filename).name}, line {place.lineno})"


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and all(isinstance(one.get(key), str) for key in ("role", "content"))

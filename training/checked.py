"""A task held to what `task.py` asks of one: a mistake of a user's own ends a run as one line that names it.

Everything that comes of a task passes here, before a figure is made of it. What can be seen before anything is trained
is seen then: instances, their prompts and labels, and whether a question is in two splits or held out twice.
"""

from __future__ import annotations

import json
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from .settings import RecipeError
from .task import CORRECTNESS, Figure, Instance, Prompt, Reward, SplitName, Task

LARGEST = 1e18  # of a reward's size: trainers add up squares of rewards in float32, where more is infinite


class Checked(Task):
    """Another task, of which every call raises `RecipeError` where it raises or gives something else.

    `sys.exit` counts as raising, or a judge could end a run as if it had finished; Ctrl-C passes. Only `instances` lets
    the `ValueError`s and `OSError`s of the task through, which are about its settings. What a task is asked when all is
    done, `remark` and `close`, ends nothing.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task.settings)
        self.task = task
        self._name = task.settings.name
        self._asked: dict[str, set[int]] = {}  # hashes of the prompts of the splits so far
        self._given: dict[tuple[str, int | None], list[Instance]] = {}  # a run asks twice, and drawing can take minutes

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        if (split, size) not in self._given:
            self._given[split, size] = self._drawn(split, size)
        return self._given[split, size]

    def _drawn(self, split: SplitName, size: int | None) -> list[Instance]:
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
            given, numbers = self._call(what, lambda: _listed(judge(responses, instances)))
            if numbers is None:
                raise self._wrong(what, "give a list, a number a response", given)
            if len(numbers) != len(responses):
                raise self._wrong(what, f"give {len(responses)} numbers, one a response", numbers)
            for one in numbers:
                if one is None:
                    raise self._wrong(what, "give a finite number for each response", one, "0.0 where it says nothing")
                if not _is_finite(one):
                    raise self._wrong(what, "give a finite number for each response", one)
                if abs(one) > LARGEST:
                    raise self._wrong(what, f"give numbers of at most {LARGEST:g} in size", one)
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
        if not isinstance(counts, Mapping) or not all(map(_is_finite, counts.values())):
            raise self._wrong("counts", "give numbers by name", counts)
        return dict(counts)

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        figures = self._call("figures", self.task.figures, totals, responses, right)
        fits = isinstance(figures, Mapping) and all(isinstance(one, Figure) for one in figures.values())
        if not fits or not all(_is_finite(one.value) for one in figures.values()):
            raise self._wrong("figures", "give Figures of finite numbers by name", figures)
        return {name: replace(one, value=float(one.value)) for name, one in figures.items()}

    def remark(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        try:
            return str(self._call("remark", self.task.remark, before, after))
        except RecipeError as error:
            return str(error)

    def stand_in(self) -> Task | None:
        task = self._call("stand_in", self.task.stand_in)
        return None if task is None else Checked(task)

    def close(self) -> None:
        try:
            self._call("close", self.task.close)
        except RecipeError as error:  # an error that ends the run must not be hidden by this one
            print(f"warning: {error}", file=sys.stderr)

    def _call(self, what: str, call: Callable[..., Any], *given: Any, through: tuple[type[Exception], ...] = ()) -> Any:
        try:
            return call(*given)
        except (*through, KeyboardInterrupt):
            raise
        except BaseException as error:  # of any kind: the task may be anybody's
            raise RecipeError(f"{self._name}: {what} must not raise, got {raised(error, self.task)}") from error

    def _wrong(self, what: str, must: str, value: Any, advice: str = "") -> RecipeError:
        shown = _short(_said(repr, value), 100)
        return RecipeError(f"{self._name}: {what} must {must}, got {shown}" + (f": {advice}" if advice else ""))


def raised(error: BaseException, task: Task | None = None) -> str:
    """An error in a line: its type, what it says, and the line to mend.

    That is the last one outside of Python's library, installed packages and what runs tasks here: of `json.loads(text)`
    in a judge, the line of the judge. The module of `task` counts even if it is an installed one. A method that is
    written in C has no line.
    """
    text = _said(str, error)
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    own = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    place = next((one for one in reversed(frames) if one.filename == own or _may_be_own(one.filename)), frames[-1])
    path = Path(place.filename)
    if path in _CALLERS:
        return _short(said, 200)
    file = f"{path.parent.name}/{path.name}" if path.name == "__init__.py" else path.name
    return f"{_short(said, 200)} ({file}, line {place.lineno})"


_HERE = Path(__file__).parent
_CALLERS = (Path(__file__), _HERE / "task.py")
_LIBRARY = Path(sysconfig.get_path("stdlib"))


def _may_be_own(filename: str) -> bool:
    """Whether a file's code may be the task's: not Python's, not an installed package's, not that which calls tasks."""
    path = Path(filename)
    if filename.startswith("<") or path.is_relative_to(_LIBRARY) or {"site-packages", "dist-packages"} & {*path.parts}:
        return False
    return not path.is_relative_to(_HERE) or path.is_relative_to(_HERE / "tasks")


def _said(how: Callable[[Any], str], value: Any) -> str:
    """`str` or `repr` of what may be anybody's, and so may raise."""
    try:
        return how(value)
    except Exception:
        return f"a {type(value).__name__} without text"


def _short(text: str, length: int) -> str:
    """A text in one line of at most so many characters. `textwrap.shorten` drops a long word whole."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 4] + " ..."


def _listed(given: Any) -> tuple[Any, list[Any] | None]:
    """What a reward gave, and its numbers in order, those of tensors and arrays as Python's; None where it is no list.

    Text, mappings and sets can be iterated over too, but their items are not a number a response.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | Mapping | Set):
        return given, None
    if getattr(given, "ndim", 1) == 0:  # of a tensor or an array: a number
        return given, None
    return given, [_plain(one) for one in given]


def _plain(one: Any) -> Any:
    try:
        return one.item() if hasattr(one, "item") else one
    except (TypeError, ValueError, RuntimeError):  # several numbers
        return one


def _is_finite(one: Any) -> bool:
    try:
        return isinstance(one, Real) and math.isfinite(one)
    except OverflowError:  # of an integer with hundreds of digits
        return False


def _is_message(one: Any) -> bool:
    return isinstance(one, Mapping) and all(isinstance(one.get(key), str) for key in ("role", "content"))

"""Recall: write lines of a prompt again, many times over. Prompts and right answers are as long as one likes.

A question is a list of names, each with a number, and the request to write the whole list `times` over. It asks for
nothing but to look back, over distances that are known: what a line needs stands once in the prompt, and once in each
repetition before.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from ..task import CORRECTNESS, Instance, Prompt, Reward, SplitName, Task, TaskSettings, one_by_one

_SPLITS = ("train", "validation", "test")
_LETTERS = "bdfgklmnprstvz", "aeiou"
_NAMES = ["".join(letters) for letters in product(*_LETTERS, *_LETTERS)]  # of two syllables
random.Random(0).shuffle(_NAMES)


@dataclass
class RecallSettings(TaskSettings):
    """How long questions and their answers are: a line has 8 characters, its end included."""

    lines: int = 40
    times: int = 1  # how often the list is to be written

    def __post_init__(self) -> None:
        if not 1 <= self.lines <= len(_NAMES):
            raise ValueError(f"lines must be from 1 to {len(_NAMES)}, the names there are, got {self.lines}")
        if self.times < 1:
            raise ValueError(f"times must be at least 1, got {self.times}")


class Recall(Task):
    """A list begins with a name of its own, which belongs to one split: no question is asked twice."""

    Settings: ClassVar[type[TaskSettings]] = RecallSettings

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        firsts = _NAMES[_SPLITS.index(split) :: len(_SPLITS)]
        if size is not None and size > len(firsts):
            raise ValueError(f"{split} must have {size} questions, got {len(firsts)}: a name is the first of one alone")
        return [self._draw(random.Random(f"{split} {first}"), first) for first in firsts[:size]]

    def _draw(self, draw: random.Random, first: str) -> Instance:
        others = draw.sample([name for name in _NAMES if name != first], self.settings.lines - 1)
        return {"lines": [f"{name} {draw.randrange(100):02}" for name in (first, *others)]}

    def prompt(self, instance: Instance) -> Prompt:
        times = "once" if self.settings.times == 1 else f"{self.settings.times} times over"
        return "\n".join([*instance["lines"], f"Write all of these lines again, {times}.", ""])

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {
            CORRECTNESS: one_by_one(self.correct),
            "lines": one_by_one(self.right_lines),
            "numbers": one_by_one(numbers),
        }

    def correct(self, response: str, instance: Instance) -> bool:
        return response.strip().split("\n") == self._answer(instance)

    def right_lines(self, response: str, instance: Instance) -> float:
        """The share of the answer's lines that stand where they should."""
        answer = self._answer(instance)
        return sum(line == given for line, given in zip(answer, response.strip().split("\n"))) / len(answer)

    def _answer(self, instance: Instance) -> list[str]:
        return list(instance["lines"]) * self.settings.times


def numbers(response: str, instance: Instance) -> float:
    """The share of lines whose number occurs anywhere: something that even a model which knows nothing earns."""
    return sum(line.split()[1] in response for line in instance["lines"]) / len(instance["lines"])

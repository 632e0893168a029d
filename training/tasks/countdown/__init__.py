"""Countdown: make a target from given numbers with + - * /, using each number exactly once.

The paper trains Qwen3-4B-Base on the four-number game as TinyZero builds it. Instances are generated (`instances`), an
answer is judged exactly and in bounded time (`verify`), and the search traces of the tiny model are counted (`trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...task import CORRECTNESS, Figure, Instance, Prompt, Reward, SplitName, Task, TaskSettings, one_by_one
from . import explain
from .instances import LEVELS
from .instances import split as generate
from .prompts import base_prompt, chat_prompt, tiny_prompt
from .trace import analyse
from .verify import score

_PROMPTS: dict[str, Callable[..., Prompt]] = {"tiny": tiny_prompt, "base": base_prompt, "chat": chat_prompt}
_REWARDS: dict[str, Callable[[str, list[int], int], float]] = {
    "score": score,
    CORRECTNESS: lambda *case: float(score(*case) == 1.0),
    "format": lambda *case: float(score(*case) > 0),
    # Little against the 1.0 of a right answer. An explicit `answer none` earns it, a search that is cut off does not.
    "answered": lambda *case: 0.2 * analyse(*case).answered,
}


class Countdown(Task):
    """The game as a recipe's section `task` describes it."""

    @dataclass
    class Settings(TaskSettings):
        """Which puzzles, and in whose words they are asked."""

        level: str = "tiny"
        numbers: list[int] = field(default_factory=lambda: [3, 4])
        prompt: str = "tiny"
        train_size: int | None = 4400

        def __post_init__(self) -> None:
            for name, value, known in (("prompt", self.prompt, _PROMPTS), ("level", self.level, LEVELS)):
                if value not in known:
                    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    settings: Settings

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        if size is None:
            raise ValueError(f"size must be a number, got None: the {split} split is generated and has no end")
        puzzles = generate(split, size, self.settings.numbers, level=self.settings.level)
        return [dict(puzzle) for puzzle in puzzles]

    def prompt(self, instance: Instance) -> Prompt:
        return _PROMPTS[self.settings.prompt](**instance)

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {name: one_by_one(_of_instance(judge)) for name, judge in _REWARDS.items()}

    def label(self, instance: Instance) -> str:
        return f"{', '.join(map(str, instance['numbers']))} → {instance['target']}"

    def describe(self) -> str:
        return f"countdown ({self.settings.level})"

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        """Of a search trace; other prompts do not ask for one."""
        if self.settings.prompt != "tiny":
            return {}
        return {name: int(value) for name, value in asdict(analyse(response, **instance)).items()}

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        return explain.figures(totals, responses, right) if totals else {}

    def remark(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        return explain.remark(before, after)


def _of_instance(judge: Callable[[str, list[int], int], float]) -> Callable[[str, Instance], float]:
    return lambda response, instance: judge(response, instance["numbers"], instance["target"])

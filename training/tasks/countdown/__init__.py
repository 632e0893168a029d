"""Countdown: make a target from given numbers with + - * /, using each number exactly once.

The paper trains Qwen3-4B-Base on the four-number game as TinyZero builds it. Instances are generated (`instances`), an
answer is judged exactly and in bounded time (`verify`), and the search traces of the tiny model are counted (`trace`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...rows import FileSettings, FileTask
from ...task import CORRECTNESS, Figure, Instance, Prompt, Reward, SplitName, one_by_one
from . import explain
from .instances import LEVELS, split_of
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


class Countdown(FileTask):
    """The game as a recipe's section `task` describes it: generated, or on rows of files.

    Rows are those of TinyZero's set (`nums`, `target`), as they are or as verl takes them (`reward_model.ground_truth`
    with `numbers`, `target`). One file as `train`, without `validation` and `test`, is divided by the numbers of its
    puzzles, as generated ones are.
    """

    @dataclass
    class Settings(FileSettings):
        """Which puzzles, and in whose words they are asked."""

        level: str = "tiny"  # of generated puzzles
        numbers: list[int] = field(default_factory=lambda: [3, 4])  # how many a puzzle has; other rows are left out
        prompt: str = "tiny"  # `rows`: the chat messages that verl's rows bring
        train_size: int | None = 4400

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, value, known in (("prompt", self.prompt, (*_PROMPTS, "rows")), ("level", self.level, LEVELS)):
                if value not in known:
                    raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
            if self.prompt == "rows" and not self.has_files:
                raise ValueError(f"prompt must be one of {', '.join(_PROMPTS)} without files, got 'rows'")

    settings: Settings

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        settings = self.settings
        if not settings.has_files:
            if size is None:
                raise ValueError(f"size must be a number, got None: the {split} split is generated and has no end")
            puzzles = generate(split, size, settings.numbers, level=settings.level)
            return [dict(puzzle) for puzzle in puzzles]
        divided = settings.validation is None and settings.test is None
        found = [
            instance
            for instance in super().instances("train" if divided else split, None)
            if len(instance["numbers"]) in settings.numbers and (not divided or split_of(instance["numbers"]) == split)
        ]
        if len(found) < (1 if size is None else size):
            counts = " or ".join(map(str, settings.numbers))
            raise ValueError(f"{split} must have {size or 1} puzzles of {counts} numbers, got {len(found)}")
        return found[:size]

    def parse(self, row: dict[str, Any]) -> Instance:
        truth = row
        if isinstance(model := row.get("reward_model"), dict) and isinstance(model.get("ground_truth"), dict):
            truth = model["ground_truth"]
        numbers, target = truth.get("nums", truth.get("numbers")), truth.get("target")
        if not (isinstance(numbers, list) and all(map(_whole, numbers)) and _whole(target)):
            raise ValueError(f"it must have whole numbers nums (or numbers) and target, got columns {', '.join(row)}")
        instance = {"numbers": numbers, "target": target}
        if self.settings.prompt != "rows":
            return instance
        if not isinstance(row.get("prompt"), list):
            raise ValueError(
                f"it must have chat messages as prompt, got {row.get('prompt')!r}: task.prompt may be chat"
            )
        return instance | {"prompt": row["prompt"]}

    def question(self, instance: Instance) -> str:
        return f"{sorted(instance['numbers'])} {instance['target']}"

    def prompt(self, instance: Instance) -> Prompt:
        if self.settings.prompt == "rows":
            return instance["prompt"]
        return _PROMPTS[self.settings.prompt](instance["numbers"], instance["target"])

    @property
    def rewards(self) -> Mapping[str, Reward]:
        return {name: one_by_one(_of_instance(judge)) for name, judge in _REWARDS.items()}

    def label(self, instance: Instance) -> str:
        return f"{', '.join(map(str, instance['numbers']))} → {instance['target']}"

    def describe(self) -> str:
        kind = "rows" if self.settings.has_files else self.settings.level
        return f"countdown ({kind})"

    def counts(self, response: str, instance: Instance) -> dict[str, int]:
        """Of a search trace; other prompts do not ask for one."""
        if self.settings.prompt != "tiny":
            return {}
        report = analyse(response, instance["numbers"], instance["target"])
        return {name: int(value) for name, value in asdict(report).items()}

    def figures(self, totals: Mapping[str, int], responses: int, right: int) -> dict[str, Figure]:
        return explain.figures(totals, responses, right) if totals else {}

    def remark(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
        return explain.remark(before, after)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_instance(judge: Callable[[str, list[int], int], float]) -> Callable[[str, Instance], float]:
    return lambda response, instance: judge(response, instance["numbers"], instance["target"])

"""What a run needs of a task: instances, prompts, rewards, and counts of what a response holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .recipe import RecipeError, Task
from .tasks import countdown
from .tasks.countdown import Instance
from .tasks.countdown_trace import analyse

Prompt = str | list[dict[str, str]]
Reward = Callable[..., list[float]]

_PROMPTS: dict[str, Callable[..., Prompt]] = {
    "tiny": countdown.tiny_prompt,
    "base": countdown.base_prompt,
    "chat": countdown.chat_prompt,
}
_REWARDS: dict[str, Callable[[str, list[int], int], float]] = {
    "score": countdown.score,
    "correctness": lambda *case: float(countdown.score(*case) == 1.0),
    "format": lambda *case: float(countdown.score(*case) > 0),
    # Little against the 1.0 of a right answer. An explicit `answer none` earns it, a search that is cut off does not.
    "answered": lambda *case: 0.2 * analyse(*case).answered,
}


class Countdown:
    """The Countdown game as a recipe's section `task` describes it.

    Raises:
        RecipeError: for a name, a prompt or a level that does not exist.
    """

    def __init__(self, task: Task) -> None:
        for name, value, known in (
            ("task.name", task.name, ["countdown"]),
            ("task.prompt", task.prompt, list(_PROMPTS)),
            ("task.level", task.level, list(countdown.LEVELS)),
        ):
            if value not in known:
                raise RecipeError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        self.task = task
        self.has_traces = task.prompt == "tiny"

    def instances(self, split: str, size: int) -> list[Instance]:
        """The first `size` instances of a split; no multiset of numbers is in two splits."""
        try:
            return countdown.split(split, size, self.task.numbers, level=self.task.level)
        except ValueError as error:
            raise RecipeError(f"task, eval: {error}") from error

    def prompt(self, instance: Instance) -> Prompt:
        return _PROMPTS[self.task.prompt](**instance)

    def text(self, instance: Instance, tokenizer: Any) -> str:
        """The prompt as the model reads it."""
        prompt = self.prompt(instance)
        if isinstance(prompt, str):
            return prompt
        return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)

    def correct(self, completion: str, instance: Instance) -> bool:
        return countdown.score(completion, instance["numbers"], instance["target"]) == 1.0

    def made_of(self, completion: str, instance: Instance) -> dict[str, int]:
        """Counts of what a search trace holds (equations, right ones, ...), which add up; empty for other prompts."""
        if not self.has_traces:
            return {}
        return {name: int(value) for name, value in asdict(analyse(completion, **instance)).items()}

    def training_set(self, size: int) -> dict[str, list[Any]]:
        """The train split for TRL: prompts, and the arguments that rewards take besides the completion."""
        instances = self.instances("train", size)
        return {
            "prompt": [self.prompt(instance) for instance in instances],
            "numbers": [instance["numbers"] for instance in instances],
            "target": [instance["target"] for instance in instances],
        }


def reward_functions(names: Sequence[str]) -> list[Reward]:
    """Rewards in TRL's signature, named as in the recipe.

    Raises:
        RecipeError: for a name that no reward has.
    """
    for name in names:
        if name not in _REWARDS:
            raise RecipeError(f"grpo.rewards must hold only {', '.join(_REWARDS)}, got {name!r}")
    return [_reward(name) for name in names]


def _reward(name: str) -> Reward:
    judge = _REWARDS[name]

    def reward(completions: list[Any], numbers: list[list[int]], target: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [judge(*case) for case in zip(texts, numbers, target)]

    reward.__name__ = name
    return reward

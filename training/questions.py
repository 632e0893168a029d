"""The train split of a task as TRL takes it: a data set of prompts, and reward functions in its signature.

The data set holds the number of an instance beside its prompt, not the instance itself: a column would give all
instances the same keys and types. The reward functions look the instance up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .settings import RecipeError
from .task import Instance, Reward, Task, check_rewards, instances_of

TrlReward = Callable[..., list[float]]


def training_questions(
    task: Task, rewards: Sequence[str], batch: int = 1
) -> tuple[dict[str, list[Any]], list[TrlReward]]:
    """The columns of the data set, and the named rewards of the task.

    Args:
        batch: the prompts that are answered at a time. Of fewer TRL makes no batch, and a run would end without a step.

    Raises:
        RecipeError: where the train split has fewer instances than the settings ask for, or than a batch has prompts,
            or a reward does not exist.
    """
    check_rewards(task, rewards)
    instances = instances_of(task, "train", task.settings.train_size)
    if len(instances) < batch:
        raise RecipeError(
            f"task.train_size must be at least {batch}, as many questions as a batch has prompts, got {len(instances)}"
        )
    columns = {"prompt": [task.prompt(instance) for instance in instances], "instance": list(range(len(instances)))}
    return columns, [_for_trl(name, task.rewards[name], instances) for name in rewards]


def _for_trl(name: str, judge: Reward, instances: Sequence[Instance]) -> TrlReward:
    def reward(completions: list[Any], instance: list[int], **_: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return judge(texts, [instances[i] for i in instance])

    reward.__name__ = name  # TRL logs it by this name
    return reward

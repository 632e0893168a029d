"""A recipe made small enough for a dry run: every part of it stays, with less in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from ..recipe import Recipe, RecipeError
from ..task import Instance

STEPS, GROUP, TOKENS = 2, 2, 32  # optimizer steps, responses a prompt, tokens a response: beyond the horizon's 10
PROMPTS, A_SET = 8, 2  # instances to train on, and of each test set
ALONE = 4  # instances of a split that has no sets

# Settings of grpo that need a GPU, a package or other processes, take minutes to begin with, or would send something
# elsewhere, and what they are about.
_LEFT_OUT = (
    (r"use_vllm|vllm_\w+", "vLLM"),
    (r"use_liger_kernel|liger_\w+", "Liger's kernels"),
    (r"bf16|fp16|tf32|\w+_full_eval", "mixed precision"),
    (r"torch_compile\w*", "torch.compile"),
    (r"ddp_\w+|ds3_\w+", "several processes"),
    ("report_to|run_name|project", "reports elsewhere"),
)


def left_out(content: dict[str, Any]) -> list[str]:
    """Take the settings out of a recipe's dictionary that a dry run cannot honour; returns what they are about."""
    grpo = content.get("grpo")
    found = []
    for names, what in _LEFT_OUT if isinstance(grpo, dict) else ():
        if keys := [key for key in grpo if re.fullmatch(names, str(key)) and grpo[key] not in (None, False, "none")]:
            found.append(f"{what} ({', '.join(f'grpo.{key}' for key in keys)})")
        for key in [key for key in grpo if re.fullmatch(names, str(key))]:
            del grpo[key]
    return found


def check_sizes(recipe: Recipe, train: int | None) -> str:
    """What the recipe's numbers come to, in words.

    Args:
        train: the number of instances to train on; None where that is not known.

    Raises:
        RecipeError: where a batch would take more prompts than there are, so that no step could be made.
    """
    grpo = recipe.grpo
    batch = grpo.per_device_train_batch_size * grpo.steps_per_generation  # TRL refuses one that groups do not divide
    prompts = batch // grpo.num_generations
    if train is not None and prompts > train:
        most = train * grpo.num_generations // grpo.steps_per_generation
        raise RecipeError(
            f"grpo.per_device_train_batch_size must be at most {most}, got {grpo.per_device_train_batch_size}: a batch "
            f"of responses would answer {prompts} prompts, and there are {train} to train on"
        )
    repeats = int(grpo.more.get("num_iterations", 1))
    steps = grpo.steps_per_generation * repeats / grpo.gradient_accumulation_steps  # optimizer steps a batch
    total = grpo.max_steps / steps * prompts
    seen = f"{total:,.0f} prompts are answered"
    if train is not None:
        passes = total / train
        seen = f"each prompt is seen {passes:.3g} times" if passes >= 1 else f"{passes:.0%} of the prompts are seen"
    return (
        f"{batch:,} responses a batch, {grpo.num_generations} to each of {prompts} prompts, make {steps:g} optimizer "
        f"step{'s' * (steps != 1)}; in {grpo.max_steps:,} steps {seen}"
    )


def cut_down(recipe: Recipe, *, random: bool, attention: str) -> Recipe:
    """The recipe with few steps of few short responses on a CPU; the shape of its batches, its loss and credit stay.

    Args:
        random: whether a small random model stands in, whose layers and heads have other numbers.
        attention: what computes attention.
    """
    small = deepcopy(recipe)
    grpo, evaluation = small.grpo, small.eval
    repeats = min(int(grpo.more.get("num_iterations", 1)), 2)
    if "num_iterations" in grpo.more:
        grpo.more["num_iterations"] = repeats
    together = grpo.gradient_accumulation_steps == grpo.steps_per_generation
    stale = grpo.steps_per_generation > grpo.gradient_accumulation_steps  # later steps of a batch are off-policy
    grpo.gradient_accumulation_steps = min(grpo.gradient_accumulation_steps, 2)
    grpo.steps_per_generation = grpo.gradient_accumulation_steps * (2 if stale else 1) if together or stale else 1
    grpo.max_steps = min(grpo.max_steps, STEPS)
    grpo.num_generations = grpo.per_device_train_batch_size = GROUP
    grpo.max_completion_length = min(grpo.max_completion_length, TOKENS)
    if grpo.warmup_steps >= 1:
        grpo.warmup_steps = min(grpo.warmup_steps, 1)
    if small.output.checkpoint_steps is not None:
        small.output.checkpoint_steps = 1
    if "dataloader_num_workers" in grpo.more:
        grpo.more["dataloader_num_workers"] = min(int(grpo.more["dataloader_num_workers"]), 1)
    if random:
        layers = small.rhythm.layers if isinstance(small.rhythm.layers, str) else "middle5"
        small.rhythm = replace(small.rhythm, groups=None, layers=layers)
    evaluation.batch_size = min(evaluation.batch_size, ALONE)
    small.model.dtype, small.model.attn_implementation = "float32", attention
    _few_samples(evaluation)
    return small


def _few_samples(evaluation: Any) -> None:
    """Two samples where there are more; responses as short as those of training."""
    samples = evaluation.samples
    evaluation.samples = (
        {name: min(count, 2) for name, count in samples.items()} if isinstance(samples, dict) else min(samples, 2)
    )
    if evaluation.max_tokens is not None:
        evaluation.max_tokens = min(evaluation.max_tokens, TOKENS)


def few(instances: Sequence[Instance]) -> list[Instance]:
    """The first instances of each test set."""
    names = list(dict.fromkeys(instance.get("set") for instance in instances))
    each = ALONE if len(names) == 1 else A_SET
    return [one for name in names for one in [i for i in instances if i.get("set") == name][:each]]

"""Recipes: YAML files of sections with fixed keys, and overrides typed as `section.key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from rhythm_kernels import RhythmSettings

from .reading import read_yaml
from .settings import TRL_WORDS, LossType, RecipeError, checked, refuse
from .task import SplitName, TaskSettings, find, names

ROOT = Path(__file__).resolve().parent.parent  # paths in recipes are relative to it


@dataclass
class Model:
    """What is trained."""

    path: str | None  # null: a small random model of `architecture`
    architecture: str | None = None  # a class of transformers, which stands in where path is null and in dry runs
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attn_implementation: str = "sdpa"


@dataclass
class Grpo:
    """Our settings of GRPO and our defaults of TRL's.

    The other fields of `trl.GRPOConfig` are accepted too, except those that `settings.refuse` explains.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rewards: list[str] = field(default_factory=lambda: ["correctness"])
    max_steps: int = 50
    num_generations: int = 8
    per_device_train_batch_size: int = 128
    steps_per_generation: int = 1
    gradient_accumulation_steps: int = 1
    max_completion_length: int = 120
    temperature: float = 1.0
    loss_type: LossType = "dapo"
    beta: float = 0.0
    learning_rate: float = 2e-4
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int | float = 0  # below 1: a share of the steps
    lr_scheduler_type: str = "linear"
    seed: int = 0
    more: dict[str, Any] = field(default_factory=dict)  # other fields of `trl.GRPOConfig`


@dataclass
class Eval:
    """How accuracy is measured, before and after."""

    split: SplitName = "test"
    size: int | None = 512  # instances; null: all of the split
    samples: int | dict[str, int] = 1  # sampled responses an instance; by test set, those not named there 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_tokens: int | None = None  # the longest response; None: grpo.max_completion_length
    batch_size: int = 256
    seed: int = 1234


@dataclass
class Output:
    """Where a run's files are written, and how often so much of it that it can go on from there."""

    path: str = "runs/demo"
    checkpoint_steps: int | None = 50  # optimizer steps between checkpoints; null: none, a run cut off begins anew
    checkpoints_kept: int | None = 1  # the newest ones; null: all


@dataclass
class Recipe:
    """Everything a run is made from."""

    task: TaskSettings  # the `Settings` of the task that it names
    model: Model
    grpo: Grpo
    rhythm: RhythmSettings
    eval: Eval
    output: Output

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["grpo"] |= content["grpo"].pop("more")
        return content


def half_precision(recipe: Recipe) -> torch.dtype | None:
    """What a step computes in where weights are kept in more: `grpo.bf16`, `grpo.fp16`, and on a GPU `model.dtype`."""
    more = recipe.grpo.more
    if more.get("bf16", torch.cuda.is_available() and recipe.model.dtype == "bfloat16"):
        return torch.bfloat16
    return torch.float16 if more.get("fp16") else None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `grpo.max_steps=2` (values are YAML).

    Raises:
        RecipeError: as `read_recipe` and `parse_recipe` do.
    """
    return parse_recipe(read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The nested dictionary that a recipe's file holds, with overrides; `parse_recipe` checks what is in it.

    Raises:
        RecipeError: for a file that is no recipe, or an override that is none.
    """
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "training" / "recipes").glob("*.yaml"))
        raise RecipeError(f"{path}: {error.strerror}; recipes here: {', '.join(known)}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"{path}: a recipe must be a mapping with the sections {', '.join(_SECTIONS)}, got {found}")
    return override(content, overrides)


def override(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The nested dictionary of a recipe with overrides such as `grpo.max_steps=2` applied, in place."""
    for one in overrides:
        name, equals, text = one.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise RecipeError(f"an override must be section.key=value, got {one!r}; example: grpo.max_steps=2")
        _known(section, _SECTIONS, "section")
        content[section] = _settings(section, content)
        try:
            content[section][key] = read_yaml(text)
        except ValueError as error:
            raise RecipeError(f"{name} must be YAML, got {text!r}: {error}") from error
    return content


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from the nested dictionary that its file, or `Recipe.to_dict`, holds.

    Raises:
        RecipeError: for a name that does not exist (with those that are spelled like it) or a value that its setting
            does not take.
    """
    for section in content:
        _known(section, _SECTIONS, "section")
    given = {section: _settings(section, content) for section in _SECTIONS}
    if "name" not in given["task"]:
        raise RecipeError(f"task.name must be given: {', '.join(names())}, or module:Class for your own")
    if "path" not in given["model"]:
        raise RecipeError(
            "model.path must be given: a folder, a name on the hub, or null for a small random model of "
            "model.architecture"
        )
    task = find(checked("task.name", given["task"]["name"], str))
    sections = {}
    for section, kind in (_SECTIONS | {"task": task.Settings}).items():
        ours = typing.get_type_hints(kind)
        ours.pop("more", None)
        ours |= _TYPED.get(section, {})
        kinds = _grpo_kinds(ours) if kind is Grpo else ours
        values: dict[str, Any] = {}
        for key, value in given[section].items():
            if kind is Grpo and key not in ours:
                refuse(str(key), value)
            _known(key, kinds, f"key of {section}")
            value = checked(f"{section}.{key}", value, kinds[key])
            (values if key in ours else values.setdefault("more", {}))[key] = value
        try:
            sections[section] = kind(**values)
        except (TypeError, ValueError) as error:  # of RhythmSettings and those of tasks, which check themselves
            raise RecipeError(f"{section}.{error}") from error
    return Recipe(**sections)


def _settings(section: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a section of a recipe holds; nothing where it is not there, or empty."""
    given = content.get(section)
    if given is not None and not isinstance(given, dict):
        raise RecipeError(f"{section} must be a mapping of settings, got {given!r}")
    return given or {}


def _grpo_kinds(ours: dict[str, Any]) -> dict[str, Any]:
    """The types of the section grpo: ours, and those of the other fields of `trl.GRPOConfig`.

    Where TRL's field of a name is a list of words, it replaces our `str`.
    """
    from trl import GRPOConfig

    theirs = typing.get_type_hints(GRPOConfig)
    fields = [f.name for f in dataclasses.fields(GRPOConfig) if f.init]
    return ours | {name: TRL_WORDS.get(name, theirs[name]) for name in fields if name not in ours or ours[name] is str}


# Types of settings that may be more in Python than in a file.
_TYPED: dict[str, dict[str, Any]] = {"rhythm": {"layers": str | list[int], "groups": str | None}}
_SECTIONS: dict[str, Any] = {
    "task": TaskSettings,  # of which each task has its own kind
    "model": Model,
    "grpo": Grpo,
    "rhythm": RhythmSettings,
    "eval": Eval,
    "output": Output,
}


def _known(name: str, names: Any, what: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(names))}"
        raise RecipeError(f"{name!r} is not a {what}; {hint}")

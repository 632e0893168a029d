"""Recipes: YAML files with a fixed set of keys, and overrides typed as `group.key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rhythm_kernels import RhythmSettings

from .reading import read_yaml
from .settings import TRL_WORDS, LossType, RecipeError, checked, refuse

ROOT = Path(__file__).resolve().parent.parent  # paths in recipes are relative to it


@dataclass
class Task:
    """Which puzzles, and in whose words they are asked."""

    name: str = "countdown"
    level: str = "tiny"
    numbers: list[int] = field(default_factory=lambda: [3, 4])
    prompt: str = "tiny"
    train_size: int = 4400


@dataclass
class Model:
    """What is trained."""

    path: str = "training/checkpoints/countdown_tiny"
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attn_implementation: str = "sdpa"


@dataclass
class Grpo:
    """Ours beside the fields of `trl.GRPOConfig`, which are accepted but for those that `settings.refuse` explains."""

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

    split: Literal["train", "validation", "test"] = "test"
    size: int = 512
    temperature: float = 1.0
    batch_size: int = 256
    seed: int = 1234


@dataclass
class Output:
    """Where the run's folder is. What an earlier run left there is kept in `previous/` until this one has finished."""

    path: str = "runs/demo"


@dataclass
class Recipe:
    """Everything a run is made from."""

    task: Task
    model: Model
    grpo: Grpo
    rhythm: RhythmSettings
    eval: Eval
    output: Output

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["grpo"] |= content["grpo"].pop("more")
        return content


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `grpo.max_steps=2` (values are YAML).

    Raises:
        RecipeError: a file, key or value that is not one, with the names that come near.
    """
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "training" / "recipes").glob("*.yaml"))
        raise RecipeError(f"{path}: {error.strerror}; recipes here: {', '.join(known)}") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must hold groups of settings ({', '.join(_GROUPS)})")
    for override in overrides:
        name, equals, text = override.partition("=")
        group, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise RecipeError(f"{override!r}: an override is typed group.key=value, for example grpo.max_steps=2")
        _known(group, _GROUPS, "group")
        section = content[group] = {} if content.get(group) is None else content[group]
        if not isinstance(section, dict):
            raise RecipeError(f"{group}: must hold settings")
        try:
            section[key] = read_yaml(text)
        except ValueError as error:
            raise RecipeError(f"{override!r}: {text!r} is not YAML: {error}") from error
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from the nested dictionary that its file, or `Recipe.to_dict`, holds."""
    for group in content:
        _known(group, _GROUPS, "group")
    sections = {}
    for group, kind in _GROUPS.items():
        given = content.get(group)
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise RecipeError(f"{group}: must hold settings, found {given!r}")
        ours = typing.get_type_hints(kind)
        ours.pop("more", None)
        ours |= _TYPED.get(group, {})
        kinds = _grpo_kinds(ours) if kind is Grpo else ours
        values: dict[str, Any] = {}
        for key, value in given.items():
            if kind is Grpo and key not in ours:
                refuse(str(key), value)
            _known(key, kinds, f"key of {group}")
            value = checked(f"{group}.{key}", value, kinds[key])
            (values if key in ours else values.setdefault("more", {}))[key] = value
        try:
            sections[group] = kind(**values)
        except (TypeError, ValueError) as error:  # of RhythmSettings, which check themselves
            raise RecipeError(f"{group}.{error}") from error
    return Recipe(**sections)


def _grpo_kinds(ours: dict[str, Any]) -> dict[str, Any]:
    """The types of the group grpo: ours, and those of the other fields of `trl.GRPOConfig`.

    A field of ours that is any word is one of the words of TRL's field, where that has a list of them.
    """
    from trl import GRPOConfig

    theirs = typing.get_type_hints(GRPOConfig)
    fields = [f.name for f in dataclasses.fields(GRPOConfig) if f.init]
    return ours | {name: TRL_WORDS.get(name, theirs[name]) for name in fields if name not in ours or ours[name] is str}


# What a file can say of a setting whose type knows more.
_TYPED: dict[str, dict[str, Any]] = {"rhythm": {"layers": str | list[int], "groups": str | None}}
_GROUPS: dict[str, Any] = {
    "task": Task,
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
        raise RecipeError(f"{name!r} is no {what}; {hint}")

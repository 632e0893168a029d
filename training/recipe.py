"""Recipes: YAML files with a fixed set of keys, and overrides typed as `group.key=value`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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
    dtype: str = "float32"
    attn_implementation: str = "sdpa"


@dataclass
class Grpo:
    """Ours beside the fields of `trl.GRPOConfig`, all of which are accepted (see `grpo_fields`)."""

    optimizer: str = "adamw"
    rewards: list[str] = field(default_factory=lambda: ["correctness"])
    max_steps: int = 50
    num_generations: int = 8
    per_device_train_batch_size: int = 128
    steps_per_generation: int = 1
    gradient_accumulation_steps: int = 1
    max_completion_length: int = 120
    temperature: float = 1.0
    loss_type: str = "dapo"
    beta: float = 0.0
    learning_rate: float = 2e-4
    adam_beta2: float = 0.999
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    lr_scheduler_type: str = "linear"
    seed: int = 0
    more: dict[str, Any] = field(default_factory=dict)  # other fields of `trl.GRPOConfig`


@dataclass
class Rhythm:
    """The fields of `RhythmGRPOConfig` without their prefix."""

    mode: str = "coupled"
    gamma_amp: float = 1.5
    top: float = 0.4
    alpha: float = 0.5
    neighbors: int = 3
    window: int = 10
    horizon: tuple[int, int | None] = (10, 100)  # None, `null` in a file: to the end of the response
    layers: str | list[int] = "middle5"
    head_quantile: float = 0.3
    groups: str | None = None
    regroup_steps: int = 0
    sign: str = "both"


@dataclass
class Eval:
    """How accuracy is measured, before and after."""

    split: str = "test"
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
    rhythm: Rhythm
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
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        known = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "training" / "recipes").glob("*.yaml"))
        raise RecipeError(f"{path}: {error.strerror}; recipes here: {', '.join(known)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: must hold groups of settings ({', '.join(_GROUPS)})")
    for override in overrides:
        name, equals, text = override.partition("=")
        group, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise RecipeError(f"{override!r}: an override is typed group.key=value, for example grpo.max_steps=2")
        _known(group, _GROUPS, "group")
        section = content.setdefault(group, {})
        if not isinstance(section, dict):
            raise RecipeError(f"{group}: must hold settings")
        try:
            section[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{override!r}: {text!r} is not YAML") from error
    return parse_recipe(content)


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from the nested dictionary that its file, or `Recipe.to_dict`, holds."""
    for group in content:
        _known(group, _GROUPS, "group")
    sections = {}
    for group, kind in _GROUPS.items():
        given = content.get(group) or {}
        if not isinstance(given, dict):
            raise RecipeError(f"{group}: must hold settings, found {given!r}")
        types_of = typing.get_type_hints(kind)
        types_of.pop("more", None)
        extra = grpo_fields(excluding=types_of) if kind is Grpo and set(given) - set(types_of) else {}
        values: dict[str, Any] = {}
        for key, value in given.items():
            if (group, key) == ("grpo", "resume_from_checkpoint"):
                raise RecipeError("grpo.resume_from_checkpoint: runs cannot be resumed yet; without it one begins anew")
            _known(key, [*types_of, *extra], f"key of {group}")
            if key in types_of:
                values[key] = _allowed(f"{group}.{key}", _coerce(f"{group}.{key}", value, types_of[key]))
            else:
                values.setdefault("more", {})[key] = value
        sections[group] = kind(**values)
    return Recipe(**sections)


class RecipeError(ValueError):
    """Something in a recipe or an override that the user can put right."""


def grpo_fields(excluding: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields of `trl.GRPOConfig`; what the run sets itself is left out."""
    from trl import GRPOConfig

    ours = {"output_dir", "optim", "report_to", "disable_tqdm", "logging_steps", "reward_weights", *excluding}
    return {f.name: f.type for f in dataclasses.fields(GRPOConfig) if f.init and f.name not in ours}


_GROUPS: dict[str, Any] = {
    "task": Task,
    "model": Model,
    "grpo": Grpo,
    "rhythm": Rhythm,
    "eval": Eval,
    "output": Output,
}


# Values that nothing would refuse before the model is loaded, or only after a run. TRL checks its own fields.
_AT_LEAST = {"task.train_size": 1, "eval.size": 1, "eval.batch_size": 1, "eval.temperature": 0}
_ONE_OF = {"grpo.optimizer": ("adamw", "sgd"), "eval.split": ("train", "validation", "test")}


def _allowed(name: str, value: Any) -> Any:
    if name in _AT_LEAST and not value >= _AT_LEAST[name]:
        raise RecipeError(f"{name} is {value!r}: it must be at least {_AT_LEAST[name]}")
    if name in _ONE_OF and value not in _ONE_OF[name]:
        raise RecipeError(f"{name} is {value!r}: it must be one of {', '.join(_ONE_OF[name])}")
    return value


def _known(name: str, names: Any, what: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(names))}"
        raise RecipeError(f"{name!r} is no {what}; {hint}")


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`. YAML 1.1 reads `1e-4` as text and `1` as an integer: both are numbers here."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(name, value, option)
            except RecipeError:
                continue
    elif kind is type(None):
        if value is None:
            return None
    elif origin in (list, tuple):
        kinds = arguments * len(value) if origin is list and isinstance(value, list | tuple) else arguments
        if isinstance(value, list | tuple) and len(value) == len(kinds):
            try:
                return origin(_coerce(name, item, of) for item, of in zip(value, kinds))
            except RecipeError:
                pass
    elif kind is float:
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"{name} is {value!r}: it must be {_in_words(kind)}")


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), [_in_words(argument) for argument in typing.get_args(kind)]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(arguments)
    if origin is list:
        return f"a list, each entry {arguments[0]}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(arguments)}"
    return {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}.get(kind, "null")

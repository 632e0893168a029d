"""Load and check the model that a recipe trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from .evaluation.generate import Decoding, answer, padded, random_stream
from .reading import misfit, read_json
from .recipe import ROOT, Recipe, RecipeError
from .stand_in import stand_in
from .task import Asked, Instance, Prompt, Task, as_asked

_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")


def load(recipe: Recipe, path: Path | None = None) -> tuple[Any, Any]:
    """Model and tokenizer of a recipe, or those saved at `path`, on the GPU where there is one.

    Where the recipe's `model.path` is null, they are a small random model of `model.architecture` and a tokenizer of
    bytes. A path that cannot be had is never replaced by that.

    Raises:
        RecipeError: for files that are no model's, and for a class that is not there or cannot be made small.
    """
    source = str(path or place(recipe) or "")
    if source:
        _check_files(Path(source))
    try:
        model, tokenizer = _saved(source, recipe) if source else _random(recipe)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    except RecipeError:
        raise
    except Exception as error:  # of any kind: what the libraries raise over files that are no model's has no one type
        raise RecipeError(f"model: {source or recipe.model.architecture} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def place(recipe: Recipe) -> str | None:
    """The folder of a recipe's model, or its name on the hub; None where the model is a random one."""
    if recipe.model.path is None:
        return None
    local = ROOT / recipe.model.path
    return str(local) if local.exists() else recipe.model.path


def _saved(source: str, recipe: Recipe) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=getattr(torch, recipe.model.dtype), attn_implementation=recipe.model.attn_implementation
    )
    return model, tokenizer


def _random(recipe: Recipe) -> tuple[Any, Any]:
    if recipe.model.architecture is None:
        raise RecipeError(
            "model.path must be a folder or a name on the hub, got None: for a small random model, name its class, as "
            "in model.architecture=Qwen3ForCausalLM"
        )
    model, tokenizer = stand_in(recipe.model.architecture, dtype=getattr(torch, recipe.model.dtype))
    model.set_attn_implementation(recipe.model.attn_implementation)
    return model, tokenizer


def _check_files(folder: Path) -> None:
    """Refuse a file of a model that is not JSON or not a mapping, by its name, which the libraries do not say."""
    for path in (folder / name for name in _FILES if (folder / name).is_file()):
        try:
            said = misfit(read_json(path.read_text(encoding="utf-8")), {})
        except (OSError, ValueError) as error:
            said = str(error)
        if said:
            raise RecipeError(f"model: {folder} cannot be loaded: {path}: {said}")


def written(recipe: Recipe, tokenizer: Any, prompts: Sequence[Prompt]) -> list[Asked]:
    """Prompts as the model reads them.

    Raises:
        RecipeError: for prompts that the tokenizer cannot write or pad.
    """
    try:
        found = [as_asked(prompt, tokenizer) for prompt in prompts]
        padded(tokenizer, [prompt.tokens for prompt in found])
    except (ValueError, TypeError, TemplateError) as error:
        given = getattr(recipe.task, "prompt", recipe.task.name)  # not every task has words to choose from
        raise RecipeError(f"task.prompt must suit the tokenizer, got {given!r}: {error}") from error
    if not all(prompt.tokens for prompt in found):
        raise RecipeError("task: its prompts must have a token at least, got one without")
    return found


def check_room(recipe: Recipe, config: Any, prompts: Sequence[Asked], *, trains: bool = True) -> int | None:
    """The positions of a model, if it has so many and no more; `trains`: there are responses to learn from.

    Raises:
        RecipeError: where the longest prompt and the longest response do not fit.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    room = positions - max(len(prompt.tokens) for prompt in prompts)
    held = f"the model has {positions} positions, a prompt up to {positions - room} tokens"
    if room < 1:
        raise RecipeError(f"task: no response fits: {held}")
    limits = {"eval.max_tokens": recipe.eval.max_tokens}
    if trains or recipe.eval.max_tokens is None:
        limits["grpo.max_completion_length"] = recipe.grpo.max_completion_length
    for name, limit in limits.items():
        if limit is not None and limit > room:
            raise RecipeError(f"{name} must be at most {room}, got {limit}: {held}")
    return positions


def check_model(
    recipe: Recipe, model: Any, tokenizer: Any, task: Task, instances: Sequence[Instance], *, trains: bool = True
) -> list[Asked]:
    """Let a model that was loaded answer two prompts with three tokens, before anything depends on it.

    Returns:
        All prompts.

    Raises:
        RecipeError: for prompts that the tokenizer cannot write or pad, for responses longer than the model has
            positions, and for a model that loads but does not run with these settings.
    """
    prompts = written(recipe, tokenizer, [task.prompt(instance) for instance in instances])
    check_room(recipe, model.config.get_text_config(), prompts, trains=trains)
    try:
        with random_stream(model.device, 0):
            answer(model, tokenizer, [prompt.tokens for prompt in prompts[:2]], Decoding(3, recipe.eval.temperature))
    except (ImportError, RuntimeError) as error:  # of a kernel that is not there, or not for this dtype or device
        attention, dtype = recipe.model.attn_implementation, recipe.model.dtype
        raise RecipeError(
            f"model: cannot run with attn_implementation={attention} and dtype={dtype}: {shorten(str(error), 400)}"
        ) from error
    return prompts

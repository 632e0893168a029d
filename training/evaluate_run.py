"""`evaluate`: measure a run's final model again, on any split, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .folder import CONFIG, EVALUATION, read_run, saved_model, write_text
from .formats import share
from .models import check_model, load
from .recipe import RecipeError, load_recipe
from .task import instances_of, make, texts
from .train import evaluate_both

_HONOURED = ("eval.", "task.", "model.dtype=", "model.attn_implementation=", "grpo.max_completion_length=")


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Evaluate the model in `folder`; prints the figures and returns the file that holds them.

    Raises:
        RecipeError: where no finished run is in `folder`, where another run takes its place meanwhile, or for overrides
            of settings that an evaluation does not read.
    """
    for override in overrides:
        if not override.startswith(_HONOURED):
            raise RecipeError(f"an override of evaluate must begin with {', '.join(_HONOURED)}, got {override!r}")
    run = read_run(folder)
    source = saved_model(folder)
    try:
        load_recipe(folder / CONFIG)
    except RecipeError as error:
        raise RecipeError(f"{folder / CONFIG}: {error}") from error
    recipe = load_recipe(folder / CONFIG, overrides)
    task = make(recipe.task)
    instances = instances_of(task, recipe.eval.split, recipe.eval.size)
    model, tokenizer = load(recipe, source)
    check_model(recipe, model, tokenizer, lambda: texts(task, instances, tokenizer))
    found = {k: e.summary() for k, e in evaluate_both(model, tokenizer, task, instances, recipe, "final").items()}
    if read_run(folder) != run:
        raise RecipeError(f"{folder}: another run took this one's place while it was evaluated; nothing was written")
    path = folder / EVALUATION
    write_text(path, json.dumps({"split": recipe.eval.split, **found}, indent=1) + "\n")
    print(f"\n{folder}, {len(instances)} {recipe.eval.split} instances:")
    for kind, summary in found.items():
        print(f"  {kind:8} {share(summary):>13}   {summary['tokens']:.0f} tokens")
    print(f"  details  {path}")
    return path

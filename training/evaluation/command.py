"""`evaluate`: measure a model without training: a run's final one, a recipe's first one, or any on any task."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..folder import CONFIG, EVALUATION, RESPONSES, Run, read_run, saved_model
from ..models import check_model, load
from ..open_run import Interrupted, lock
from ..recipe import Recipe, RecipeError, half_precision, load_recipe, override, parse_recipe
from ..rows import FileSettings
from ..task import Asked, Instance, instances_of, make
from ..train import versions
from .accuracies import lines_of
from .evaluate import evaluate_both, limit, samples_of
from .generate import ends
from .record import Record, finished
from .summary import KINDS, digest, questions

RUNS = Path("runs/evaluate")  # where evaluations of models that are not of a run are left
MAX_TOKENS = 1024  # of a model and a task without a recipe, where eval.max_tokens says nothing
_ALWAYS = ("eval.", "task.", "grpo.max_completion_length=", "grpo.bf16=", "grpo.fp16=")
_OF_RUN = (*_ALWAYS, "model.dtype=", "model.attn_implementation=")
_OF_RECIPE = (*_ALWAYS, "model.")


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and where the evaluation is left.

    Attributes:
        recipe: its sections task, model and eval, and grpo.max_completion_length; nothing else is heeded.
        folder: where the evaluation is left.
        source: the files of the model, where they are not the recipe's.
        run: the run that it is of, if any.
    """

    recipe: Recipe
    folder: Path
    source: Path | None = None
    run: Run | None = None


def subject(words: Sequence[str], model: str | None, task: str | None, output: Path | None) -> Subject:
    """What the words and options of the command name.

    Raises:
        RecipeError: where they name nothing, or something that cannot be evaluated.
    """
    if model is not None or task is not None:
        if model is None or task is None:
            raise RecipeError("--model and --task must be given together, or a run or recipe in their place")
        return of_model(model, task, words, output)
    if not words or "=" in words[0]:
        raise RecipeError("evaluate must be given a run, a recipe, or --model PATH --task NAME")
    path, overrides = Path(words[0]), words[1:]
    is_recipe = path.is_file() or (path.suffix in (".yaml", ".yml") and not path.is_dir())
    return (of_recipe if is_recipe else of_run)(path, overrides, output)


def of_run(folder: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Subject:
    """The final model of the run in `folder`.

    Raises:
        RecipeError: where no finished run is in `folder`, or for overrides that an evaluation does not read.
    """
    _check(overrides, _OF_RUN)
    run = read_run(folder)
    source = saved_model(folder)
    try:
        load_recipe(folder / CONFIG)
    except RecipeError as error:
        raise RecipeError(f"{folder / CONFIG}: {error}") from error
    return Subject(load_recipe(folder / CONFIG, overrides), output or folder, source, run)


def of_recipe(path: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Subject:
    """The model that a recipe begins with."""
    _check(overrides, _OF_RECIPE)
    recipe = load_recipe(path, overrides)
    return Subject(recipe, output or _place(recipe))


def of_model(model: str, task: str, overrides: Sequence[str] = (), output: Path | None = None) -> Subject:
    """Any model, a folder or a name of the hub, on any task, `module:Class` included.

    Rows of files are all asked, unless a size is given.
    """
    _check(overrides, _OF_RECIPE)
    given: dict[str, Any] = {"model": {"path": model}, "task": {"name": task}, "eval": {"max_tokens": MAX_TOKENS}}
    recipe = parse_recipe(override(given, overrides))
    if "size" not in given["eval"] and isinstance(recipe.task, FileSettings) and recipe.task.has_files:
        recipe.eval.size = None
    return Subject(recipe, output or _place(recipe))


def _check(overrides: Sequence[str], honoured: tuple[str, ...]) -> None:
    for one in overrides:
        if not one.startswith(honoured):
            raise RecipeError(f"an override of evaluate must begin with {', '.join(honoured)}, got {one!r}")


def _place(recipe: Recipe) -> Path:
    """`runs/evaluate/TASK-MODEL`, from the last part of the model's path."""
    return RUNS / re.sub(r"[^\w.-]+", "-", f"{recipe.task.name}-{Path(_model(recipe)).name}")


def _model(recipe: Recipe) -> str:
    """The model's path, or the class of a random one."""
    return recipe.model.path or str(recipe.model.architecture)


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Evaluate the final model of the run in `folder`; see `carry_out`."""
    return carry_out(of_run(folder, overrides))


def carry_out(what: Subject, overwrite: bool = False) -> Path:
    """Evaluate; prints the figures and returns the file that holds them.

    Where it was cut off before, it goes on after the last whole batch; where it is done already, it only prints.

    Raises:
        RecipeError: where the folder holds another evaluation and `overwrite` is not given, where another process
            writes there, where another run takes the place of the one evaluated, or for settings that do not fit.
        Interrupted: for a `KeyboardInterrupt` once there are responses; it says what is kept.
    """
    recipe, folder = what.recipe, what.folder
    task, made, started = make(recipe.task), not folder.exists(), time.perf_counter()
    try:
        instances = instances_of(task, recipe.eval.split, recipe.eval.size)
        samples_of(instances, recipe.eval.samples)
        model, tokenizer = load(recipe, what.source)
        prompts = check_model(recipe, model, tokenizer, task, instances, trains=False)
        identity = identity_of(recipe, model, tokenizer, instances, prompts)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            found = finished(folder, identity)
            took = "finished before"
            if found is None:
                record = Record(folder, identity, overwrite)
                if record.lines:
                    print(f"{record.path}: going on after the {len(record.lines)} responses that it holds")
                found = _measure(what, model, tokenizer, task, instances, record, identity)
                took = f"{time.perf_counter() - started:.0f} s"
    finally:
        task.close()
        if made:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
    model_name = what.run.folder if what.run is not None else _model(recipe)
    about = f"{model_name} on {task.describe()}, {len(instances)} {recipe.eval.split} instances"
    print(f"\n{about} ({took}):", *lines_of(found), sep="\n")
    print(f"  responses  {folder / RESPONSES}\n  details    {folder / EVALUATION}")
    return folder / EVALUATION


def _measure(
    what: Subject,
    model: Any,
    tokenizer: Any,
    task: Any,
    instances: Sequence[Instance],
    record: Record,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Draw what is missing and write `evaluation.json`; returns what it holds."""
    recipe = what.recipe
    try:
        both = evaluate_both(model, tokenizer, task, instances, recipe, "final", record, list(task.rewards))
    except KeyboardInterrupt as error:
        if not record.lines:
            raise
        kept = f"kept: {len(record.lines)} responses in {record.path}; the same command goes on from there"
        raise Interrupted(kept) from error
    found = {
        "model": str(what.source or _model(recipe)),
        "task": task.describe(),
        "split": recipe.eval.split,
        "questions": questions(instances),
        **{kind: one.summary() for kind, one in both.items()},
        "identity": identity,
    }
    for kind in KINDS:
        del found[kind]["seconds"]  # one that was cut off and went on ends in the same file as one that was not
    if what.run is not None and repr(read_run(what.run.folder)) != repr(what.run):  # by repr, NaN equals itself
        raise RecipeError(
            f"{what.run.folder}: another run took this one's place while it was evaluated; nothing was written"
        )
    record.finish(json.dumps(found, indent=1) + "\n")
    return found


def identity_of(
    recipe: Recipe, model: Any, tokenizer: Any, instances: Sequence[Instance], prompts: Sequence[Asked]
) -> dict[str, Any]:
    """What decides every byte of an evaluation: two that agree in this are one, wherever the model's files are."""
    task = asdict(recipe.task)
    task.pop("train_size", None)
    kept = ("split", "samples", "temperature", "top_p", "top_k", "batch_size", "seed")
    settings = {key: getattr(recipe.eval, key) for key in kept} | {"max_tokens": limit(recipe)}
    return {
        "model": {
            "weights": weights_digest(model),
            "config": _config(model),
            "tokenizer": digest([sorted(tokenizer.get_vocab().items()), [prompt.tokens for prompt in prompts]]),
            "ends": sorted(ends(model, tokenizer)),
            "dtype": recipe.model.dtype,
            "computed_in": str(half_precision(recipe)),
            "attn_implementation": recipe.model.attn_implementation,
        },
        "task": task,
        "instances": len(instances),
        "questions": questions(instances),
        "prompts": digest([prompt.text for prompt in prompts]),
        "eval": settings,
        "versions": versions(),
    }


def _config(model: Any) -> str:
    """A hash of what the model's and its generation's configuration say, without where they were read."""
    known = [part.to_dict() for part in (model.config, model.generation_config)]
    return digest([{k: str(v) for k, v in part.items() if k != "_name_or_path"} for part in known])


def weights_digest(model: Any) -> str:
    """A hash of all parameters and buffers of a model, of whatever type, on whatever device."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]

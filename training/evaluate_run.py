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

from .evaluate import evaluate_both, limit, samples_of
from .evaluation import KINDS, digest, questions
from .folder import CONFIG, EVALUATION, RESPONSES, Interrupted, Run, lock, read_run, saved_model
from .formats import estimate, share
from .models import check_model, load
from .recipe import Recipe, RecipeError, load_recipe, override, parse_recipe
from .record import Record, finished
from .task import Instance, instances_of, make, texts
from .train import versions

RUNS = Path("runs/evaluate")  # where evaluations of models that are not of a run are left
MAX_TOKENS = 1024  # of a model and a task without a recipe, where eval.max_tokens says nothing
_OF_RUN = ("eval.", "task.", "model.dtype=", "model.attn_implementation=", "grpo.max_completion_length=")
_OF_RECIPE = ("eval.", "task.", "model.", "grpo.max_completion_length=")


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

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


def of_run(folder: Path, overrides: Sequence[str] = (), output: Path | None = None) -> Subject:
    """The final model of the run in `folder`.

    Raises:
        RecipeError: where no finished run is in `folder`, or for overrides of settings that an evaluation does not read.
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
    """Any model, a folder or a name of the hub, on any task, `module:Class` included."""
    _check(overrides, _OF_RECIPE)
    given = {"model": {"path": model}, "task": {"name": task}, "eval": {"max_tokens": MAX_TOKENS}}
    recipe = parse_recipe(override(given, overrides))
    return Subject(recipe, output or _place(recipe))


def _check(overrides: Sequence[str], honoured: tuple[str, ...]) -> None:
    for one in overrides:
        if not one.startswith(honoured):
            raise RecipeError(f"an override of evaluate must begin with {', '.join(honoured)}, got {one!r}")


def _place(recipe: Recipe) -> Path:
    """`runs/evaluate/TASK-MODEL`, from the last part of the model's path."""
    model = Path(recipe.model.path.rstrip("/")).name
    return RUNS / re.sub(r"[^\w.-]+", "-", f"{recipe.task.name}-{model}")


def evaluate_run(folder: Path, overrides: Sequence[str] = ()) -> Path:
    """Evaluate the final model of the run in `folder`; see `carry_out`."""
    return carry_out(of_run(folder, overrides))


def carry_out(subject: Subject, overwrite: bool = False) -> Path:
    """Evaluate; prints the figures and returns the file that holds them.

    Where it was cut off before, it goes on after the last whole batch; where it is done already, it only prints.

    Raises:
        RecipeError: where the folder holds another evaluation and `overwrite` is not given, where another process
            writes there, where another run takes the place of the one evaluated, or for settings that do not fit.
        Interrupted: for a `KeyboardInterrupt` once there are responses; it says what is kept.
    """
    recipe, folder = subject.recipe, subject.folder
    task, made, started = make(recipe.task), not folder.exists(), time.perf_counter()
    try:
        instances = instances_of(task, recipe.eval.split, recipe.eval.size)
        samples_of(instances, recipe.eval.samples)
        model, tokenizer = load(recipe, subject.source)
        check_model(recipe, model, tokenizer, lambda: texts(task, instances, tokenizer))
        identity = identity_of(recipe, model, tokenizer, instances, texts(task, instances, tokenizer))
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            found = finished(folder, identity)
            took = "finished before"
            if found is None:
                record = Record(folder, identity, overwrite)
                if record.lines:
                    print(f"{record.path}: going on after the {len(record.lines)} responses that it holds")
                found = _measure(subject, model, tokenizer, task, instances, record, identity)
                took = f"{time.perf_counter() - started:.0f} s"
    finally:
        task.close()
        if made:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
    model_name = subject.run.folder if subject.run is not None else recipe.model.path
    about = f"{model_name} on {task.describe()}, {len(instances)} {recipe.eval.split} instances"
    print(f"\n{about} ({took}):", *lines_of(found), sep="\n")
    print(f"  responses  {folder / RESPONSES}\n  details    {folder / EVALUATION}")
    return folder / EVALUATION


def _measure(
    subject: Subject,
    model: Any,
    tokenizer: Any,
    task: Any,
    instances: Sequence[Instance],
    record: Record,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Draw what is missing and write `evaluation.json`; returns what it holds."""
    recipe = subject.recipe
    try:
        both = evaluate_both(model, tokenizer, task, instances, recipe, "final", record, list(task.rewards))
    except KeyboardInterrupt as error:
        if not record.lines:
            raise
        kept = f"kept: {len(record.lines)} responses in {record.path}; the same command goes on from there"
        raise Interrupted(kept) from error
    found = {
        "model": str(subject.source or recipe.model.path),
        "task": task.describe(),
        "split": recipe.eval.split,
        "questions": questions(instances),
        **{kind: one.summary() for kind, one in both.items()},
        "identity": identity,
    }
    for kind in KINDS:
        del found[kind]["seconds"]  # one that was cut off and went on ends in the same file as one that was not
    if subject.run is not None and read_run(subject.run.folder) != subject.run:
        raise RecipeError(
            f"{subject.run.folder}: another run took this one's place while it was evaluated; nothing was written"
        )
    record.finish(json.dumps(found, indent=1) + "\n")
    return found


def identity_of(
    recipe: Recipe, model: Any, tokenizer: Any, instances: Sequence[Instance], prompts: Sequence[str]
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
            "tokenizer": digest([sorted(tokenizer.get_vocab().items()), tokenizer(list(prompts))["input_ids"]]),
            "dtype": recipe.model.dtype,
            "attn_implementation": recipe.model.attn_implementation,
        },
        "task": task,
        "instances": len(instances),
        "questions": questions(instances),
        "prompts": digest(list(prompts)),
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


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """The figures of an evaluation as lines of text."""
    lines = []
    for kind in KINDS:
        summary = found[kind]
        name = estimate(summary) if kind == KINDS[0] else ""
        lines.append(
            f"  {kind:8} {share(summary):>13}   {_interval(summary)}   {summary['tokens']:.0f} tokens, "
            f"{summary['cut_off']:.1%} cut off{f'   ({name})' if name else ''}"
        )
        passes = [(k, found) for k, found in summary["pass"].items() if k != "1"]
        lines += [f"    pass@{k:<5} {one['value']:>6.1%}        {_low_high(one)}" for k, one in passes]
        for name, of in summary.get("sets", {}).items():
            lines.append(
                f"    {name:16} {share(of):>13}   {_interval(of)}   {estimate(of)}, {of['instances']} instances"
            )
        if mean := summary.get("mean_of_sets"):
            lines.append(f"    {'mean of sets':16} {share(mean):>13}   {_low_high(mean)}")
    return lines


def _interval(summary: Mapping[str, Any]) -> str:
    return _low_high(summary["pass"]["1"])


def _low_high(found: Mapping[str, float]) -> str:
    return f"({found['low']:.1%} to {found['high']:.1%})"

"""`train --dry-run`: a recipe carried out end to end on a CPU, with less of everything, before a GPU is rented for it.

The code is that of `train`. What cannot be had here, the weights first of all, has a stand-in, and the list at the end
says so: what was checked, and what was not. Nothing is written but in a temporary folder.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent, shorten

import torch

from ..evaluation.evaluate import limit, samples_of
from ..folder import read_run
from ..grpo import trainer_config
from ..models import check_room, load, written
from ..pages.formats import credit_name, size
from ..recipe import Output, Recipe, RecipeError, parse_recipe, read_recipe
from ..row_files import Unreachable
from ..rows import FileTask
from ..stand_in import parameters
from ..task import CORRECTNESS, Instance, SplitName, Task, check_rewards, instances_of, make
from ..train import check_groups, run
from .cut_down import PROMPTS, check_sizes, cut_down, few, left_out
from .trial_model import Findings, TrialModel, trial_model

_FIRST, _PATIENCE = 32, 10.0  # rows to begin with, and seconds after which no more are made
_OWN = "of its own"
_LOOKED_AT = 2000  # prompts whose length is counted
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Responses that are judged: any, and the ways in which tasks here want an answer, X, to be written
_ANSWERS = ("", "The answer is 42.")
_FORMS = (r"So it is \boxed{X}.", "<answer>X</answer>", "The answer is X")


def dry_run(path: str, overrides: Sequence[str] = ()) -> str:
    """Check a recipe; returns the list of what was checked and what was not.

    Raises:
        RecipeError: for anything that would stop the recipe's run, as far as it shows here.
    """
    started = time.perf_counter()
    found = Findings()
    content = read_recipe(path, overrides)
    for what in left_out(content):
        found.unchecked.append(("settings", f"{what}: left out here"))
    recipe = parse_recipe(content)
    check_groups(recipe)
    try:
        with _without_gpu(), TemporaryDirectory(prefix="dry-run-") as scratch:
            _carry_out(recipe, Path(scratch), found)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("nothing was changed") from error
    found.unchecked.append(("speed", "and the memory of activations and generation, which depend on the device"))
    return (
        f"\n{path}: nothing was found that would stop it.\n{found}\nTook {time.perf_counter() - started:.0f} seconds."
    )


@contextmanager
def _without_gpu() -> Iterator[None]:
    """A GPU that is there may be in use, and too small: what asks for one is told that there is none."""
    there, torch.cuda.is_available = torch.cuda.is_available, lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = there


def _carry_out(recipe: Recipe, scratch: Path, found: Findings) -> None:
    recipe = replace(recipe, output=Output(str(scratch / "run")))
    trainer_config(recipe)
    found.checked.append(("settings", "every section, and what TRL makes of the section grpo"))
    task, train, held_out, own = _rows(recipe, found)
    try:
        check_rewards(task, recipe.grpo.rewards)
        found.checked.append(
            (
                "sizes",
                check_sizes(recipe, len(train) if own and recipe.task.train_size is None else recipe.task.train_size),
            )
        )
        model = trial_model(recipe, scratch, found)
        _check_prompts(recipe, task, [*held_out, *train], model, found)
        _check_judges(recipe, task, held_out[0], found)
        given = {"train": train[:PROMPTS], recipe.eval.split: few(held_out)}
        task.instances = lambda split, _: given[split]  # type: ignore[method-assign]
        if model.attention != recipe.model.attn_implementation:
            found.unchecked.append(("attention", f"{recipe.model.attn_implementation}; stood in: {model.attention}"))
        if recipe.model.dtype != "float32":
            found.unchecked.append(("numbers", f"{recipe.model.dtype}; stood in: float32{_lost(recipe)}"))
        first = recipe.rhythm.horizon[0]
        if recipe.rhythm.mode in ("global", "coupled") and recipe.grpo.max_completion_length < 4 * first:
            said = (
                f"whether responses are longer than {first} tokens: in shorter ones no token gets any (rhythm.horizon)"
            )
            found.unchecked.append(("credit", said))
        small = cut_down(recipe, random=not model.is_real, attention=model.attention)
        small.model.path = model.path
        with redirect_stdout(io.StringIO()):  # it speaks of files that are gone in a moment
            folder = run(small, task)
        _describe(small, folder, given[recipe.eval.split], model, found)
    finally:
        task.close()


def _rows(recipe: Recipe, found: Findings) -> tuple[Task, list[Instance], list[Instance], bool]:
    """The task, its training set, its held-out instances, and whether these are its own rows."""
    task = make(recipe.task)
    split, where = recipe.eval.split, _OWN
    try:
        train, left = _some(task, "train", recipe.task.train_size)
        held_out, also = _some(task, split, recipe.eval.size)
        if left or also:
            found.unchecked.append(("data", " and ".join(filter(None, (left, also)))))
    except RecipeError as error:
        task.close()
        other = task.stand_in() if isinstance(error.__cause__, Unreachable) else None
        if other is None:
            raise
        if isinstance(inner := getattr(task, "task", task), FileTask):
            try:
                inner.check_files()
            except (ValueError, OSError) as wrong:
                raise RecipeError(f"task: {wrong}") from wrong
        found.unchecked.append(("data", f"{shorten(str(error), 300)}; stood in: the rows that come with the task"))
        task, where = other, "that come with the task"
        train, held_out = (instances_of(task, which, None) for which in ("train", split))
        held_out = _in_sets(recipe, held_out)
    samples_of(held_out, recipe.eval.samples)
    sets = list(dict.fromkeys(one["set"] for one in held_out if "set" in one))
    told = f" ({', '.join(sets)})" if sets else ""
    rows = f"{len(train):,} to train on and {len(held_out):,} of split {split}{told}, {where}"
    found.checked.append(("rows", rows))
    return task, train, held_out, where == _OWN


def _some(task: Task, split: SplitName, wanted: int | None) -> tuple[list[Instance], str]:
    """The instances of a split; the first ones, and a word about the rest, where all take long to make."""
    started, count = time.perf_counter(), _FIRST
    while wanted is not None and count < wanted:
        first = instances_of(task, split, count)
        if time.perf_counter() - started > _PATIENCE:
            return first, f"{wanted - count:,} more rows of split {split}, which take long to make"
        count *= 2
    return instances_of(task, split, wanted), ""


def _in_sets(recipe: Recipe, instances: list[Instance]) -> list[Instance]:
    """Rows that stand in for several test sets, dealt out to them."""
    files = getattr(recipe.task, recipe.eval.split, None)
    if not isinstance(files, dict) or any("set" in one for one in instances):
        return instances
    names = list(files)
    count = max(len(instances), len(names))
    return [instances[i % len(instances)] | {"set": names[i % len(names)]} for i in range(count)]


def _check_prompts(recipe: Recipe, task: Task, instances: list[Instance], model: TrialModel, found: Findings) -> None:
    """Write prompts as the model reads them, count their tokens and hold them against the model's positions."""
    tokenizer = model.tokenizer
    prompts = written(recipe, tokenizer, [task.prompt(instance) for instance in instances[:_LOOKED_AT]])
    lengths = [len(prompt.tokens) for prompt in prompts]
    longest, unit = max(lengths), "tokens" if model.reads else "bytes"
    of = f"of {len(prompts):,}, the longest has {longest:,}"
    first = prompts[0].text
    shown = indent(first if len(first) <= 1200 else f"{first[:1200]} ...", "| ", lambda _: True)
    found.checked.append(("prompt", f"as the model reads it, {lengths[0]} {unit}; {of}:\n{shown}"))
    text = model.config.get_text_config(decoder=True) if model.config is not None else None
    positions = check_room(recipe, text, prompts) if model.reads else None
    most = max(recipe.grpo.max_completion_length, limit(recipe))
    if positions is None:
        found.unchecked.append(("positions", f"whether the model has room for a prompt and {most:,} tokens"))
    else:
        found.checked.append(("positions", f"{longest:,} and a response of {most:,} fit into {positions:,}"))
    if text is None:
        memory = "unknown: the model's configuration cannot be read here"
    else:
        count = parameters(text)
        memory = f"{count:,} parameters; {_memory(recipe, count)}"
    (found.checked if model.is_real else found.unchecked).append(("memory", memory))


def _memory(recipe: Recipe, count: int) -> str:
    """The bytes of what is there for each parameter."""
    if recipe.model.lora is not None:
        total = size(count * _BYTES[recipe.model.dtype])
        return f"by arithmetic, {total} for weights in {recipe.model.dtype}, and little more for LoRA"
    parts = ["weights", "gradients", *(["two moments"] if recipe.grpo.optimizer == "adamw" else ["momentum"])]
    copies = 2 + (2 if recipe.grpo.optimizer == "adamw" else 1)
    if recipe.grpo.beta > 0:
        parts.append("the reference model")
        copies += 1
    total = size(count * copies * _BYTES[recipe.model.dtype])
    return f"by arithmetic, {total} for {', '.join(parts)} in {recipe.model.dtype}"


def _lost(recipe: Recipe) -> str:
    """What rounding does to the steps of training, in words, if they are small beside most weights."""
    grpo, digits = recipe.grpo, {"bfloat16": 2**-8, "float16": 2**-11}.get(recipe.model.dtype, 0.0)
    largest = grpo.learning_rate / digits if digits else math.inf  # AdamW moves a weight by about the learning rate
    if grpo.optimizer != "adamw" or largest > 0.01:
        return ""
    return f". A step of grpo.learning_rate={grpo.learning_rate:g} is lost in weights above about {largest:.0e}"


def _check_judges(recipe: Recipe, task: Task, instance: Instance, found: Findings) -> None:
    """Reward a few responses of ours to one instance, among them its answer, where it has one under that name."""
    answer = instance.get("answer")
    answer = answer[0] if isinstance(answer, list | tuple) and answer else answer
    responses = [*_ANSWERS, *([form.replace("X", str(answer)) for form in _FORMS] if answer is not None else [])]
    names = list(dict.fromkeys([*recipe.grpo.rewards, CORRECTNESS]))
    columns = [task.rewards[name](responses, [instance] * len(responses)) for name in names]
    if 1.0 not in columns[names.index(CORRECTNESS)]:
        found.unchecked.append(("answers", "whether a right one is rewarded: none of those made up here was right"))
    lines = [
        f"{', '.join(f'{reward:g}' for reward in row):>{4 * len(names)}}  for {shorten(response, 60)!r}"
        for row, response in zip(zip(*columns), responses)
    ]
    found.checked.append(("rewards", "\n".join([f"{', '.join(names)} of responses made up here:", *lines])))


def _describe(small: Recipe, folder: Path, held_out: list[Instance], model: TrialModel, found: Findings) -> None:
    """What the small run did, from what it left."""
    done = read_run(folder)
    steps = len(done.lines)
    if steps < small.grpo.max_steps:
        raise RecipeError(f"grpo.max_steps: the trainer stopped after {steps} of {small.grpo.max_steps} steps")
    gammas = [line["gamma_mean"] for line in done.lines if "gamma_mean" in line]  # of steps that were measured
    grpo = small.grpo
    loss = ", ".join(f"{line['loss']:.3g}" for line in done.lines)
    trained = model.name or "the recipe's own model"
    found.checked.append(
        (
            "training",
            f"{trained}: {steps} steps of {grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps} "
            f"responses of up to {grpo.max_completion_length} tokens, loss {grpo.loss_type} ({loss})",
        )
    )
    credit = credit_name(small.rhythm.mode)
    gamma = f"mean gamma {sum(gammas) / len(gammas):.3f}" if gammas else "nothing is measured"
    found.checked.append(("credit", f"{credit}: {gamma}"))
    count = sum(samples_of(held_out, small.eval.samples))
    found.checked.append(
        ("evaluation", f"{len(held_out)} instances before and after, {count} responses and the greedy")
    )
    load(small, folder / "model")
    pages = sum((folder / name).stat().st_size for name in ("report.html",))
    found.checked.append(("report", f"written, {size(pages)}"))
    found.checked.append(("saving", "the model was saved and read again"))

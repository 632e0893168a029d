"""`train --dry-run`: a recipe carried out end to end on a CPU, with less of everything, before a GPU is rented for it.

The code is that of `train`. What cannot be had here, the weights first of all, has a stand-in, and the list at the end
says so: what was checked, and what was not. Nothing is written but in a temporary folder.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent, shorten
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from .cut_down import PROMPTS, check_sizes, cut_down, few, left_out
from .evaluate import limit, samples_of
from .folder import read_run
from .formats import credit_name, size
from .grpo import trainer_config
from .models import load, place
from .recipe import Output, Recipe, RecipeError, parse_recipe, read_recipe
from .row_files import Unreachable, unreachable
from .stand_in import causal_class, class_of, parameters, random_model, small_config, stand_in
from .task import CORRECTNESS, Instance, SplitName, Task, check_rewards, instances_of, make, texts
from .train import check_groups, run

_SMALL = 64 * 2**20  # bytes of weights, up to which a model is used itself
_FIRST, _PATIENCE = 32, 10.0  # rows to begin with, and seconds after which no more are made
_OWN = "of its own"
_LOOKED_AT = 2000  # prompts whose length is counted
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Responses that are judged: any, and the ways in which tasks here want an answer, X, to be written
_ANSWERS = ("", "The answer is 42.")
_FORMS = (r"So it is \boxed{X}.", "<answer>X</answer>", "The answer is X")


@dataclass
class _Findings:
    """Lines for the list at the end, each under a word that says what it is about."""

    checked: list[tuple[str, str]] = field(default_factory=list)
    unchecked: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [("Checked:", self.checked), ("Not checked:", self.unchecked)]
        return "\n".join(
            "\n".join([title, *(f"  {about:12} {indent(said, ' ' * 15).strip()}" for about, said in lines)])
            for title, lines in parts
        )


@dataclass
class _Model:
    """What is trained in place of a recipe's model.

    Attributes:
        path: of the model that is trained; None: the recipe's own random one.
        config: of the recipe's model, where it is known.
        is_real: whether the recipe's own model is trained.
        reads: whether the tokenizer is the recipe's own.
        name: of what stands in, in words.
        attention: what computes attention.
    """

    path: str | None
    tokenizer: Any
    config: Any
    is_real: bool
    reads: bool
    name: str
    attention: str


def dry_run(path: str, overrides: Sequence[str] = ()) -> str:
    """Check a recipe; returns the list of what was checked and what was not.

    Raises:
        RecipeError: for anything that would stop the recipe's run, as far as it shows here.
    """
    started = time.perf_counter()
    found = _Findings()
    content = read_recipe(path, overrides)
    for what in left_out(content):
        found.unchecked.append(("settings", f"{what}: left out here"))
    recipe = parse_recipe(content)
    check_groups(recipe)
    try:
        with TemporaryDirectory(prefix="dry-run-") as scratch:
            _carry_out(recipe, Path(scratch), found)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("nothing was changed") from error
    found.unchecked.append(("speed", "and the memory of activations and generation, which depend on the device"))
    return (
        f"\n{path}: nothing was found that would stop it.\n{found}\nTook {time.perf_counter() - started:.0f} seconds."
    )


def _carry_out(recipe: Recipe, scratch: Path, found: _Findings) -> None:
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
        model = _model(recipe, scratch, found)
        _check_prompts(recipe, task, [*held_out, *train], model, found)
        _check_judges(recipe, task, held_out[0], found)
        given = {"train": train[:PROMPTS], recipe.eval.split: few(held_out)}
        task.instances = lambda split, _: given[split]  # type: ignore[method-assign]
        if model.attention != recipe.model.attn_implementation:
            found.unchecked.append(("attention", f"{recipe.model.attn_implementation}; stood in: {model.attention}"))
        if recipe.model.dtype != "float32":
            found.unchecked.append(("numbers", f"{recipe.model.dtype}; stood in: float32"))
        small = cut_down(recipe, random=not model.is_real, attention=model.attention)
        small.model.path = model.path
        with redirect_stdout(io.StringIO()):  # it speaks of files that are gone in a moment
            folder = run(small, task)
        _describe(small, folder, given[recipe.eval.split], model, found)
    finally:
        task.close()


def _rows(recipe: Recipe, found: _Findings) -> tuple[Task, list[Instance], list[Instance], bool]:
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


def _model(recipe: Recipe, scratch: Path, found: _Findings) -> _Model:
    """What to train: the recipe's own model if it is small, else a random one of its class, saved in `scratch`."""
    source, wanted = place(recipe), recipe.model.attn_implementation
    attention = "sdpa" if "flash" in wanted or "/" in wanted else wanted
    if source is None:
        model, tokenizer = load(recipe)
        return _Model(None, tokenizer, model.config, True, True, "", attention)
    here, small = Path(source).is_dir(), False
    if here:
        weights = [path for path in Path(source).iterdir() if path.suffix in (".safetensors", ".bin")]
        small = bool(weights) and sum(path.stat().st_size for path in weights) <= _SMALL
    silent = "" if here else unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", local_files_only=bool(silent))
        config = AutoConfig.from_pretrained(source, local_files_only=bool(silent))
    except Exception as error:  # of any kind: what the libraries raise over files that are no model's has no one type
        if here or not silent:
            raise RecipeError(f"model: {source} cannot be loaded: {error}") from error
        tokenizer, config = None, None
    if small:
        return _Model(source, tokenizer, config, True, True, "", attention)

    named = recipe.model.architecture
    if config is None and named is None:
        raise RecipeError(
            f"model.architecture must name a class of transformers for a dry run, such as Qwen3ForCausalLM, got None: "
            f"{source} cannot be reached: {silent}"
        )
    if config is None:
        made, tokenizer = stand_in(str(named))
        why = f"{source} cannot be reached ({silent})"
    else:
        kind = class_of(config)
        if named is not None and causal_class(named) is not kind:
            raise RecipeError(f"model.architecture must be {kind.__name__}, the class of {source}, got {named!r}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        made = random_model(kind, small_config(config, len(tokenizer), known=True), tokenizer)
        why = f"those of {source} are not read"
    if attention == "sdpa" != wanted and not getattr(made, "_supports_sdpa", True):
        attention = "eager"
    count = sum(p.numel() for p in made.parameters())
    name = f"a random {type(made).__name__} of {count / 1e6:.2g}M parameters"
    found.unchecked.append(("weights", f"{why}; stood in: {name}"))
    if config is None:
        found.unchecked.append(("tokenizer", "prompts' lengths, the chat template; stood in: a token a byte"))
    layers = recipe.rhythm.layers
    if not isinstance(layers, str):
        total = getattr(config and config.get_text_config(decoder=True), "num_hidden_layers", None)
        if total is not None and any(layer >= total for layer in layers):
            raise RecipeError(f"rhythm.layers must be below {total}, the layers of {source}, got {list(layers)}")
        found.unchecked.append(("layers", f"{list(layers)}; stood in: middle5 of the small model"))
    if recipe.rhythm.groups is not None:
        found.unchecked.append(("heads", f"that the model has those of {recipe.rhythm.groups}; stood in: its own"))
    folder = scratch / "model"
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _Model(str(folder), tokenizer, config, False, config is not None, name, attention)


def _check_prompts(recipe: Recipe, task: Task, instances: list[Instance], model: _Model, found: _Findings) -> None:
    """Write prompts as the model reads them, count their tokens and hold them against the model's positions."""
    tokenizer = model.tokenizer
    prompts = texts(task, instances[:_LOOKED_AT], tokenizer)
    lengths = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    longest, unit = max(lengths), "tokens" if model.reads else "bytes"
    of = f"of {len(prompts):,}, the longest has {longest:,}"
    shown = indent(prompts[0] if len(prompts[0]) <= 1200 else f"{prompts[0][:1200]} ...", "| ", lambda _: True)
    found.checked.append(("prompt", f"as the model reads it, {lengths[0]} {unit}; {of}:\n{shown}"))
    text = model.config.get_text_config(decoder=True) if model.config is not None else None
    positions = getattr(text, "max_position_embeddings", None)
    most = max(recipe.grpo.max_completion_length, limit(recipe))
    if positions is None or not model.reads:
        found.unchecked.append(("positions", f"whether the model has room for a prompt and {most:,} tokens"))
    elif longest + most > positions:
        raise RecipeError(
            f"grpo.max_completion_length must be at most {positions - longest}, got {most}: the model has {positions} "
            f"positions, a prompt up to {longest} tokens"
        )
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
    parts = ["weights", "gradients", *(["two moments"] if recipe.grpo.optimizer == "adamw" else ["momentum"])]
    copies = 2 + (2 if recipe.grpo.optimizer == "adamw" else 1)
    if recipe.grpo.beta > 0:
        parts.append("the reference model")
        copies += 1
    total = size(count * copies * _BYTES[recipe.model.dtype])
    return f"by arithmetic, {total} for {', '.join(parts)} in {recipe.model.dtype}"


def _check_judges(recipe: Recipe, task: Task, instance: Instance, found: _Findings) -> None:
    """Reward a few responses of ours to one instance, among them its answer, where it has one under that name."""
    answer = instance.get("answer")
    answer = answer[0] if isinstance(answer, list | tuple) and answer else answer
    responses = [*_ANSWERS, *([form.replace("X", str(answer)) for form in _FORMS] if answer is not None else [])]
    names = list(dict.fromkeys([*recipe.grpo.rewards, CORRECTNESS]))
    columns = []
    for name in names:
        rewards = list(task.rewards[name](responses, [instance] * len(responses)))
        if len(rewards) != len(responses) or not all(isinstance(r, int | float) and math.isfinite(r) for r in rewards):
            raise RecipeError(
                f"task: its reward {name} must give a finite number for each response, got {shorten(str(rewards), 100)}"
            )
        columns.append(rewards)
    lines = [
        f"{', '.join(f'{reward:g}' for reward in row):>{4 * len(names)}}  for {shorten(response, 60)!r}"
        for row, response in zip(zip(*columns), responses)
    ]
    found.checked.append(("rewards", "\n".join([f"{', '.join(names)} of responses made up here:", *lines])))


def _describe(small: Recipe, folder: Path, held_out: list[Instance], model: _Model, found: _Findings) -> None:
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

"""`train`: evaluate, train by GRPO with rhythm credit, evaluate again, and leave a folder with the results."""

from __future__ import annotations

import json
import platform
from contextlib import closing, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

import rhythm_kernels
from rhythm_kernels import HeadGroups

from .evaluation.accuracies import aligned, change_lines
from .evaluation.before import identity
from .evaluation.before import load as load_before
from .evaluation.before import save as save_before
from .evaluation.evaluate import evaluate_both, samples_of
from .evaluation.summary import differences, questions
from .folder import (
    BEFORE,
    CHECKPOINTS,
    CONFIG,
    HEADS,
    METRICS,
    MODEL,
    REPORT,
    RESULT,
    replacing,
    saving,
    write_text,
)
from .grpo import build_trainer, trainer_config
from .models import check_model, load
from .open_run import open_run
from .pages.examples import examples
from .pages.formats import credit_name, interval, points, ranges, share, size
from .pages.report import write_report
from .processes import count, from_main, is_main, together, wait_for_all
from .reading import differs
from .recipe import Recipe, RecipeError
from .recorder import Recorder
from .sharding import whole_models
from .start import Start, start_of
from .task import Task, check_rewards, instances_of, make
from .trainer import Checkpointing, Trainer


def run(recipe: Recipe, task: Task | None = None, *, overwrite: bool = False) -> Path:
    """Carry a recipe out, or go on with it where the run in its folder was cut off; returns the run's folder.

    Of several processes, each calls it. They train together; all else the main one does, while the others wait.

    Args:
        task: the one that the recipe describes, where the caller has made it.
        overwrite: begin anew, whatever run the folder holds.

    Raises:
        RecipeError: for settings that cannot be carried out, or a folder that holds another run, before anything is
            trained.
        RunError: where the run's files cannot be written; it says what is kept.
        Interrupted: for Ctrl-C, likewise.
    """
    task = task or make(recipe.task)
    config = trainer_config(recipe)
    check_rewards(task, recipe.grpo.rewards)
    held_out = instances_of(task, recipe.eval.split, recipe.eval.size)
    trained_on = questions(instances_of(task, "train", recipe.task.train_size))
    check_groups(recipe)
    samples_of(held_out, recipe.eval.samples)  # refuses test sets that are not there
    folder = Path(recipe.output.path)
    of = identity(recipe, held_out)
    opened = open_run(folder) if is_main() else nullcontext()
    with closing(task), opened as begin, TemporaryDirectory() as scratch, whole_models(config):
        start = from_main(lambda: start_of(recipe, trained_on, overwrite=overwrite))
        check_same({"recipe": recipe.to_dict(), "train": trained_on, "eval": of})
        before = None if start.anew or not is_main() else load_before(folder / BEFORE, of)
        evaluated = from_main(lambda: before is not None)
        model, tokenizer = load(recipe, folder / MODEL if start.trained and evaluated else None)
        check_model(recipe, model, tokenizer, task, held_out)
        recorder = Recorder(folder / METRICS, recipe.grpo.max_steps)
        config.output_dir = scratch  # the trainer makes its folder there: nothing is written here yet
        trainer = build_trainer(recipe, config, model, tokenizer, task, recorder)

        wait_for_all()  # until here, anyone may refuse
        if begin is not None:
            note = begin(start)
            write_text(folder / CONFIG, yaml.safe_dump(recipe.to_dict(), sort_keys=False))
            print(_headline(recipe, model, task, len(held_out)))
            if note:
                print(note)
            if before is None:
                before = evaluate_both(model, tokenizer, task, held_out, recipe, "before")
                save_before(folder / BEFORE, before, of)
                evaluated = False
            if start.trained and (recipe.model.lora or not evaluated):  # not the one that the trainer adapts
                model, tokenizer = load(recipe, folder / MODEL)
        wait_for_all()
        trained, groups, seconds = _train(recipe, trainer, start, recorder, trained_on, tokenizer)
        if before is None or not is_main():
            return folder
        model = model if trained is None else trained
        after = evaluate_both(model, tokenizer, task, held_out, recipe, "after")

        sampled = before["sampled"], after["sampled"]
        members = sampled[0].by_set()
        result = {
            "name": folder.name,
            "task": task.describe(),
            "mode": recipe.rhythm.mode,
            "seed": recipe.grpo.seed,
            "steps": recipe.grpo.max_steps,
            "processes": count(),
            "resumed": list(start.resumed),
            "split": recipe.eval.split,
            "questions": questions(held_out),
            "sets": {name: ranges(of) for name, of in members.items()} if len(members) > 1 else {},
            "parameters": sum(p.numel() for p in model.parameters()),
            "versions": versions(),
            "before": {kind: e.summary() for kind, e in before.items()},
            "after": {kind: e.summary() for kind, e in after.items()},
            "difference": {kind: differences(before[kind], after[kind]) for kind in before},
            "remark": task.remark(*(e.summary() for e in sampled)) if sampled[0].figures else "",
            "cost": cost(recorder.lines),
            "seconds": {
                "training": round(seconds, 1),
                "total": round(seconds + sum(e.seconds for found in (before, after) for e in found.values()), 1),
            },
            "examples": examples(model, tokenizer, task, held_out, *sampled, recipe.rhythm, groups),
        }
        write_text(folder / RESULT, json.dumps(result, indent=1) + "\n")  # from here on, the run is finished
        write_report(folder)
    print(summary(result, folder))
    return folder


def _train(
    recipe: Recipe, trainer: Trainer, start: Start, recorder: Recorder, questions: str, tokenizer: Any
) -> tuple[Any, HeadGroups | None, float]:
    """Train the steps that are left, and save the model and its head groups, the model last.

    Returns:
        The trained model where it was not trained before, and in the main process; the head groups; the seconds that
        all steps took.
    """
    folder = Path(recipe.output.path)
    if start.trained:
        recorder.read()
        return None, (HeadGroups.load(folder / HEADS) if (folder / HEADS).exists() else None), start.seconds
    run = Checkpointing(folder / CHECKPOINTS, recipe.output.checkpoints_kept, questions, start, recorder)
    with together(), recorder, saving(folder / CHECKPOINTS):
        trainer.carry_on(run)
        model = trainer.whole_model(recipe)
    seconds = run.seconds()
    if model is None:
        return None, trainer.rhythm_groups, seconds
    if trainer.rhythm_groups is not None:
        with replacing(folder / HEADS) as path:
            trainer.rhythm_groups.save(path)
    with replacing(folder / MODEL) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return model, trainer.rhythm_groups, seconds


def check_same(mine: dict[str, Any]) -> None:
    """Raise `RecipeError` where another process trains by other settings or on other questions than the main one."""
    if said := differs(from_main(lambda: mine), mine):
        raise RecipeError(f"all processes must have the recipe and the questions of the main one: {said}")


def check_groups(recipe: Recipe) -> None:
    """Raise `RecipeError` where the file of head groups is in the folder that a run empties."""
    groups, folder = recipe.rhythm.groups, Path(recipe.output.path)
    if groups is not None and Path(groups).resolve().is_relative_to(folder.resolve()):
        raise RecipeError(
            f"rhythm.groups must be outside of output.path, got {groups!r}: this run moves the files there away; copy "
            "it to another folder"
        )


def cost(lines: list[dict[str, float]]) -> dict[str, Any]:
    """The time that measuring took of the training, and the bytes that full attention maps would have taken."""
    if not lines:
        return {}
    total = sum(line["step_seconds"] for line in lines)
    measuring = sum(line.get("rhythm_seconds", 0.0) for line in lines)
    largest = max(lines, key=lambda line: line["map_bytes"])
    return {
        "step_seconds": total / len(lines),
        "measuring_seconds": measuring / len(lines),
        "measuring_share": measuring / total,
        "calibration_seconds": sum(line.get("calibration_seconds", 0.0) for line in lines),
        "largest_map_bytes": int(largest["map_bytes"]),
        "largest_row_tokens": int(largest["row_tokens"]),
        "all_map_bytes": int(sum(line["map_bytes"] for line in lines)),
    }


def versions() -> dict[str, str]:
    """Versions and machine, which belong beside every figure."""
    import transformers
    import trl

    return {
        "rhythm-kernels": rhythm_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def _headline(recipe: Recipe, model: Any, task: Task, instances: int) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    grpo, credit = recipe.grpo, credit_name(recipe.rhythm.mode)
    lora = recipe.model.lora and f", LoRA of rank {recipe.model.lora.r} included"
    several = f" over {count()} processes" if count() > 1 else ""
    return (
        f"{task.describe()}, {millions:.1f}M parameters{lora or ''}: {credit}, {grpo.max_steps} steps of "
        f"{grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps * count()} responses{several}; "
        f"{instances} {recipe.eval.split} instances before and after"
    )


def summary(result: dict[str, Any], folder: Path) -> str:
    """What the run prints last: what it did, and where to look."""
    lines = ["", f"Held-out accuracy ({result['split']} split), {result['mode']} credit, {result['steps']} steps:"]
    for kind in result["before"]:
        one, two, change = result["before"][kind], result["after"][kind], result["difference"][kind]
        lines.append(
            f"  {kind:8} {share(one):>13}  ->  {share(two):>13}   ({points(change['difference'])} points, 95% "
            f"{interval(change['low'], change['high'])})"
        )
        lines += [f"    {line}" for line in aligned(change_lines(result, kind))]
    spent = result["cost"]
    if spent.get("measuring_seconds"):
        lines.append(
            f"Attention was measured in {spent['measuring_seconds'] * 1e3:.0f} ms of each "
            f"{spent['step_seconds']:.1f} s step ({spent['measuring_share']:.1%}); its full maps "
            f"({size(spent['largest_map_bytes'])}) were never made."
        )
    lines += [
        f"Took {result['seconds']['total'] / 60:.1f} minutes.",
        f"  report   {folder / REPORT}   (open in a browser, needs no network)",
        f"  metrics  {folder / METRICS}",
        f"  model    {folder / MODEL}",
    ]
    return "\n".join(lines)

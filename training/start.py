"""Where a run starts: anew, or where the unfinished run in its folder was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoints, processes
from .folder import CONFIG, METRICS, MODEL, PARTIAL, PREVIOUS, holds, is_config, saved_lines, worth
from .reading import differs, read_json, read_yaml
from .recipe import Recipe, RecipeError, parse_recipe, read_recipe

_FREE = ("eval", "output")  # sections that may change while a run goes on


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        anew: with its first step, in an empty folder: an earlier run in there is moved away.
        step: how many steps are done already.
        checkpoint: the model and all else after that step; None after none.
        trained: nothing is left to be trained, and the trained model is saved.
        lines: of `metrics.jsonl`, those of the steps that are done.
        seconds: how long they took.
        resumed: the steps after which the run went on before, and now.
    """

    anew: bool = True
    step: int = 0
    checkpoint: Path | None = None
    trained: bool = False
    lines: tuple[str, ...] = ()
    seconds: float = 0.0
    resumed: tuple[int, ...] = ()


def start_of(recipe: Recipe, questions: str, *, overwrite: bool = False) -> Start:
    """Where the run of a recipe starts, after a look into its folder.

    Args:
        questions: a name for those to be trained on; see `evaluation.summary.questions`.
        overwrite: begin anew, whatever the folder holds.

    Raises:
        RecipeError: where the folder holds a finished run, or an unfinished one of another recipe.
    """
    folder = Path(recipe.output.path)
    moving = holds(folder / (PREVIOUS + PARTIAL))  # a run that was to begin anew was cut off
    if overwrite or moving or not holds(folder) or not is_config(folder / CONFIG):
        return Start()  # where the files are of no run, opening the folder says so
    steps = recipe.grpo.max_steps
    step, checkpoint = checkpoints.newest(folder)
    earlier, said = _earlier(folder, recipe)
    if not said and steps < earlier:
        said = f"grpo.max_steps was {earlier}, is {steps}"
    if finished := worth(folder):
        there = {"its model": finished == 2, "a checkpoint to go on from": checkpoint}
        missing = " and ".join(what for what, found in there.items() if not found)
        what = f" of another recipe ({said})" if said else missing and f" without {missing}"
        if said or steps == earlier or checkpoint is None:
            longer = f"grpo.max_steps above {earlier} goes on with it; " if checkpoint and not said else ""
            raise RecipeError(
                f"{folder} holds a finished run{what}: --overwrite begins anew, and removes it once the new run has "
                f"finished; {longer}output.path=FOLDER leaves it"
            )
    if said:
        raise RecipeError(
            f"{folder} holds an unfinished run of another recipe ({said}): --overwrite removes it, output.path=FOLDER "
            f"leaves it, python -m training train --resume {folder} goes on with it"
        )
    lines = saved_lines(folder / METRICS)
    if (folder / MODEL).is_dir() and max(lines, default=0) == steps:
        seconds, resumed = sum(read_json(line).get("step_seconds", 0.0) for line in lines.values()), ()
        if checkpoint:
            about = _about(checkpoint, questions)
            seconds, resumed = about["seconds"], tuple(about["resumed"])
        return Start(False, steps, None, True, tuple(lines.values()), seconds, resumed)
    if checkpoint is None:
        return Start(anew=False)
    about = _about(checkpoint, questions)
    kept = tuple(line for at, line in lines.items() if at <= step)
    return Start(False, step, checkpoint, False, kept, about["seconds"], (*about["resumed"], step))


def resumed(folder: Path, overrides: list[str]) -> Recipe:
    """The recipe of the unfinished run in `folder`, with overrides.

    Raises:
        RecipeError: where there is none.
    """
    if moved := [one for one in overrides if one.startswith("output.path=")]:
        raise RecipeError(f"output.path must not be set with --resume, got {moved[0]!r}: the run is in {folder}")
    if not is_config(folder / CONFIG):
        raise RecipeError(f"--resume must be the folder of a run, got {str(folder)!r}: no {CONFIG} of a run is in it")
    content = read_recipe(folder / CONFIG, overrides)
    named = folder if folder.name.strip(".") else folder.resolve()  # a run is named as its folder
    content["output"] = {**(content.get("output") or {}), "path": str(named)}
    return parse_recipe(content)


def _earlier(folder: Path, recipe: Recipe) -> tuple[int, str]:
    """The steps that the run in `folder` was to have, and how its recipe differs, beyond what may change."""
    try:
        content = read_yaml((folder / CONFIG).read_text(encoding="utf-8"))
        before = parse_recipe(content)  # defaults of settings that are newer than the run are filled in
    except (OSError, ValueError) as error:  # of a release with other settings
        return 0, str(error)
    return before.grpo.max_steps, differs(_fixed(before), _fixed(recipe))


def _fixed(recipe: Recipe) -> Mapping[str, Any]:
    """What of a recipe must not change while its run goes on."""
    content = json.loads(json.dumps(recipe.to_dict(), default=str))  # a task's settings may be of any type
    for section in _FREE:
        content.pop(section)
    content["grpo"].pop("max_steps")
    return content


def _about(checkpoint: Path, questions: str) -> dict[str, Any]:
    """What a checkpoint says of its run, if that is this one."""
    about = checkpoints.describe(checkpoint)
    if about["questions"] != questions:
        raise RecipeError(
            f"task must give the questions that {checkpoint} was trained on, got others: the files or the code of the "
            "task have changed; --overwrite begins anew"
        )
    if about["processes"] != processes.count():
        raise RecipeError(
            f"the number of processes must be {about['processes']}, as when {checkpoint} was written, got "
            f"{processes.count()}"
        )
    return about

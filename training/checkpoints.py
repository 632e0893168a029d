"""Checkpoints of a run: whole or not there, the newest to go on from, and what it says of the run that wrote it.

A checkpoint is written under a temporary name, by all processes, and gets its own name by one rename when all of it is
on the disk. So whatever ends a run, at whatever moment, `checkpoints/checkpoint-N` is complete, and what was being
written beside it is removed by the next start.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .folder import CHECKPOINTS, remove, saving, to_disk
from .processes import is_main, wait_for_all
from .reading import misfit, read_json
from .settings import RecipeError

RUN = "run.json"  # in a checkpoint: see `describe`
UNFINISHED = ".partial"  # the folder in which a checkpoint is written
_NAME = re.compile(r"checkpoint-(\d+)")


def all_of(folder: Path) -> dict[int, Path]:
    """The checkpoints of the run in `folder`, by step, in order."""
    places = (folder / CHECKPOINTS).iterdir() if (folder / CHECKPOINTS).is_dir() else ()
    found = {int(match[1]): path for path in places if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def newest(folder: Path) -> tuple[int, Path | None]:
    """The last checkpoint of the run in `folder` and its step; step 0 where there is none."""
    found = all_of(folder)
    step = max(found, default=0)
    return step, found.get(step)


def describe(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: `questions`, a name for those trained on, `processes`, `seconds`, `resumed`.

    Raises:
        RecipeError: where it does not.
    """
    with reading(path):
        found = read_json((path / RUN).read_text(encoding="utf-8"))
        if said := misfit(found, {"questions": str, "processes": int, "seconds": float, "resumed": list}):
            raise ValueError(f"{RUN}: {said}")
    return found


@contextmanager
def reading(path: str | Path | None) -> Iterator[None]:
    """Whatever is raised over a checkpoint that is not what was written becomes a `RecipeError` that names it."""
    try:
        yield
    except Exception as error:  # of any kind: torch, safetensors, pickle and JSON have their own
        raise RecipeError(
            f"{path} cannot be read: {type(error).__name__}: {error}; if it is damaged, remove it to go on from the "
            "checkpoint before it or, where there is none, from the start"
        ) from error


@contextmanager
def writing(checkpoints: Path, about: dict[str, Any], kept: int | None) -> Iterator[Path]:
    """Gives all processes the folder in which to write a checkpoint, and makes it one at the end.

    Args:
        about: what `describe` will find in it.
        kept: how many checkpoints there are to be afterwards, the newest ones; None is all.
    """
    partial = checkpoints / UNFINISHED
    if is_main():
        remove(partial)
        with saving(partial):
            partial.mkdir(parents=True)
    wait_for_all()
    try:
        with saving(partial):
            yield partial
            wait_for_all()
            if is_main():
                (made,) = (path for path in partial.iterdir() if _NAME.fullmatch(path.name))
                (made / RUN).write_text(json.dumps(about) + "\n", encoding="utf-8")
                to_disk(made)
    except OSError:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise
    if is_main():
        remove(checkpoints / made.name)  # of a step that is trained again
        os.replace(made, checkpoints / made.name)
        to_disk(checkpoints, whole=False)
        remove(partial)
        found = list(all_of(checkpoints.parent).values())
        for path in found[: -kept if kept else 0]:
            os.replace(path, partial)  # a checkpoint that is half removed has no name
            remove(partial)
    wait_for_all()

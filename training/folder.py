"""A run's folder: the names of its files, how they are read, and how they are written whole or not at all.

The order in which they change is that of `open_run.py`. Of links, the link itself is removed, never what it points to.
"""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .reading import misfit, read_json, read_yaml
from .recipe import Recipe, RecipeError
from .result import fault

CONFIG, METRICS, BEFORE, RESULT, REPORT, HEADS, MODEL, CHECKPOINTS, TENSORBOARD, EVALUATION, RESPONSES, STATE = (
    "config.yaml",
    "metrics.jsonl",
    "before.json",
    "result.json",
    "report.html",
    "groups.json",
    "model",
    "checkpoints",
    "tensorboard",
    "evaluation.json",
    "responses.jsonl",
    "responses.state",
)
PREVIOUS = "previous"  # an earlier run, or this one as it had finished once, until the run has finished
PARTIAL = ".partial"  # suffix of a file that is being written, and of `previous` while it is filled
# What is moved or removed, in this order.
MOVED = (
    RESULT,
    EVALUATION,
    STATE,
    RESPONSES,
    REPORT,
    HEADS,
    MODEL,
    METRICS,
    BEFORE,
    TENSORBOARD,
    CHECKPOINTS,
    CONFIG,
)
_CONFIG: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Recipe)} | {"grpo": {"seed": int}}
WRITTEN = {*MOVED, *(name + PARTIAL for name in MOVED)}


@dataclass(frozen=True)
class Run:
    """The files of a finished run.

    Attributes:
        config: `config.yaml`, the recipe as it was carried out.
        result: `result.json`.
        lines: `metrics.jsonl`, a dictionary a step.
    """

    folder: Path
    config: dict[str, Any]
    result: dict[str, Any]
    lines: list[dict[str, float]]

    def series(self, key: str) -> dict[int, float]:
        """A metric by step, where it is finite: of a run that diverged, some are not."""
        found = {line["step"]: line[key] for line in self.lines if key in line}
        return {int(step): value for step, value in found.items() if math.isfinite(value)}


def read_run(folder: Path) -> Run:
    """The run in `folder`: measured, but perhaps without its model (see `saved_model`).

    Raises:
        RecipeError: where no such run is there, or its files cannot be read.
    """
    if not (folder / RESULT).exists():
        begun = f": the run in it has no {RESULT}, it was cut off or is still going" if holds(folder) else ""
        raise RecipeError(f"{folder}: no finished run here{begun}{earlier(folder)}")
    try:
        result = _read(folder / RESULT, read_json, fault)
        lines = _read(folder / METRICS, lambda text: [read_json(line) for line in text.splitlines()], _of_lines)
        config = _read(folder / CONFIG, read_yaml, _of_config)
    except OSError as error:
        raise RecipeError(f"{folder}: no finished run ({error.strerror}: {error.filename})") from error
    except ValueError as error:
        raise RecipeError(f"{folder}: no finished run ({error})") from error
    return Run(folder, config, result, lines)


def _read(path: Path, reader: Callable[[str], Any], wrong: Callable[[Any], str]) -> Any:
    """The content of a run's file.

    Raises:
        ValueError: it names the file, where that cannot be read or `wrong` finds a fault in it.
    """
    try:
        content = reader(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if said := wrong(content):
        raise ValueError(f"{path.name} is not that of a run: {said}")
    return content


def _of_config(config: Any) -> str:
    said = misfit(config, _CONFIG)
    return said or ", ".join(f"{name} is not a section" for name in sorted(set(config) - set(_CONFIG)))


def _of_lines(lines: list[Any]) -> str:
    for at, line in enumerate(lines, 1):
        if said := misfit(line, {"step": int}):
            return f"line {at}: {said}"
        if odd := [key for key, value in line.items() if not isinstance(value, int | float)]:
            return f"line {at}: {odd[0]} must be a number, got {reprlib.repr(line[odd[0]])}"
    return ""


def saved_lines(path: Path) -> dict[int, str]:
    """The lines of a `metrics.jsonl` by step, up to the first that was not written whole."""
    found = {}
    with suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if _of_lines([content := read_json(line)]) or not line.endswith("\n"):
                break
            found[content["step"]] = line
    return found


def saved_model(folder: Path) -> Path:
    """The final model of the run in `folder`.

    Raises:
        RecipeError: where it was not saved.
    """
    if not (folder / MODEL).is_dir():
        raise RecipeError(
            f"{folder}: the result of a run is here, its model is not: the run ended before {MODEL}/ was "
            f"saved{earlier(folder)}"
        )
    return folder / MODEL


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write a file or a folder to, and renames it to `path` at the end."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with saving(path):
            yield partial
            to_disk(partial)
    except OSError:
        with suppress(OSError):
            remove(partial)  # the disk may be full
        raise
    os.replace(partial, path)


def to_disk(place: Path, whole: bool = True) -> None:
    """Wait until a file or a folder, and with `whole` all files in it, would outlive a power failure."""
    for path in [*(place.rglob("*") if whole else ()), place]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """While `path` is written: every failure of the disk becomes an `OSError` that names a file."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):  # of torch.save
            raise
        raise OSError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write, which knows no name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:
        if "(os error " not in str(error):  # of the tokenizers' Rust
            raise
        raise OSError(f"{path}: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def holds(folder: Path) -> list[str]:
    """Names of a run's files in `folder`."""
    return [name for name in MOVED if os.path.lexists(folder / name)]


def remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def worth(folder: Path) -> int:
    """How far the run in `folder` came: 2 for a finished one, 1 for a result without its model, 0 for less."""
    return 0 if not (folder / RESULT).exists() else 1 + (folder / MODEL).is_dir()


def earlier(folder: Path) -> str:
    """Where the finished run before is, and how to keep it; empty where there is none."""
    previous = folder / PREVIOUS
    if worth(previous) < 2:
        return ""
    return f"; the finished run before is in {previous} until a run finishes here (to keep it: mv {previous} ELSEWHERE)"


def is_config(path: Path) -> bool:
    """Whether a run wrote the file."""
    try:
        _read(path, read_yaml, _of_config)
    except (OSError, ValueError):
        return False
    return True

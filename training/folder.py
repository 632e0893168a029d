"""A run's folder: the names of its files, and the order in which they change, so that no two runs are ever mixed.

A run first moves the files of an earlier run into `previous/`: `result.json`, which marks a finished run, before all
others, and `config.yaml` last. Only then does it write its own files, each under a temporary name that is then renamed,
the result before the model. `previous/` is removed when the new run has finished. So wherever a run is cut off, by
Ctrl-C or `kill -9`, the files in the folder belong to one run, and so do those in `previous/`, which appears and goes
by one rename. The next start completes a move that was cut off.

Only the names below are ever moved or removed, and only beside the `config.yaml` of a run. Of links, the link itself is
moved or removed, never what it points to. Nothing here waits for the disk (fsync): a power failure can lose more.
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
from tempfile import TemporaryFile
from typing import Any

from safetensors import SafetensorError

from .reading import misfit, read_json, read_yaml
from .recipe import Recipe, RecipeError
from .result import fault

try:
    import fcntl
except ImportError:  # Windows: two runs at once in one folder are not refused there
    fcntl = None  # type: ignore[assignment]

CONFIG, METRICS, RESULT, REPORT, HEADS, MODEL, CHECKPOINTS, EVALUATION, RESPONSES, STATE = (
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "report.html",
    "groups.json",
    "model",
    "checkpoints",
    "evaluation.json",
    "responses.jsonl",
    "responses.state",
)
PREVIOUS = "previous"  # the earlier run, until the new one has finished
_PARTIAL = ".partial"  # suffix of a file that is being written, and of `previous` while it is filled
_REMOVED = "previous.removed"  # a `previous` that is being removed
_MOVED = (RESULT, EVALUATION, STATE, RESPONSES, REPORT, HEADS, MODEL, METRICS, CHECKPOINTS, CONFIG)  # in this order
_CONFIG: dict[str, Any] = {field.name: {} for field in dataclasses.fields(Recipe)} | {"grpo": {"seed": int}}
_WRITTEN = {*_MOVED, *(name + _PARTIAL for name in _MOVED)}


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
        begun = f": the run in it has no {RESULT}, it was cut off or is still going" if _holds(folder) else ""
        raise RecipeError(f"{folder}: no finished run here{begun}{_earlier(folder)}")
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


def saved_model(folder: Path) -> Path:
    """The final model of the run in `folder`.

    Raises:
        RecipeError: where it was not saved.
    """
    if not (folder / MODEL).is_dir():
        raise RecipeError(
            f"{folder}: the result of a run is here, its model is not: the run ended before {MODEL}/ was "
            f"saved{_earlier(folder)}"
        )
    return folder / MODEL


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write a file or a folder to, and renames it to `path` at the end."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with saving(path):
            yield partial
    except OSError:
        with suppress(OSError):
            _remove(partial)  # the disk may be full
        raise
    os.replace(partial, path)


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


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


class RunError(RuntimeError):
    """A run could not write its files; the message says what is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run; the message says what is kept."""


@contextmanager
def open_run(folder: Path) -> Iterator[Callable[[], str]]:
    """Hold `folder` for one run: make it if it is missing, and keep other runs out.

    Gives a function that the run calls when nothing can be refused any more and before it writes anything. It moves an
    earlier run to `previous`, which is removed at the end, and returns a sentence about that (empty if there was none).
    A run that ends before that call leaves everything as it was.

    Raises:
        RecipeError: where another run is writing there, or the folder's names are not those of a run.
        RunError: for an `OSError` inside.
        Interrupted: for a `KeyboardInterrupt` inside, once the run has begun.
    """
    begun = False
    made: list[Path] = []

    def begin() -> str:
        nonlocal begun
        begun = True
        try:
            return _make_room(folder)
        except KeyboardInterrupt:
            _make_room(folder)  # completes the few renames, so that no message has to describe half of them
            raise

    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            _check(folder)
            with TemporaryFile(dir=folder):
                pass  # refuses a folder that cannot be written, before anything is done
            yield begin
            _remove_previous(folder)
    except RecipeError as error:
        raise RecipeError(f"{error}{_earlier(folder) if begun else ''}") from error
    except OSError as error:
        raise RunError(f"{error}; {_kept(folder)}" if begun else str(error)) from error
    except KeyboardInterrupt as error:
        if not begun:
            raise
        raise Interrupted(_kept(folder)) from error
    finally:
        for path in made if not begun else ():
            with suppress(OSError):
                path.rmdir()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second run or evaluation out. The system releases the lock however the process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(f"{folder}: another run or evaluation is writing there; choose another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _check(folder: Path) -> None:
    """Refuse to move or remove what no run wrote."""
    if folder.resolve() == Path(folder.resolve().anchor):
        raise RecipeError(f"output.path must be a folder of the run's own, got {str(folder)!r}")
    for name in (PREVIOUS, PREVIOUS + _PARTIAL, _REMOVED):
        if odd := _foreign(folder / name):
            raise RecipeError(f"{odd} is not what a run left: move it away, or choose another output.path")
    for place in (folder, folder / PREVIOUS):
        if (found := _holds(place) or _begun(place)) and not _is_config(place / CONFIG):
            raise RecipeError(
                f"{place / found[0]} is there without the {CONFIG} of a run, so no run wrote it: move it away, or "
                "choose another output.path"
            )


def _holds(folder: Path) -> list[str]:
    return [name for name in _MOVED if os.path.lexists(folder / name)]


def _begun(folder: Path) -> list[str]:
    """The temporary files of a run that was cut off. Not config.yaml's: it is the first, and alone it is no run yet."""
    return [name + _PARTIAL for name in _MOVED if name != CONFIG and os.path.lexists(folder / (name + _PARTIAL))]


def _foreign(folder: Path) -> Path | None:
    """A file that no run wrote in a folder that only runs write, or the folder itself if it is a link or a file."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return folder
    return next((path for path in sorted(folder.iterdir()) if path.name not in _WRITTEN), None)


def _is_config(path: Path) -> bool:
    try:
        _read(path, read_yaml, _of_config)
    except (OSError, ValueError):
        return False
    return True


def _make_room(folder: Path) -> str:
    """Move an earlier run to `previous`, or complete a move that was cut off; returns a sentence about it.

    Nothing new is written before `previous.partial` has become `previous`, so the files in the two belong to one run.
    If `previous` already holds a run of more `_worth` than the one to be moved (a finished run, against the remains of
    one), it stays and the remains are removed.
    """
    previous, moving, removed = (folder / name for name in (PREVIOUS, PREVIOUS + _PARTIAL, _REMOVED))
    _remove(removed)
    for name in _MOVED:
        _remove(folder / (name + _PARTIAL))
    if found := _holds(folder):
        moving.mkdir(exist_ok=True)
        for name in found:
            os.rename(folder / name, moving / name)
    removes = ""
    if moving.exists():
        if _worth(previous) > _worth(moving):
            os.rename(moving, removed)
            removes = f"; what a later run left unfinished in {folder} is removed"
        else:
            if previous.exists():
                os.rename(previous, removed)
            os.rename(moving, previous)
        _remove(removed)
    return f"The run before is in {previous} until this one has finished{removes}." if previous.exists() else ""


def _remove_previous(folder: Path) -> None:
    if (folder / PREVIOUS).exists() and _foreign(folder / PREVIOUS) is None:
        os.rename(folder / PREVIOUS, folder / _REMOVED)
        _remove(folder / _REMOVED)


def _worth(folder: Path) -> int:
    """2 for a finished run, 1 for a result without its model, 0 for less."""
    return 0 if not (folder / RESULT).exists() else 1 + (folder / MODEL).is_dir()


def _remove(path: Path) -> None:
    """Remove a file, a folder with all in it, or a link without what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _earlier(folder: Path) -> str:
    """Where the earlier finished run is, and how to keep it; empty where there is none."""
    previous = folder / PREVIOUS
    if _worth(previous) < 2:
        return ""
    return f"; the finished run before is in {previous} until a run finishes here (to keep it: mv {previous} ELSEWHERE)"


def _kept(folder: Path) -> str:
    """What an unfinished run leaves, and what of it is missing."""
    kept, missing = [], []
    with suppress(OSError):
        if steps := (folder / METRICS).read_bytes().count(b"\n"):
            kept.append(f"the metrics of {steps} step{'s' * (steps > 1)} in {folder / METRICS}")
    with suppress(OSError):
        if any((folder / CHECKPOINTS).iterdir()):
            kept.append(f"checkpoints in {folder / CHECKPOINTS}")
    for name, what in ((RESULT, "the result"), (REPORT, "the report"), (MODEL, "the model")):
        if (folder / name).exists():
            kept.append(f"{what} in {folder / name}")
        else:
            missing.append(what)
    text = f"kept until another run starts there: {', '.join(kept)}" if kept else "kept: nothing of this run"
    return text + (f"; missing: {', '.join(missing)}" if missing else "") + _earlier(folder)

"""The order in which a run's files change, so that no two runs are ever mixed and none is lost.

A run that begins anew first moves the files of an earlier run into `previous/`: `result.json`, which marks a finished
run, before all others, and `config.yaml` last. Only then does it write its own. A run that goes on keeps its files; had
it finished already, a copy of it as it was becomes `previous/`, and then its result is removed. `previous/` is removed
when the run has finished. So wherever a run is cut off, by Ctrl-C or `kill -9`, the files in the folder belong to one
run, and so do those in `previous/`, which appears and goes by one rename. The next start completes a move that was cut
off, and forgets a copy that was.

Only the names of `folder.py` are ever moved or removed, and only beside the `config.yaml` of a run.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from .checkpoints import UNFINISHED, newest
from .folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    MOVED,
    PARTIAL,
    PREVIOUS,
    REPORT,
    RESULT,
    WRITTEN,
    earlier,
    holds,
    is_config,
    remove,
    worth,
    write_text,
)
from .recipe import RecipeError
from .start import Start

try:
    import fcntl
except ImportError:  # Windows: two runs at once in one folder are not refused there
    fcntl = None  # type: ignore[assignment]

_REMOVED = PREVIOUS + ".removed"  # a `previous` that is being removed
_COPY = PREVIOUS + ".copy"  # what becomes `previous` once it is complete
_UNDONE = MOVED[: MOVED.index(METRICS)]  # what a finished run has and one that goes on has not, the result first


class RunError(RuntimeError):
    """A run could not write its files; the message says what is kept."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run; the message says what is kept."""


@contextmanager
def open_run(folder: Path) -> Iterator[Callable[[Start], str]]:
    """Hold `folder` for one run: make it if it is missing, and keep other runs out.

    Gives a function that the run calls when nothing can be refused any more and before it writes anything. It makes the
    folder ready for a run that begins, or goes on, as `Start` says, and returns a sentence about the run before (empty
    if there was none). A run that ends before that call leaves everything as it was.

    Raises:
        RecipeError: where another run is writing there, or the folder's names are not those of a run; for one inside.
        RunError: for an `OSError` inside.
        Interrupted: for a `KeyboardInterrupt` inside, once the run has begun.
    """
    begun = False
    made: list[Path] = []

    def begin(start: Start) -> str:
        nonlocal begun
        begun = True
        make_ready = _make_room if start.anew else _go_on
        try:
            return make_ready(folder, start)
        except KeyboardInterrupt:
            make_ready(folder, start)  # completes the few renames, so that no message has to describe half of them
            raise

    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder):
            _check(folder)
            with TemporaryFile(dir=folder):
                pass  # refuses a folder that cannot be written, before anything is done
            yield begin
            if _foreign(folder / PREVIOUS) is None:
                _replace_previous(folder)
    except RecipeError as error:
        raise RecipeError(f"{error}; {_kept(folder)}" if begun else str(error)) from error
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
    for name in (PREVIOUS, PREVIOUS + PARTIAL, _REMOVED, _COPY):
        if odd := _foreign(folder / name):
            raise RecipeError(f"{odd} is not what a run left: move it away, or choose another output.path")
    for place in (folder, folder / PREVIOUS):
        if (found := holds(place) or _begun(place)) and not is_config(place / CONFIG):
            raise RecipeError(
                f"{place / found[0]} is there without the {CONFIG} of a run, so no run wrote it: move it away, or "
                "choose another output.path"
            )


def _begun(folder: Path) -> list[str]:
    """The temporary files of a run that was cut off. Not config.yaml's: it is the first, and alone it is no run yet."""
    return [name + PARTIAL for name in MOVED if name != CONFIG and os.path.lexists(folder / (name + PARTIAL))]


def _foreign(folder: Path) -> Path | None:
    """A file that no run wrote in a folder that only runs write, or the folder itself if it is a link or a file."""
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return folder
    return next((path for path in sorted(folder.iterdir()) if path.name not in WRITTEN), None)


def _make_room(folder: Path, start: Start) -> str:
    """Move an earlier run to `previous`, or complete a move that was cut off; returns a sentence about it.

    Nothing new is written before `previous.partial` has become `previous`, so the files in the two belong to one run.
    If `previous` already holds a run of more `worth` than the one to be moved (a finished run, against the remains of
    one), it stays and the remains are removed.
    """
    previous, moving, removed = (folder / name for name in (PREVIOUS, PREVIOUS + PARTIAL, _REMOVED))
    _clear(folder)
    if found := holds(folder):
        moving.mkdir(exist_ok=True)
        for name in found:
            os.rename(folder / name, moving / name)
    removes = ""
    if moving.exists():
        if worth(previous) > worth(moving):
            os.rename(moving, removed)
            removes = f"; what a later run left unfinished in {folder} is removed"
        else:
            _replace_previous(folder, moving)
        remove(removed)
    return f"The run before is in {previous} until this one has finished{removes}." if previous.exists() else ""


def _go_on(folder: Path, start: Start) -> str:
    """Make the folder that of an unfinished run at the step of its checkpoint; returns a sentence about it."""
    _clear(folder)
    remove(folder / (PREVIOUS + PARTIAL))  # nothing was moved there yet
    finished = worth(folder) > 0
    if finished:
        _copy(folder)
        _replace_previous(folder, folder / _COPY)
    if not start.trained:
        for name in _UNDONE:
            remove(folder / name)
        write_text(folder / METRICS, "".join(start.lines))
    said = f"Goes on after step {start.step}" if start.step else "Begins again with its first step"
    return f"{said}; the run as it was is in {folder / PREVIOUS} until then." if finished else f"{said}."


def _copy(folder: Path) -> None:
    """Copy a finished run, without its checkpoints, to `previous.copy`; of large files the content is shared."""
    for name in holds(folder):
        if (folder / name).is_dir() and name != CHECKPOINTS:
            shutil.copytree(folder / name, folder / _COPY / name, copy_function=_link)
        elif name != CHECKPOINTS:
            (folder / _COPY).mkdir(exist_ok=True)
            shutil.copy2(folder / name, folder / _COPY / name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _clear(folder: Path) -> None:
    """Remove what was being written when a run was cut off."""
    for name in (_REMOVED, _COPY, f"{CHECKPOINTS}/{UNFINISHED}", *(name + PARTIAL for name in MOVED)):
        remove(folder / name)


def _replace_previous(folder: Path, new: Path | None = None) -> None:
    """Make `new` the `previous`, or nothing; the one that is there goes by one rename before it is removed."""
    if (folder / PREVIOUS).exists():
        os.rename(folder / PREVIOUS, folder / _REMOVED)
    if new is not None:
        os.rename(new, folder / PREVIOUS)
    remove(folder / _REMOVED)


def _kept(folder: Path) -> str:
    """What an unfinished run leaves, and how it goes on."""
    kept = []
    step, checkpoint = newest(folder)
    with suppress(OSError):
        if steps := (folder / METRICS).read_bytes().count(b"\n"):
            kept.append(f"the metrics of {steps} step{'s' * (steps > 1)} in {folder / METRICS}")
    if checkpoint:
        kept.append(f"the checkpoint of step {step} in {checkpoint}")
    for name, what in ((MODEL, "the model"), (RESULT, "the result"), (REPORT, "the report")):
        if (folder / name).exists():
            kept.append(f"{what} in {folder / name}")
    text = f"kept: {', '.join(kept) or 'nothing of this run'}"
    if (folder / CONFIG).exists() and worth(folder) < 2:
        text += f"; it goes on with: python -m training train --resume {shlex.quote(str(folder))}"
    return text + earlier(folder)

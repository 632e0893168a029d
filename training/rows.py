"""Tasks whose questions are rows of files, and how rows become splits that share no question."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .processes import is_main
from .row_files import Row, Unreachable, check, read_rows, rows
from .task import Instance, SplitName, Task, TaskSettings

__all__ = ["FileSettings", "FileTask", "Unreachable", "read_rows"]


@dataclass
class FileSettings(TaskSettings):
    """The files of a task; `read_rows` says what each may be."""

    train: str | None = None
    validation: str | None = None
    test: str | dict[str, str] | None = None  # a mapping names several sets, as in {aime24: PATH, amc23: PATH}

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            files = getattr(self, split)
            if isinstance(files, dict) and not (files and all(isinstance(name, str) and name for name in files)):
                raise ValueError(f"{split} must be a file, or files by the names of their sets, got {files!r}")
            for name, path in _by_set(files):
                if path is not None or name:
                    check(f"{split}.{name}" if name else split, path)

    def files_in(self, folder: Path) -> dict[str, Any]:
        """These settings with `SPLIT.jsonl` of a folder in place of each file."""
        found: dict[str, Any] = {}
        for split in ("train", "validation", "test"):
            given, file = getattr(self, split), str(folder / f"{split}.jsonl")
            found[split] = given and (dict.fromkeys(given, file) if isinstance(given, dict) else file)
        return found

    @property
    def has_files(self) -> bool:
        return any(files is not None for files in (self.train, self.validation, self.test))


class FileTask(Task):
    """A task on rows of files: a subclass has `parse`, `prompt`, and `correct` or `rewards`.

    A question is one instance however often a split has it, and belongs to one split: to `test`, else to
    `validation`, else to `train`. The held-out splits are in an order drawn from the questions themselves, so that the
    first n are a fair sample of all; several test sets take turns. `train` is in the order of its file.
    """

    Settings: ClassVar[type[TaskSettings]] = FileSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._splits: dict[str, list[tuple[bytes, Instance]]] = {}  # with what each question is told by

    def parse(self, row: Row) -> Instance | None:
        """The instance that a row holds; None for one that is dropped, as published files have some without an answer.

        Raises:
            ValueError: where it cannot be read; file and row are added to the message.
        """
        raise NotImplementedError

    def question(self, instance: Instance) -> str:
        """What is asked, by which questions are told apart; as a rule without what all prompts share."""
        prompt = self.prompt(instance)
        return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)

    def describe(self) -> str:
        files = self.settings.test or self.settings.validation or self.settings.train
        named = ", ".join(files) if isinstance(files, dict) else Path(files or "").name
        name = super().describe().replace("_", " ")
        return f"{name} ({named})" if named else name

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        found = [instance for _, instance in self._split(split)]
        if size is not None and size > len(found):
            have = f"{len(found)} in {_named(getattr(self.settings, split))}"
            setting = "task.train_size" if split == "train" else "eval.size"
            raise ValueError(f"{split} must hold at least {size} questions, got {have}: all of them are {setting}=null")
        return found[:size]

    def check_files(self) -> None:
        """Read every file that can be had, whether or not others can.

        Raises:
            ValueError, OSError: for one that holds something else, or cannot be read.
        """
        for split in ("train", "validation", "test"):
            for _, path in _by_set(getattr(self.settings, split)):
                if path is None:
                    continue
                try:
                    for number, row in rows(path, distinct=True):
                        if row is not None:
                            self._parse(path, number, row)
                except Unreachable:
                    continue

    def _split(self, split: SplitName) -> list[tuple[bytes, Instance]]:
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    def _read(self, split: SplitName) -> list[tuple[bytes, Instance]]:
        files = getattr(self.settings, split)
        if files is None:
            raise ValueError(f"{split} must be a file, got None")
        ahead: dict[SplitName, tuple[SplitName, ...]] = {"test": (), "validation": ("test",)}
        others = [o for o in ahead.get(split, ("validation", "test")) if getattr(self.settings, o) is not None]
        taken = {other: {key for key, _ in self._split(other)} for other in others}
        dropped = dict.fromkeys(("again", *taken, "none"), 0)
        sets = []
        for name, path in _by_set(files):
            kept: dict[bytes, Instance] = {}
            for number, row in rows(path, distinct=True):
                if row is None:
                    dropped["again"] += 1
                    continue
                if (instance := self._parse(path, number, row)) is None:
                    dropped["none"] += 1
                    continue
                key = _key(self.question(instance))
                if reason := next((other for other in taken if key in taken[other]), "again" if key in kept else ""):
                    dropped[reason] += 1
                else:
                    kept[key] = instance | ({"set": name} if name else {})
            sets.append(kept if split == "train" else dict(sorted(kept.items())))
        found = list(_in_turn(sets))  # two sets may ask the same: then it is an instance of both
        said = [f"{n} that {_SAID[why]}" for why, n in dropped.items() if n]
        if not found:
            why = f": dropped rows: {', '.join(said)}" if said else ""
            raise ValueError(f"{split} must hold questions that can be asked, got {_named(files)}{why}")
        if said and is_main():
            print(f"{split}: {len(found)} questions of {_named(files)}; dropped rows: {', '.join(said)}", flush=True)
        return found

    def _parse(self, path: str, number: int, row: Row) -> Instance | None:
        try:
            return self.parse(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error


_SAID = {
    "again": "ask what an earlier one asks",
    "validation": "validation asks too",
    "test": "test asks too",
    "none": "have no answer",
}


def _by_set(files: Any) -> list[tuple[str, Any]]:
    """The files of a split with the names of their sets; a single one, or none, has the name ""."""
    return list(files.items()) if isinstance(files, dict) else [("", files)]


def _named(files: str | dict[str, str]) -> str:
    return files if isinstance(files, str) else ", ".join(files.values())


def _key(question: str) -> bytes:
    """What a question is told by, blind to case, white space and how accents are written.

    It also draws the order of held-out questions.
    """
    text = " ".join(unicodedata.normalize("NFC", question).casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _in_turn(sets: list[dict[bytes, Instance]]) -> Iterator[tuple[bytes, Instance]]:
    """The first of each set, the second of each set, and so on."""
    items = [list(one.items()) for one in sets]
    for turn in range(max(map(len, items))):
        yield from (one[turn] for one in items if turn < len(one))

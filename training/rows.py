"""Tasks whose questions are rows of files: how files are read, and how their rows become splits that share nothing.

A file is `.jsonl`, `.json` (a list of rows, or a row a line), `.csv` or `.parquet`, on this machine or on the hub.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar
from urllib.parse import unquote

from .reading import read_json
from .task import Instance, SplitName, Task, TaskSettings

ROOT = Path(__file__).resolve().parent.parent  # what relative paths begin at, where the file is there
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB = "hf://"
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_BATCH = 1 << 16  # rows of a parquet file that are in memory at a time
_Row = dict[str, Any]


class Unreachable(OSError):  # noqa: N818 - it says what the file is
    """A file that cannot be had at all: nothing is at its path, or the hub does not answer and nothing is cached."""


def read_rows(path: str) -> list[_Row]:
    """The rows of a file, as dictionaries by column.

    Args:
        path: of this machine, relative to the repository if it is there (`~` is the home folder), or
            `hf://datasets/OWNER/NAME[@REVISION]/PATH/FILE`. A revision that holds a slash is written with `%2F`.

    Raises:
        Unreachable: where nothing is there, or the hub cannot be reached.
        OSError: where it cannot be read.
        ValueError: where it holds something else, or nothing.
    """
    return [row for _, row in _rows(path) if row is not None]


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
            for name, path in files.items() if isinstance(files, dict) else [("", files)]:
                if path is not None or name:
                    _check(f"{split}.{name}" if name else split, path)


class FileTask(Task):
    """A task on rows of files: a subclass has `parse`, `prompt`, and `correct` or `rewards`.

    A question is one instance however often a split has it, and belongs to one split: to `test`, else to
    `validation`, else to `train`. The held-out splits are in an order drawn from the questions themselves, so that the
    first n are a fair sample of all; several test sets take turns. `train` is in the order of its file.
    """

    Settings: ClassVar[type[TaskSettings]] = FileSettings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self._splits: dict[str, dict[bytes, Instance]] = {}

    def parse(self, row: _Row) -> Instance:
        """The instance that a row holds.

        Raises:
            ValueError: where it holds none; file and row are added to the message.
        """
        raise NotImplementedError

    def question(self, instance: Instance) -> str:
        """What is asked, by which questions are told apart; as a rule without what all prompts share."""
        prompt = self.prompt(instance)
        return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)

    def instances(self, split: SplitName, size: int | None) -> list[Instance]:
        found = list(self._split(split).values())
        if size is not None and size > len(found):
            have = f"{len(found)} in {_named(getattr(self.settings, split))}"
            raise ValueError(f"{split} must hold at least {size} questions, got {have}: for all of them, give no size")
        return found[:size]

    def _split(self, split: SplitName) -> dict[bytes, Instance]:
        if split not in self._splits:
            self._splits[split] = self._read(split)
        return self._splits[split]

    def _read(self, split: SplitName) -> dict[bytes, Instance]:
        files = getattr(self.settings, split)
        if files is None:
            raise ValueError(f"{split} must be a file, got None")
        ahead: dict[SplitName, tuple[SplitName, ...]] = {"test": (), "validation": ("test",)}
        others = [o for o in ahead.get(split, ("validation", "test")) if getattr(self.settings, o) is not None]
        taken = {other: self._split(other).keys() for other in others}
        dropped = dict.fromkeys(("again", *taken), 0)
        sets = []
        for name, path in files.items() if isinstance(files, dict) else [("", files)]:
            kept: dict[bytes, Instance] = {}
            for number, row in _rows(path, distinct=True):
                if row is None:
                    dropped["again"] += 1
                    continue
                instance = self._parse(path, number, row)
                key = _key(self.question(instance))
                if reason := next((other for other in taken if key in taken[other]), "again" if key in kept else ""):
                    dropped[reason] += 1
                else:
                    kept[key] = instance | ({"set": name} if name else {})
            sets.append(kept if split == "train" else dict(sorted(kept.items())))
        # Two sets may ask the same: then it is an instance of both
        found = {key + (b"" if i == 0 else bytes([i])): one for i, key, one in _in_turn(sets)}
        said = [f"{n} that {_SAID[why]}" for why, n in dropped.items() if n]
        if said:
            print(f"{split}: {len(found)} questions of {_named(files)}; dropped rows: {', '.join(said)}", flush=True)
        if not found:
            raise ValueError(f"{split} must hold questions that {' and '.join(taken)} do not, got {_named(files)}")
        return found

    def _parse(self, path: str, number: int, row: _Row) -> Instance:
        try:
            return self.parse(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error


_SAID = {"again": "ask what an earlier one asks", "validation": "validation asks too", "test": "test asks too"}


def _named(files: str | dict[str, str]) -> str:
    return files if isinstance(files, str) else ", ".join(files.values())


def _key(question: str) -> bytes:
    """What a question is told by, blind to case and white space; it also draws the order of held-out questions."""
    text = " ".join(question.casefold().split())
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _in_turn(sets: list[dict[bytes, Instance]]) -> Iterator[tuple[int, bytes, Instance]]:
    """The first of each set, the second of each set, and so on."""
    items = [list(one.items()) for one in sets]
    for turn in range(max(map(len, items))):
        for i, one in enumerate(items):
            if turn < len(one):
                yield i, *one[turn]


def _check(name: str, path: Any) -> None:
    if not isinstance(path, str) or not path.endswith(SUFFIXES):
        raise ValueError(f"{name} must be a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path!r}")
    if path.startswith(_HUB) and not _ON_HUB.fullmatch(path):
        raise ValueError(f"{name} must be hf://datasets/OWNER/NAME[@REVISION]/PATH/FILE, got {path!r}")


def _rows(path: str, distinct: bool = False) -> Iterator[tuple[int, _Row | None]]:
    """Rows with their numbers, from 1; with `distinct`, None for a row of a parquet file that an earlier one equals."""
    _check("a file of rows", path)
    place = _local(path)
    count = 0
    try:
        for count, row in enumerate(_READERS[place.suffix](place, distinct), 1):
            if row is not None and not isinstance(row, dict):
                raise ValueError(f"row {count} must be a mapping of columns, got {type(row).__name__}")
            yield count, row
    except FileNotFoundError as error:
        raise Unreachable(f"{path}: there is no such file") from error
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: after row {count}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not count:
        raise ValueError(f"{path}: it holds no rows")


def _json_lines(path: Path, _: bool) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield read_json(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error


def _json(path: Path, distinct: bool) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as file:
        text = file.read()
    if not text.lstrip().startswith("["):  # many files of this name hold a row a line
        yield from _json_lines(path, distinct)
        return
    try:
        yield from read_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def _csv(path: Path, _: bool) -> Iterator[_Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            if None in row or None in row.values():
                many, columns = "more" if None in row else "fewer", len(rows.fieldnames or ())
                raise ValueError(f"line {rows.line_num} has {many} fields than the {columns} columns of the first line")
            yield row


def _parquet(path: Path, distinct: bool) -> Iterator[_Row | None]:
    """A batch at a time. Files that repeat each row a hundred times are common: equal rows stay in Arrow."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError('to read parquet, install pyarrow: pip install "rhythm-kernels[tasks]"')
    import pyarrow
    from pyarrow import parquet

    seen: set[bytes] = set()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                if not distinct:
                    yield from batch.to_pylist()
                    continue
                new = [number for number, text in _first(_joined(batch.to_struct_array())) if _unseen(text, seen)]
                rows = dict(zip(new, batch.take(pyarrow.array(new, pyarrow.int64())).to_pylist()))
                yield from (rows.get(number) for number in range(batch.num_rows))
    except pyarrow.ArrowException as error:
        raise ValueError(f"not parquet that can be read: {error}") from error


def _first(texts: Any) -> Iterator[tuple[int, bytes]]:
    """Each text of an Arrow array, once, with the number of its first row."""
    encoded = texts.dictionary_encode()
    places: dict[int, int] = {}
    for number, index in enumerate(encoded.indices.to_pylist()):
        places.setdefault(index, number)
    known = encoded.dictionary.to_pylist()
    yield from ((number, known[index]) for index, number in places.items())


def _unseen(text: bytes, seen: set[bytes]) -> bool:
    key = hashlib.blake2b(text, digest_size=16).digest()
    new = key not in seen
    seen.add(key)
    return new


def _joined(values: Any) -> Any:
    """An Arrow array of any type as one of bytes, the same for equal values; structs and lists are joined."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind, blob = values.type, pa.large_binary()
    if pa.types.is_struct(kind) and kind.num_fields:
        parts = [*map(_joined, values.flatten()), pa.scalar(b"\x1f", blob)]
        nothing = {"null_handling": "replace", "null_replacement": b"\x1d"}
        return pc.binary_join_element_wise(*parts, **nothing)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        items = pc.fill_null(_joined(values.values), pa.scalar(b"\x1d", blob))
        lists = pa.LargeListArray.from_arrays(pc.cast(values.offsets, pa.int64()), items)
        return pc.if_else(values.is_valid(), pc.binary_join(lists, pa.scalar(b"\x1e", blob)), pa.scalar(None, blob))
    try:
        return pc.cast(values if pa.types.is_large_binary(kind) else pc.cast(values, pa.large_string()), blob)
    except pa.ArrowException:  # a type that Arrow cannot print
        return pa.array([repr(value).encode("utf-8", "backslashreplace") for value in values.to_pylist()], blob)


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _local(path: str) -> Path:
    """Where the file is on this machine; a file of the hub is downloaded into its cache."""
    if on_hub := _ON_HUB.fullmatch(path):
        return _download(path, on_hub[1], on_hub[3], unquote(on_hub[2]) if on_hub[2] else None)
    place = Path(path).expanduser()
    return ROOT / place if (ROOT / place).exists() else place


def _download(path: str, repository: str, file: str, revision: str | None) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(f'{path}: to read the hub, install huggingface_hub: pip install "rhythm-kernels[train]"')
    from huggingface_hub import errors, hf_hub_download

    why = _unreachable()
    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_files_only=bool(why))
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise Unreachable(f"{path}: the hub cannot be reached ({why or error}), and the file is not cached") from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise OSError(f"{path}: {shorten(str(error), 300)}") from error


@functools.cache
def _unreachable() -> str:
    """Why the hub does not answer; empty where it does. Its client would try for half a minute, for each file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of the client, its proxies, or an address that is none
        return shorten(f"{type(error).__name__}: {error}", 100)
    return f"status {answer.status_code}" if answer.status_code >= 500 else ""

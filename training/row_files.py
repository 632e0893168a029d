"""Reading files of rows: `.jsonl`, `.json` (a list of rows, or a row a line), `.csv` and `.parquet`, or the hub's."""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import unquote

from .reading import read_json

ROOT = Path(__file__).resolve().parent.parent  # what relative paths begin at, where the file is there
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_HUB = "hf://"
_ON_HUB = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_BATCH = 1 << 16  # rows of a parquet file that are in memory at a time
Row = dict[str, Any]


class Unreachable(OSError):  # noqa: N818 - it says what the file is
    """A file that cannot be had at all: nothing is at its path, or the hub does not answer and nothing is cached."""


def read_rows(path: str) -> list[Row]:
    """The rows of a file, as dictionaries by column.

    Args:
        path: of this machine, relative to the repository if it is there (`~` is the home folder), or
            `hf://datasets/OWNER/NAME[@REVISION]/PATH/FILE`. A revision that holds a slash is written with `%2F`.

    Raises:
        Unreachable: where nothing is there, or the hub cannot be reached.
        OSError: where it cannot be read.
        ValueError: where it holds something else, or nothing.
    """
    return [row for _, row in rows(path) if row is not None]


def check(name: str, path: Any) -> None:
    """Raise `ValueError` where the setting `name` is no path of a file of rows."""
    if not isinstance(path, str) or not path.endswith(SUFFIXES):
        raise ValueError(f"{name} must be a file {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {path!r}")
    if path.startswith(_HUB) and not _ON_HUB.fullmatch(path):
        raise ValueError(f"{name} must be hf://datasets/OWNER/NAME[@REVISION]/PATH/FILE, got {path!r}")


def rows(path: str, distinct: bool = False) -> Iterator[tuple[int, Row | None]]:
    """Rows with their numbers, from 1; with `distinct`, None for a row of a parquet file that an earlier one equals."""
    check("a file of rows", path)
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


def _csv(path: Path, _: bool) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, strict=True)
        for row in table:
            if None in row or None in row.values():
                many, columns = "more" if None in row else "fewer", len(table.fieldnames or ())
                raise ValueError(
                    f"line {table.line_num} has {many} fields than the {columns} columns of the first line"
                )
            yield row


def _parquet(path: Path, distinct: bool) -> Iterator[Row | None]:
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
                taken = dict(zip(new, batch.take(pyarrow.array(new, pyarrow.int64())).to_pylist()))
                yield from (taken.get(number) for number in range(batch.num_rows))
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

    why = unreachable()
    try:
        return Path(
            hf_hub_download(repository, file, repo_type="dataset", revision=revision, local_files_only=bool(why))
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise Unreachable(f"{path}: the hub cannot be reached ({why or error}), and the file is not cached") from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise OSError(f"{path}: {shorten(str(error), 300)}") from error


@functools.cache
def unreachable() -> str:
    """Why the hub does not answer; empty where it does. Its client would try for half a minute, for each file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of the client, its proxies, or an address that is none
        return shorten(f"{type(error).__name__}: {error}", 100)
    return f"status {answer.status_code}" if answer.status_code >= 500 else ""

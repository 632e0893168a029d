"""Questions of a set of reasoning_gym, drawn without end, as splits that share none."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from ...judges import Lost, Pool
from ...processes import is_main
from ...task import SplitName

_WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 1000  # draws in a row without a new question of a split, after which its questions are at an end
# Shares of the questions, in percent. What one split does not take is drawn in vain, and some sets draw slowly.
_PERCENT: dict[SplitName, int] = {"test": 15, "validation": 15, "train": 70}
_CHUNK = 500  # questions of one seed, as in `worker.py`
_BLOCK, _FIRST = 1000, 20  # draws that are asked for at a time; and at first, to see how long they take
_SLOW = 5.0  # seconds of drawing from which on more processes help
_LIMIT = 120.0  # seconds of a processor that a draw may take
_MEMORY = 4 << 30  # bytes of address space of a process
_PROCESSES = max(1, min(8, os.cpu_count() or 1))


_pools: dict[tuple[bool, int, float], Pool] = {}


def ask(what: str, requests: Sequence[Sequence[Any]], number: int = 1, seconds: float = _LIMIT) -> list[Any]:
    """The replies of `worker.py` to requests; None for one that took over `seconds`, or ended its process.

    All tasks share the processes, which know no set before they are asked. Those that score do nothing else.
    """
    key = (what == "score", number, seconds)
    if key not in _pools:
        _pools[key] = Pool(_WORKER, number, seconds, _MEMORY)
    replies = _pools[key].judge([(what, *request) for request in requests])
    return [None if isinstance(reply, Lost) else reply for reply in replies]


def end_processes() -> None:
    """End those that draw or score; they start again when needed."""
    for pool in _pools.values():
        pool.close()


class Question(NamedTuple):
    """A question as it was drawn.

    Attributes:
        number: of the draw, from 0.
        question: what is asked.
        answer: the set's own; None where it has none.
        entry: what the set's scorer reads, for a process that scores.
    """

    number: int
    question: str
    answer: str | None
    entry: str


def split_of(question: str) -> SplitName:
    """The split a question belongs to: a stable hash of its text, nothing else, so no question is in two."""
    bucket = int.from_bytes(blake2b(question.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") % 100
    test, held_out = _PERCENT["test"], _PERCENT["test"] + _PERCENT["validation"]
    return "test" if bucket < test else "validation" if bucket < held_out else "train"


class Questions:
    """The questions of a set with some options, by split, in the order in which they are drawn.

    A text that was drawn before is dropped. Processes of their own draw, whose hash seed is always the same: the
    questions of some sets depend on it.

    Args:
        dataset: the set's name.
        options: of its configuration.
        seed: other questions for another one.
    """

    def __init__(self, dataset: str, options: Mapping[str, Any], seed: int) -> None:
        self._what = (dataset, dict(options))
        # Sets draw question i of a seed from the generator seeded with `seed + i`, so seeds are spread far apart
        self._first = int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest(), "big") % 2**30
        self._drawn = 0
        self._number, self._pace, self._said = 1, 0.0, False
        self._texts: set[bytes] = set()
        self._found: dict[SplitName, list[Question]] = {"train": [], "validation": [], "test": []}
        self._failed = ""  # what the last draw that failed said
        self._lock = threading.Lock()

    @property
    def scored_as(self) -> tuple[str, dict[str, Any], int]:
        """What a process must be told of the set to score an answer."""
        return (*self._what, self._first)

    def first(self, split: SplitName, size: int) -> list[Question]:
        """The first `size` questions of a split; fewer where there are no more.

        Raises:
            ValueError: where the set fails to make any.
        """
        found = self._found[split]
        with self._lock:
            while len(found) < size and not self._ended(split):
                needed = (size - len(found)) * 100 // _PERCENT[split] + 1
                self._number = _PROCESSES if needed * self._pace > _SLOW else 1
                self._draw(min(max(needed, 8), _BLOCK if self._drawn else _FIRST))
                self._say_how_long(needed)
            if not found and self._failed:
                dataset, options = self._what
                raise ValueError(f"options must let {dataset} make questions, got {options!r}: {self._failed}")
            return found[:size]

    def numbered(self, number: int) -> Question | None:
        """The question of a draw, drawn again; None where it fails."""
        with self._lock:
            return self._made([number])[0]

    def _ended(self, split: SplitName) -> bool:
        return self._drawn - self._last(split) > PATIENCE

    def _draw(self, count: int) -> None:
        for number, question in enumerate(self._made(range(self._drawn, self._drawn + count)), self._drawn):
            self._drawn = number + 1
            if question is None:
                continue
            split, key = split_of(question.question), _key(question.question)
            if key not in self._texts and number - self._last(split) <= PATIENCE:
                self._texts.add(key)
                self._found[split].append(question)

    def _last(self, split: SplitName) -> int:
        return self._found[split][-1].number if self._found[split] else -1

    def _made(self, numbers: Sequence[int]) -> list[Question | None]:
        dataset, options = self._what
        wanted = [(self._first + number - number % _CHUNK, number % _CHUNK) for number in numbers]
        begin = time.monotonic()
        replies = ask("make", [(dataset, options, seed, index) for seed, index in wanted], self._number)
        self._pace = (time.monotonic() - begin) / len(numbers) * self._number
        made: list[Question | None] = []
        for number, reply in zip(numbers, replies):
            if not isinstance(reply, dict):  # to pass over it would give other questions on another machine
                raise ValueError(
                    f"options must let {dataset} make a question within {_LIMIT:g} seconds and {_MEMORY >> 30} GiB, "
                    f"got {options!r}"
                )
            self._failed = reply.get("error", self._failed)
            made.append(None if "error" in reply else Question(number, **reply))
        return made

    def _say_how_long(self, draws: int) -> None:
        minutes = draws * self._pace / self._number / 60
        if minutes > 2 and self._number == _PROCESSES and not self._said and is_main():
            self._said = True
            print(f"{self._what[0]}: drawing questions takes about {minutes:.0f} minutes", flush=True)


def _key(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

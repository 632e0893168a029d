"""A few processes that judge, each of which may be killed at any time: a bad text costs its own answer and no more."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

_WORKER = Path(__file__).with_name("worker.py")
_START = 120.0  # seconds that a worker may take to import math-verify
_ALONE = 5.0  # seconds beyond twice the timeout after which a worker ends itself, should nobody be left to kill it
_ATTEMPTS = 3  # starts in a row that may fail
_MEMORY = 2 << 30  # bytes of address space of a worker; it begins with a tenth of them
_CHUNK = 16  # requests that a worker has at a time


class Verdict(Enum):
    RIGHT = "right"
    WRONG = "wrong"
    LATE = "timed out"
    DIED = "ended its worker"


class Request(NamedTuple):
    """A question of equality.

    Attributes:
        gold: answers of which one must be met.
        answer: what was answered.
        boxed: whether `answer` is an answer alone, not text to find one in.
    """

    gold: tuple[str, ...]
    answer: str
    boxed: bool


def _verdict(reply: bytes) -> Verdict:
    return Verdict.RIGHT if reply == b"1" else Verdict.WRONG


class Pool:
    """Worker processes, started when first needed and kept until `close`, or until this process ends.

    They are programs of their own, not forks, so threads and CUDA contexts of this process do not matter to them.

    Args:
        workers: how many, at most.
        timeout: seconds of wall clock that an answer may take; then its worker is killed and started again.
        memory: bytes of address space of a worker.
        script: the program of a worker. None: `worker.py` here, which is the pattern.
        read: what a reply of its says.
    """

    def __init__(
        self,
        workers: int,
        timeout: float,
        memory: int = _MEMORY,
        script: Path | None = None,
        read: Callable[[bytes], Any] = _verdict,
    ) -> None:
        self.timeout = timeout
        self._memory, self._script, self._read = memory, script or _WORKER, read
        self._workers: list[_Worker | None] = [None] * workers
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def judge(self, requests: Sequence[Any]) -> list[Any]:
        """What is replied to each request, in their order, in bounded time; `LATE` or `DIED` where nothing is.

        Raises:
            RuntimeError: where no worker can be started.
        """
        if self._owner != os.getpid():  # a fork: the workers are its parent's, and so may the lock be
            self._workers, self._owner, self._lock = [None] * len(self._workers), os.getpid(), threading.Lock()
        with self._lock:
            try:
                return self._judge(_Round(requests))
            except BaseException:  # of Ctrl-C among others: replies that nobody has read must not answer the next call
                self._end()
                raise

    def close(self) -> None:
        """End the workers. The pool may be used again."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            if worker is not None:
                worker.end()
        self._workers = [None] * len(self._workers)

    def _judge(self, these: _Round) -> list[Any]:
        with selectors.DefaultSelector() as selector:
            while busy := self._busy(these):
                for worker in busy:
                    worker.register(selector)
                wait = min(worker.deadline for worker in busy) - time.monotonic()
                events = selector.select(max(0.0, wait))
                for worker in busy:
                    worker.unregister(selector)
                for key, mask in events:
                    if mask & selectors.EVENT_WRITE:
                        key.data.write()
                heard = {key.data for key, mask in events if mask & selectors.EVENT_READ}
                for worker in busy:
                    ended = worker in heard and not worker.read(these.verdicts)
                    late = worker not in heard and time.monotonic() >= worker.deadline
                    if ended or late:
                        self._workers[self._workers.index(worker)] = None
                        worker.end()
                        these.take_back(worker, late)
        return these.verdicts

    def _busy(self, these: _Round) -> list[_Worker]:
        """The workers that have requests, after those that have none were given some of what waits."""
        for place, worker in enumerate(self._workers):
            if these.waiting and worker is None:
                worker = self._workers[place] = _Worker(self.timeout, self._memory, self._script, self._read)
            if these.waiting and not worker.asked:
                size = max(1, min(_CHUNK, len(these.waiting) // len(self._workers)))
                worker.ask([these.waiting.popleft() for _ in range(size)], these.requests)
        return [worker for worker in self._workers if worker and worker.asked]


class _Round:
    """The requests of a call: their verdicts, and those that wait for a worker, by number."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self.requests = requests
        self.verdicts: list[Any] = [Verdict.WRONG] * len(requests)
        self.waiting = deque(range(len(requests)))
        self._died: set[int] = set()  # requests that a worker ended at
        self._failed = 0  # starts since the last one that succeeded

    def take_back(self, worker: _Worker, late: bool) -> None:
        """Of a worker that is no more: a verdict for what it was at, if that is to blame; the rest waits again."""
        if not worker.ready:
            self._failed += 1
            if self._failed >= _ATTEMPTS:
                tried = f"{sys.executable} {worker.script} 0 60"
                raise RuntimeError(f"processes that judge do not start: try {tried}")
        else:
            self._failed = 0
            if late:
                self.verdicts[worker.asked.popleft()] = Verdict.LATE
            elif worker.asked and not worker.retired:
                first = worker.asked[0]  # asked once more, as others may have ended the worker
                if first in self._died:
                    self.verdicts[worker.asked.popleft()] = Verdict.DIED
                self._died.add(first)
        self.waiting.extendleft(reversed(worker.asked))


class _Worker:
    """One process, and what it was asked."""

    def __init__(self, timeout: float, memory: int, script: Path, read: Callable[[bytes], Any]) -> None:
        self.ready = self.retired = False
        self.asked: deque[int] = deque()  # requests without a reply, by number
        self.deadline = time.monotonic() + _START
        self.script = script
        self._timeout, self._read = timeout, read
        self._unread = b""
        self._unsent = memoryview(b"")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(memory), str(2 * timeout + _ALONE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # a terminal sends Ctrl-C to all of a session's group; the parent's end suffices
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},  # the order of sympy's sets, always the same
        )
        os.set_blocking(self._process.stdin.fileno(), False)
        self.end = weakref.finalize(self, _kill, self._process, os.getpid())  # also when this process ends

    def ask(self, numbers: list[int], requests: Sequence[Any]) -> None:
        self.asked.extend(numbers)
        self._unsent = memoryview(b"".join(json.dumps(requests[n]).encode() + b"\n" for n in numbers))
        if self.ready:
            self.deadline = time.monotonic() + self._timeout

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._process.stdout, selectors.EVENT_READ, self)
        if self._unsent:
            selector.register(self._process.stdin, selectors.EVENT_WRITE, self)

    def unregister(self, selector: selectors.BaseSelector) -> None:
        selector.unregister(self._process.stdout)
        with suppress(KeyError):
            selector.unregister(self._process.stdin)

    def write(self) -> None:
        try:
            self._unsent = self._unsent[os.write(self._process.stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:  # it has ended, which reading will tell
            self._unsent = memoryview(b"")

    def read(self, verdicts: list[Any]) -> bool:
        """Take the replies that are there; False where the process has ended."""
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        *replies, self._unread = (self._unread + data).split(b"\n")
        for reply in replies:
            if reply == b"+":
                self.ready = True
            elif reply == b"-":
                self.retired = True
            elif self.asked:
                verdicts[self.asked.popleft()] = self._read(reply)
        if replies:
            self.deadline = time.monotonic() + self._timeout
        return bool(data)


def _kill(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork ends; the process is its parent's
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            with suppress(OSError):
                pipe.close()

"""A few processes that judge, each of which may be killed at any time: a bad text costs its own answer and no more."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

_START = 120.0  # seconds that a worker may take to start: some import much
_PATIENCE = 12  # times its timeout that a request may take by the clock: the machine may be busy
_ATTEMPTS = 3  # starts in a row that may fail
_MEMORY = 2 << 30  # bytes of address space of a worker; it begins with a tenth of them
_SERVE = Path(__file__).with_name("serve.py")
_CHUNK = 16  # requests that a worker has at a time


class Lost(Enum):
    """Why a request has no reply."""

    LATE = "it took too long"
    DIED = "its worker ended"


class Pool:
    """Worker processes, started when first needed and kept until `close`, or until this process ends.

    They are programs of their own, not forks, so threads and CUDA contexts of this process do not matter to them.

    Args:
        script: a file that defines `answer`, a function of a request that JSON has, whose reply JSON has
            (`serve.py`). The pattern is `training/tasks/maths/worker.py`.
        workers: how many, at most.
        timeout: seconds of a processor that a request may take; then its worker ends and another is started. By the
            clock, so that a busy machine makes no right answer wrong, it is `_PATIENCE` times that, twice.
        memory: bytes of address space of a worker.
    """

    def __init__(
        self,
        script: Path,
        workers: int,
        timeout: float,
        memory: int = _MEMORY,
    ) -> None:
        self.timeout = timeout
        self._memory, self._script = memory, script
        self._workers: list[_Worker | None] = [None] * workers
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def judge(self, requests: Sequence[Any]) -> list[Any]:
        """The reply to each request, in their order, in bounded time; None where it raised, a `Lost` where it has none.

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
                    ended = worker in heard and not worker.read(these.replies)
                    late = worker not in heard and time.monotonic() >= worker.deadline
                    if ended or late:
                        self._workers[self._workers.index(worker)] = None
                        worker.end()
                        these.take_back(worker, late)
        return these.replies

    def _busy(self, these: _Round) -> list[_Worker]:
        """The workers that have requests, after those that have none were given some of what waits."""
        for place, worker in enumerate(self._workers):
            if these.waiting and worker is None:
                worker = self._workers[place] = _Worker(self.timeout, self._memory, self._script)
            if these.waiting and not worker.asked:
                size = max(1, min(_CHUNK, len(these.waiting) // len(self._workers)))
                worker.ask([these.waiting.popleft() for _ in range(size)], these.requests)
        return [worker for worker in self._workers if worker and worker.asked]


class _Round:
    """The requests of a call: their replies, and those that wait for a worker, by number."""

    def __init__(self, requests: Sequence[Any]) -> None:
        self.requests = requests
        self.replies: list[Any] = [Lost.DIED] * len(requests)
        self.waiting = deque(range(len(requests)))
        self._died: set[int] = set()  # requests that a worker ended or was stopped at
        self._failed = 0  # starts since the last one that succeeded

    def take_back(self, worker: _Worker, late: bool) -> None:
        """Of a worker that is no more: no reply to what it was at, if that is to blame; the rest waits again."""
        if not worker.ready:
            self._failed += 1
            if self._failed >= _ATTEMPTS:
                tried = f"{sys.executable} {_SERVE} {worker.script} 0 60"
                raise RuntimeError(f"processes that judge do not start: try {tried}")
        else:
            self._failed = 0
            if worker.asked and not worker.retired:
                first, spent = worker.asked[0], worker.spent()
                if spent or first in self._died:  # else asked once more: others may have ended or held up the worker
                    self.replies[worker.asked.popleft()] = Lost.LATE if spent or late else Lost.DIED
                self._died.add(first)
        self.waiting.extendleft(reversed(worker.asked))


class _Worker:
    """One process, and what it was asked."""

    def __init__(self, timeout: float, memory: int, script: Path) -> None:
        self.ready = self.retired = False
        self.asked: deque[int] = deque()  # requests without a reply, by number
        self.deadline = time.monotonic() + _START
        self.script = script
        self._patience = timeout * _PATIENCE
        self._unread = b""
        self._unsent = memoryview(b"")
        self._process = subprocess.Popen(
            [sys.executable, str(_SERVE), str(script), str(memory), str(timeout)],
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
            self.deadline = time.monotonic() + self._patience

    def spent(self) -> bool:
        """Of a worker that has ended: whether it was for the processor's time that it took."""
        return self._process.returncode == -getattr(signal, "SIGPROF", 0) != 0

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

    def read(self, replies: list[Any]) -> bool:
        """Take the replies that are there; False where the process has ended."""
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            if line == b"+":
                self.ready = True
            elif line == b"-":
                self.retired = True
            elif self.asked:
                replies[self.asked.popleft()] = json.loads(line)
        if lines:
            self.deadline = time.monotonic() + self._patience
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

"""One process or several: which of them writes, how they wait for each other, and how they end together.

`accelerate launch` and `torchrun` start several processes of the same program. They train together; of a run's files
all but the checkpoints are written by the main process alone, which also evaluates while the others wait. They wait
over gloo, on the CPU, for as long as it takes: NCCL would give up after minutes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_LATER = "import sys, time; time.sleep(10); print(sys.argv[1], file=sys.stderr); sys.exit(2)"
_WORD = "rhythm: why a process ended"
_ENDED = ("connection closed by peer", "connection reset by peer", "connection refused")
_PEER = (*_ENDED, "gloo", "nccl")


class Ended(SystemExit):
    """This process ends without a word, as the main one says why."""


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes the run's files."""
    return number() == 0


def wait_for_all() -> None:
    """Return when every process is here."""
    if count() > 1:
        from torch import distributed

        with together():
            distributed.barrier(group=_patient())


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which alone calls it, in all of them.

    Raises:
        Exception: what `make` raises, in the main process.
        Ended: in the others, where it raises.
    """
    if count() == 1:
        return make()
    from torch import distributed

    sent: list[Any] = [None]
    failed: Exception | None = None
    if is_main():
        try:
            sent = [(make(),)]
        except Exception as error:
            failed = error
    with together():
        distributed.broadcast_object_list(sent, group=_patient(), device="cpu")
    if failed is not None:
        raise failed
    if sent[0] is None:
        raise Ended(2)
    return sent[0][0]


def own_failure(said: str) -> str:
    """What to print for an error that ends this process: in the main one as it is, otherwise with its number.

    What goes wrong in all processes at once, the main one says; and what goes wrong in another, once it has noticed.
    So another hangs up, which is noticed at once over gloo, and waits: the launcher ends it when the main one is done.
    """
    if is_main():
        return said
    _leave_word(said)
    said = f"process {number()}: {said}"
    from torch import distributed

    if distributed.is_initialized():  # no group of processes closes its connections before its process ends
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.execv(sys.executable, [sys.executable, "-IS", "-c", _LATER, f"error: {said}"])
    time.sleep(10)
    return said


@contextmanager
def together() -> Iterator[None]:
    """What processes do together: where one of them fails, the main one says why and the others end.

    Raises:
        ConnectionError: in the main process.
        Ended: in the others.
    """
    try:
        yield
    except RuntimeError as error:
        if count() == 1 or not any(words in str(error).lower() for words in _PEER):
            raise
        if not is_main():
            raise Ended(2) from error
        said = "another process of the run has ended"
        if not any(words in str(error).lower() for words in _ENDED):  # NCCL may not have found its GPU
            said = f"the processes of the run do not reach each other: {error}"
        raise ConnectionError(_last_word() or said) from error
    except Exception as error:
        if not is_main():
            _leave_word(" ".join(str(error).split()))  # at once: the main process notices before this one is done
        raise


def _leave_word(said: str) -> None:
    """Tell the main process why this one ends."""
    from torch import distributed

    if distributed.is_initialized():
        with suppress(RuntimeError):
            distributed.distributed_c10d._get_default_store().set(_WORD, f"process {number()}: {said}")


def _last_word() -> str:
    """Why another process ended, if it says so within seconds."""
    from torch import distributed

    with suppress(ValueError):  # of another thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, before there is a line
    store = distributed.distributed_c10d._get_default_store()
    with suppress(RuntimeError):
        for _ in range(20):
            if store.check([_WORD]):
                return store.get(_WORD).decode()
            time.sleep(0.1)
    return ""


@cache
def _patient() -> Any:
    """All processes, as a group that waits for days; the first to ask makes it, as all of them do."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=timedelta(days=30))

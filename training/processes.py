"""One process or several: which of them writes, how they wait for each other, and how they end together.

`accelerate launch` and `torchrun` start several processes of the same program. They train together; of a run's files
all but the checkpoints are written by the main process alone, which also evaluates while the others wait. They wait
over gloo, on the CPU, for as long as it takes: NCCL would give up after minutes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

_PEER = ("connection closed by peer", "connection reset by peer", "connection refused", "gloo", "nccl")


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


def own_failure() -> str:
    """What to put before an error that ends this process: nothing in the main one, otherwise its number.

    What goes wrong in all processes at once, the main one says: the launcher ends the others while they wait here.
    """
    if is_main():
        return ""
    time.sleep(10)
    return f"process {number()}: "


@contextmanager
def together() -> Iterator[None]:
    """What processes do together: where one of them is gone, the main one says so and the others end.

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
        raise ConnectionError("another process of the run has ended") from error


@cache
def _patient() -> Any:
    """All processes, as a group that waits for days; the first to ask makes it, as all of them do."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=timedelta(days=30))

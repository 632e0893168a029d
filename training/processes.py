"""One process or several: which of them writes, and how they wait for each other.

`accelerate launch` and `torchrun` start several processes of the same program. They train together; of a run's files
all but the checkpoints are written by the main process alone.
"""

from __future__ import annotations

import os


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every process is here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()

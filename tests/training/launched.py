"""`python -m training`, as a program that tests launch: FSDP divides models on a CPU here. And a task for it."""

from __future__ import annotations

import sys

from tests.integrations.sharding_on_cpu import shard_on_cpu
from training import processes
from training.__main__ import main
from training.tasks.countdown import Countdown


class Unlucky(Countdown):
    """A judge that fails in one process and not in the other."""

    @property
    def rewards(self):
        return dict.fromkeys(super().rewards, self.judge) if processes.number() == 1 else super().rewards

    def judge(self, responses, instances):
        raise LookupError("the second judge is out")


if __name__ == "__main__":
    shard_on_cpu()
    sys.exit(main())

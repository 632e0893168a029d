"""`python -m training`, as a program that tests launch: FSDP divides models on a CPU here."""

from __future__ import annotations

import sys

from tests.integrations.sharding_on_cpu import shard_on_cpu
from training.__main__ import main

if __name__ == "__main__":
    shard_on_cpu()
    sys.exit(main())

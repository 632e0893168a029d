"""accelerate shards models on devices of its list only and leaves FSDP out on a CPU without a word: here it shards."""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_cpu() -> None:
    """Call before anything of accelerate is made. Processes still talk by gloo, and tensors are on the CPU."""
    made = AcceleratorState.__init__

    def make(self, *args, **kwargs):
        PartialState(cpu=True)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        made(self, *args, **kwargs)

    AcceleratorState.__init__ = make

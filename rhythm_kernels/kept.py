"""Small tables made once per device and used by every later call, and when that must not be done.

A head table, or the sequence table of an unpadded batch, is the same in every layer and most calls, and making it costs
kernel launches, or a copy from the host, that weigh as much as a band pass. But a tensor made in the wrong place must
not be found by a later call, nor an ordinary one by a call in such a place:

- while a compiler or tracer runs (`torch.compile`, export, `make_fx`, `FakeTensorMode`) it stands for another tensor;
- where a dispatch mode watches the operators, they must not depend on what earlier calls left: selective checkpointing
  takes the results of a forward's operators for those of its recomputation, one by one;
- under functorch (`vmap`, `grad`, `functionalize`) it is a wrapper that dies with the transform;
- while a CUDA graph is captured its memory is the graph's own. There kept tables are read, never added to, and one that
  a graph has read is kept for good, as the graph's replays go on reading its memory;
- one made in inference mode could not be saved for a backward pass: it is made outside of it;
- one that kernels are still writing on one stream is not there yet for another: a table belongs to its stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["Kept", "ordinary", "tracing"]


def tracing() -> bool:
    """Whether tensors made here stand for others, whose values are not known: compilers, tracers, fake tensors."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._is_tracing():  # torch.jit.trace, to which sizes are tensors
        return True
    if not watched():  # nearly always: half the time of asking each
        return False
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def watched() -> bool:
    """Whether a dispatch mode sees the operators that run here."""
    return torch._C._len_torch_dispatch_stack() > 0


def ordinary() -> bool:
    """Whether tensors here are what they seem, with values: not while tracing, nor under a functorch transform."""
    return not tracing() and torch._C._functorch.peek_interpreter_stack() is None


class Kept:
    """A function from hashable arguments, the last of them the device, to a tensor, that keeps its latest results.

    Args:
        make: makes the tensor.
        size: how many results are kept; the one unused for longest goes first.
        launches: whether `make` launches kernels, which other streams do not wait for; else it is done when it returns.
    """

    def __init__(self, make: Callable[..., Tensor], size: int, launches: bool) -> None:
        self.make = make
        self._size = size
        self._launches = launches
        self._entries: dict[tuple[Any, ...], tuple[Tensor, int]] = {}  # -> the tensor and the stream that wrote it
        self._read_by_graphs: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def like(self, x: Tensor, *key: Any) -> Tensor:
        """The result on the device of x, made anew where x is no plain tensor (a subclass needs one of its kind)."""
        return self(*key, x.device) if type(x) is Tensor else self.make(*key, x.device)

    def __call__(self, *key: Any) -> Tensor:
        if not ordinary() or watched():
            return self.make(*key)
        device: torch.device = key[-1]
        capturing, stream = False, 0
        if device.type == "cuda":
            capturing = torch.cuda.is_current_stream_capturing()
            stream = torch.cuda.current_stream(device).cuda_stream if self._launches else 0
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None and (capturing or entry[1] == stream):
                self._entries[key] = entry  # the latest of all
                if capturing:
                    self._read_by_graphs[id(entry[0])] = entry[0]
                return entry[0]
        with torch.inference_mode(False):
            made = self.make(*key)
        if not capturing and type(made) is Tensor:
            with self._lock:
                self._entries[key] = made, stream
                if len(self._entries) > self._size:
                    del self._entries[next(iter(self._entries))]
        return made

    def cache_clear(self) -> None:
        """Forget all results but those that captured graphs read."""
        with self._lock:
            self._entries.clear()

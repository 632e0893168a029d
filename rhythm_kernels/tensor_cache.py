"""A cache of small tensors, each made once per device; and whether tensors made here may be cached at all.

A head table, or the sequence table of an unpadded batch, is the same in every layer and in most calls. Making it anew
takes kernel launches, or a copy from the host, which cost as much as a band pass. The cache is not used, or with care,

- while a compiler or tracer runs (`torch.compile`, export, `make_fx`, `FakeTensorMode`): a tensor made there has no
  values, and an ordinary call must not find it;
- where a dispatch mode watches the operators: which operators run must not depend on earlier calls, since selective
  checkpointing matches the operators of a forward with those of its recomputation one by one;
- under functorch (`vmap`, `grad`, `functionalize`): a tensor made there is a wrapper that is dead after the transform;
- while a CUDA graph is captured: a tensor made there lies in the graph's own memory, so it is not cached. A cached one
  that a graph reads is never dropped, as the graph's replays read its memory;
- in inference mode: a tensor made there could not be saved for a backward pass, so inference mode is left to make it;
- on several streams: a tensor that one stream's kernels still write is not ready for another, so it is used on the
  stream that wrote it alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = ["TensorCache", "ordinary", "tracing"]


def tracing() -> bool:
    """Whether tensors made here have no values: a compiler or tracer runs, or fake tensors are made."""
    if torch.compiler.is_compiling():
        return True
    if torch._C._is_tracing():  # torch.jit.trace, in which sizes are tensors
        return True
    if not watched():  # the usual case, answered in half the time of asking each mode
        return False
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


def watched() -> bool:
    """Whether a dispatch mode sees the operators that run here."""
    return torch._C._len_torch_dispatch_stack() > 0


def ordinary() -> bool:
    """Whether tensors made here are plain ones with values: nothing traces, and no functorch transform runs."""
    return not tracing() and torch._C._functorch.peek_interpreter_stack() is None


class TensorCache:
    """`make`, with its latest results cached.

    Args:
        make: makes a tensor from hashable arguments, the last of which is the device.
        size: how many results are cached; the one unused for longest is dropped first.
        launches: whether `make` launches kernels, for which other streams do not wait; else the tensor is ready when
            `make` returns.
    """

    def __init__(self, make: Callable[..., Tensor], size: int, launches: bool) -> None:
        self.make = make
        self._size = size
        self._launches = launches
        self._entries: dict[tuple[Any, ...], tuple[Tensor, int]] = {}  # -> the tensor and the stream that wrote it
        self._read_by_graphs: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def like(self, x: Tensor, *key: Any) -> Tensor:
        """The result on the device of x, made anew where x is of a subclass of Tensor, which may need its own kind."""
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
                self._entries[key] = entry  # last in the dictionary: the most recently used
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
        """Drop all results but those that captured graphs read."""
        with self._lock:
            self._entries.clear()

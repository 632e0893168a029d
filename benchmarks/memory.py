"""Peak memory of one call beyond what was held before it, results included.

CUDA: torch's allocator. CPU under Linux: the high-water mark of the process's resident memory, reset before the call
(`/proc/self/clear_refs`) after the C library has given its free memory back; scratch of compiled code counts. By
default that includes what the C library keeps of freed blocks, some megabytes; `keep_nothing` ends that.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def keep_nothing() -> None:
    """Have glibc give back every block above 64 KiB when it is freed, from now on: exact peaks, slower allocation."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def peak(call: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """Bytes, and the way they were measured; None where this system tells nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, "torch allocator"
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _resident("VmRSS")
        call()
        return max(0, _resident("VmHWM") - before), "resident high-water mark"
    except (OSError, AttributeError, StopIteration):
        return None, "not measured"


def free(device: torch.device) -> int:
    """Bytes that may be used now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return 2**33

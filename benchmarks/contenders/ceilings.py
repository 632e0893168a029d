"""What the machine can do at most, measured in the same rounds: bytes a second and operations a second."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ..gate import Results
from ..problem import AttentionProblem, CreditProblem
from ..work import Work

Call = Callable[[], Results]
_READ_FLOATS = 2**26  # 256 MiB: no cache holds it
_FMA_ITERATIONS = 2**21  # some milliseconds
_SIDE = {"cpu": 1024, "cuda": 8192}


@functools.cache
def _library() -> ctypes.CDLL | str:
    """`ceilings.c`, compiled for this processor, or why it is not."""
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not compiler[0]:
        return "no C compiler"
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ceilings.so"
        source = Path(__file__).with_suffix(".c")
        try:
            subprocess.run(
                [*compiler, *flags, str(source), "-o", str(target)], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            return f"ceilings.c was not compiled: {error}"
        library = ctypes.CDLL(str(target))
    library.fma_loop.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.read_once.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return library


def uncompiled(device: torch.device) -> str:
    library = _library()
    return library if isinstance(library, str) else ""


def fma_loop(p: AttentionProblem) -> Call:
    """Independent float32 multiply-adds in registers, on as many threads as torch has."""
    library = _library()
    assert not isinstance(library, str)

    def call() -> Results:
        library.fma_loop(_FMA_ITERATIONS, torch.get_num_threads())
        return {}

    return call


def fma_work(device: str) -> Work:
    return Work(0, 2 * 16 * 12 * _FMA_ITERATIONS * torch.get_num_threads())


def read_loop(p: AttentionProblem | CreditProblem) -> Call:
    """Read a buffer once, on as many threads as torch has."""
    library = _library()
    assert not isinstance(library, str)
    x = torch.ones(_READ_FLOATS)

    def call() -> Results:
        library.read_once(x.data_ptr(), x.numel(), torch.get_num_threads())
        return {}

    return call


def read_sum(p: AttentionProblem | CreditProblem) -> Call:
    """The same by torch."""
    x = torch.ones(_READ_FLOATS)

    def call() -> Results:
        x.sum()
        return {}

    return call


def read_work(device: str) -> Work:
    return Work(4 * _READ_FLOATS, 0)


def copy_floats(compulsory: int) -> int:
    """Floats to copy so that reading and writing them moves `compulsory` bytes, but no less than 64 MiB."""
    return max(compulsory, 2**26) // 8


def copy(work: Callable[..., Work]) -> Callable[[AttentionProblem], Call]:
    """`torch.Tensor.copy_` of as many bytes, read and written together, as the pass must move."""

    def make(p: AttentionProblem) -> Call:
        source = torch.ones(copy_floats(work(p.shape).bytes), device=p.device)
        target = torch.empty_like(source)

        def call() -> Results:
            target.copy_(source)
            return {}

        return call

    return make


def gemm(p: AttentionProblem) -> Call:
    """A square matrix product in the inputs' dtype, on random data."""
    side = _SIDE[p.device.type]
    a, b = (torch.randn((side, side), device=p.device).to(p.q.dtype) for _ in range(2))

    def call() -> Results:
        torch.mm(a, b)
        return {}

    return call


def gemm_work(device: str) -> Work:
    return Work(0, 2 * _SIDE[device] ** 3)

"""What the machine can do at most, measured in the same rounds: bytes a second and operations a second."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..gate import Results
from ..problem import AttentionProblem, CreditProblem
from ..work import Work

Call = Callable[[], Results]
_READ_FLOATS = 2**26  # 256 MiB: no cache holds it
_SIDE = {"cpu": 1024, "cuda": 8192}


def read(p: AttentionProblem | CreditProblem) -> Call:
    """Read a buffer once with all threads."""
    x = torch.ones((2**13, _READ_FLOATS // 2**13), device=p.device)
    y = torch.ones(x.shape[1], device=p.device)

    def call() -> Results:
        torch.mv(x, y)
        return {}

    return call


def read_work(device: str) -> Work:
    return Work(4 * _READ_FLOATS, 2 * _READ_FLOATS)


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

"""Every backend of a function, for tests that hold all of them to one answer.

`cuda` is the emulated kernels of `tests/cuda`, which has the bands and credit; on a machine with a GPU, Triton reads
GPU tensors. A test module imports the fixtures `backend`, `bands` and `cuda_on_cpu` from here.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rhythm_kernels as rk
from rhythm_kernels.ops import dispatch
from tests.cuda.conftest import bands as bands
from tests.cuda.conftest import cuda_on_cpu as cuda_on_cpu

MEASURING = ["reference", "torch", "cpu", "triton"]
BANDED = [*MEASURING, "cuda"]
ATTENDING = ["reference", "torch", "cpu", "triton"]
CREDITING = ["reference", "torch", "cpu", "cuda"]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that can run, by `indirect` parametrisation."""
    name: str = request.param
    if name == "cuda":
        request.getfixturevalue("cuda_on_cpu")
    elif rk.backends()[name]:
        pytest.skip(rk.backends()[name])
    return name


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def credit(backend: str, *measures: torch.Tensor, **options: object) -> torch.Tensor:
    """`rhythm_credit` of a backend, that of `cuda` from the emulated kernel."""
    if backend != "cuda":
        return rk.rhythm_credit(*measures, backend=backend, **options)
    from tests.cuda.test_cuda_credit import emulated_credit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda *_: "cuda")
        patch.setattr(dispatch, "_module", lambda _: SimpleNamespace(credit=emulated_credit, available=lambda _: ""))
        return rk.rhythm_credit(*measures, **options)

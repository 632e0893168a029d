"""The CUDA sources built for the CPU, and a backend "cuda" made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rhythm_kernels import ops
from rhythm_kernels.ops import dispatch

from .emulated import KERNELS, SANITIZED, Emulated, build
from .passes import LAYOUT, Passes

BANDS = [KERNELS / "band_rows.cu", KERNELS / "band_columns.cu", KERNELS / "error.cu", LAYOUT]


@pytest.fixture(scope="session")
def bands() -> Emulated:
    return Emulated(build(BANDS, sanitize=SANITIZED))


@pytest.fixture
def cuda_on_cpu(bands: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """Backend "cuda" serves CPU tensors: the bands by the emulated kernels, the other passes by tile-wise torch."""
    passes = Passes(bands)
    choose, run = dispatch.choose, dispatch.run

    def choose_cuda(pass_name: str, backend: str | None, device: torch.device) -> str:
        return "cuda" if backend == "cuda" else choose(pass_name, backend, device)

    def run_cuda(pass_name: str, backend: str | None, *args: Any) -> Any:
        if backend != "cuda":
            return run(pass_name, backend, *args)
        emulated = getattr(passes, pass_name, None)
        return run(pass_name, "torch", *args) if emulated is None else emulated(*args)

    monkeypatch.setattr(ops, "choose", choose_cuda)
    monkeypatch.setattr(dispatch, "run", run_cuda)
    bands.set_order("forward")
    return bands

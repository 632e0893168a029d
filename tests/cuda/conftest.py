"""The CUDA sources built for the CPU, and a backend "cuda" made of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rhythm_kernels import ops
from rhythm_kernels.backend import tiled_torch
from rhythm_kernels.ops import dispatch

from .emulated import KERNELS, SANITIZED, Emulated, build
from .passes import LAYOUT, Passes

BANDS = [KERNELS / "band_rows.cu", KERNELS / "band_columns.cu", KERNELS / "error.cu", LAYOUT]


@pytest.fixture(scope="session")
def bands() -> Emulated:
    return Emulated(build(BANDS, sanitize=SANITIZED))


def serve_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `backend="cuda"` chosen for CPU tensors too."""
    choose = dispatch.choose

    def choose_cuda(pass_name: str, backend: str | None, device: torch.device) -> str:
        return "cuda" if backend == "cuda" else choose(pass_name, backend, device)

    for module in (ops, dispatch):
        monkeypatch.setattr(module, "choose", choose_cuda)


@pytest.fixture
def cuda_serves_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_the_cpu(monkeypatch)


@pytest.fixture
def cuda_on_cpu(bands: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """Backend "cuda" serves CPU tensors: the bands by the emulated kernels, the other passes by tile-wise torch."""
    serve_the_cpu(monkeypatch)
    emulated = Passes(bands)
    module = SimpleNamespace(**vars(tiled_torch) | {x: getattr(emulated, x) for x in ("band_rows", "band_columns")})
    module_of = dispatch._module
    monkeypatch.setattr(dispatch, "_module", lambda backend: module if backend == "cuda" else module_of(backend))
    bands.set_order("forward")
    return bands

"""nvcc compiles the kernels for every architecture, without spills; no GPU is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .compiled import ARCHITECTURES, compile_kernels, nvcc, tensor_core_kernels
from .emulated import KERNELS

pytestmark = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc on the PATH")
SOURCES = sorted(KERNELS.glob("*.cu"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(source: Path, record_property) -> None:
    usages = compile_kernels(source)
    for usage in usages:
        record_property(f"{usage.kernel} sm_{usage.architecture}", usage._asdict())
        assert usage.spilled == 0, usage
        assert usage.stack == 0, usage
        assert usage.registers > 0, usage
    kernels = {usage.kernel for usage in usages}
    assert len(usages) == len(kernels) * len(ARCHITECTURES)
    assert bool(kernels) == (source.name != "error.cu")


@pytest.mark.parametrize("name", ["band_rows", "band_columns"])
def test_aligned_sixteen_bit_bands_use_tensor_cores(name: str) -> None:
    kernels = tensor_core_kernels(KERNELS / f"{name}.cu")
    variants = {kernel.split("<")[1].split(",")[0] for kernel in kernels}
    assert "Plain" in variants
    assert len(kernels) == 12 * len(variants)  # two types, three bounds of the head size, reached or not
    assert all("Float16, " in kernel for kernel in kernels)  # BFloat16 too
    assert not any("-1" in kernel for kernel in kernels)

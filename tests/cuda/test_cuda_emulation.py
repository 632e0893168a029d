"""The emulation itself: right kernels give what they must, and each kind of wrong one is caught."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from .emulated import KERNELS, ORDERS, Emulated, KernelError, build

PROBES = Path(__file__).resolve().parent / "kernels" / "probes.cu"


@pytest.fixture(scope="module")
def probes() -> Emulated:
    return Emulated(build([PROBES, KERNELS / "error.cu"]))


@pytest.fixture(params=list(ORDERS))
def order(request: pytest.FixtureRequest, probes: Emulated) -> str:
    probes.set_order(request.param, seed=3)
    return request.param


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def test_block_reduction(probes: Emulated, order: str) -> None:
    x, out = torch.randint(-1000, 1000, (7, 256), dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    probes.call("probe_block_sum", pointer(x), pointer(out), 7, 256)
    assert out.tolist() == x.sum(1).tolist()


def test_exchange_through_shared_memory(probes: Emulated, order: str) -> None:
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    probes.call("probe_reversed", pointer(x), pointer(out), 64)
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize(("threads", "outcomes"), [(32, 3), (64, 2)])  # within a warp, and between two
def test_a_missing_barrier_shows_in_the_order_of_threads(threads: int, outcomes: int, probes: Emulated) -> None:
    x = torch.arange(threads, dtype=torch.int32)
    results = set()
    for order in ORDERS:
        probes.set_order(order, seed=3)
        out = torch.zeros(threads, dtype=torch.int32)
        probes.call("probe_reversed_without_barrier", pointer(x), pointer(out), threads)
        results.add(tuple(out.tolist()))
    assert len(results) >= outcomes


def test_a_warp_runs_ahead_of_the_others(probes: Emulated) -> None:
    wrong = []
    for order in ORDERS:
        probes.set_order(order, seed=3)
        out = torch.zeros(64, dtype=torch.int32)
        probes.call("probe_rounds", pointer(out))
        assert out.tolist() == [6] * 64
        probes.call("probe_rounds_without_barrier", pointer(out))
        wrong.append(out.tolist() != [6] * 64)
    assert any(wrong)


@pytest.mark.parametrize(
    ("probe", "arguments", "message"),
    [
        ("early_exit", 1, r"threads 0 to 39 wait at __syncthreads \(probes.cu:\d+\); threads 40 to 63 have left"),
        ("two_barriers", 1, r"__syncthreads at probes.cu:\d+, while thread \d+ waits at another, probes.cu:\d+"),
        ("shuffle_without_lanes", 2, r"lane \d+ of the mask 0xffffffff has left|threads 16 to 31 have left"),
        ("shuffle_from_outside_the_mask", 0, "lane 0 shuffles from lane 8, which its mask 0xff lacks"),
        ("warp_against_block", 0, r"threads 0 to 15 wait in __ballot_sync .*; threads 16 to 31 wait at __syncthreads"),
        ("mask_beyond_the_block", 0, r"the mask 0xffffffff holds lane 16, which the block lacks"),
        ("misaligned_load", 0, r"a 16-byte load from the misaligned address"),
        ("too_many_threads", 0, r"invalid configuration: 1 blocks of 1025 threads"),
    ],
)
def test_what_cannot_be_right_is_an_error(
    probe: str, arguments: int, message: str, probes: Emulated, order: str
) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    number = {"early_exit": 40, "two_barriers": 40, "shuffle_without_lanes": 16}.get(probe)
    given = [pointer(out)] if arguments == 0 else [number] if arguments == 1 else [number, pointer(out)]
    with pytest.raises(KernelError, match=message):
        probes.call(f"probe_{probe}", *given)
    x = torch.arange(64, dtype=torch.int32)  # and the next launch is none the worse
    out = torch.zeros(64, dtype=torch.int32)
    probes.call("probe_reversed", pointer(x), pointer(out), 64)
    assert torch.equal(out, x.flip(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_fragments(dtype: torch.dtype, probes: Emulated, order: str) -> None:
    """Registers are filled by strides: element (i, j) of an operand belongs to the lane and half that these give.

    Column-major offsets of CuTe's atom for this instruction: lane (l % 4, l // 4), value (v % 2, v // 2 % 2, v // 4).
    """
    lane, v8, v4 = np.arange(32)[:, None], np.arange(8)[None], np.arange(4)[None]
    at_a = lane % 4 * 32 + lane // 4 + v8 % 2 * 16 + v8 // 2 % 2 * 8 + v8 // 4 * 128  # (16, 16)
    at_b = lane % 4 * 16 + lane // 4 + v4 % 2 * 8 + v4 // 2 * 64  # (8, 16)
    at_c = lane % 4 * 32 + lane // 4 + v4 % 2 * 16 + v4 // 2 * 8  # (16, 8)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype)
    c = torch.randn(16, 8)

    def registers(x: Tensor, at: np.ndarray) -> Tensor:
        return x.t().reshape(-1)[torch.from_numpy(at)].contiguous()

    parts = registers(a, at_a), registers(b, at_b), registers(c, at_c)
    probes.call("probe_mma", *map(pointer, parts), dtype == torch.bfloat16)
    want = c.double() + a.double() @ b.double().t()
    assert float((parts[2].double() - registers(want, at_c)).abs().max()) < 1e-5


def test_sixteen_bit_numbers_are_read_exactly(probes: Emulated) -> None:
    """Subnormals, infinities and NaN: times the unit matrix every float16 and bfloat16 comes back as it was."""
    probes.set_order("forward")
    for dtype in (torch.bfloat16, torch.float16):
        for special in (1e-40, 6e-8, -3e-5, 65504.0, float("inf"), float("nan"), -0.0):
            a, b = torch.zeros(32, 8, dtype=dtype), torch.zeros(32, 4, dtype=dtype)
            a[0, 0], b[0, 0], b[1:, 0] = special, 1, 0  # row 0 of a: element 0; column 0 of b
            c = torch.zeros(32, 4)
            probes.call("probe_mma", pointer(a), pointer(b), pointer(c), dtype == torch.bfloat16)
            want = torch.tensor(special).to(dtype).float()
            assert torch.equal(c[0, 0], want) or (want.isnan() and c[0, 0].isnan())


def test_tanh_is_accurate(probes: Emulated) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4000), torch.logspace(-30, 2, 95), torch.tensor([0.3])])
    x = torch.cat([x, -x])
    out = torch.empty_like(x)
    probes.call("probe_tanh", pointer(x), pointer(out), len(x) // 32)
    want = x.double().tanh()
    assert float(((out.double() - want) / want.abs().clamp(min=1e-45)).abs().max()) < 2e-7

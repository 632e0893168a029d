"""The case list and the machinery around the kernels on a CUDA device; rehearsed on the CPU as far as that goes."""

from __future__ import annotations

import pytest
import torch

import rhythm_kernels as rk
from benchmarks.shapes import AttentionShape
from tests.cases import CASES, Case, random_cases

from . import on_device

BACKENDS = ("cuda", "triton", "torch")
gpu = pytest.mark.gpu


def need(backend: str, *passes: str, device: str = "cuda") -> None:
    reason = on_device.lacks(backend, device, *(passes or ("band_rows", "band_columns")))
    if reason:
        pytest.skip(reason)


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned_memory")
def test_case(case: Case, backend: str) -> None:
    need(backend)
    on_device.check_case(case, backend, "cuda")


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(seed: int, backend: str) -> None:
    need(backend)
    for case in random_cases(seed, 5):
        try:
            on_device.check_case(case, backend, "cuda")
        except AssertionError as error:
            raise AssertionError(f"{case}") from error


ATTENTION = [case for case in CASES if case.name in ("plain", "multi-query", "softcap", "window below W", "packed")]
ATTENTION += [Case(f"{dtype}", length=200, dim=64, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]


@gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
def test_attention(case: Case, backend: str) -> None:
    need(backend, "attention")
    on_device.check_attention(case, backend, "cuda")


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_graph_capture(backend: str) -> None:
    """A captured graph, replayed on other values, gives what the call gives."""
    need(backend)
    bands_alone = bool(on_device.lacks(backend, "cuda", "row_stats", "column_stats"))
    run = on_device.measures(backend, bands_alone)
    static = on_device.measured_inputs("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*static)
    for seed in (1, 2):
        for target, value in zip(static, on_device.measured_inputs("cuda", seed)):
            target.copy_(value)
        graph.replay()
        for got, want in zip(captured, run(*static)):
            assert torch.equal(got, want)


@gpu
def test_credit_is_captured() -> None:
    static = on_device.credit_inputs("cuda", 0)
    rk.rhythm_credit(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gamma = rk.rhythm_credit(*static)
    for target, value in zip(static, on_device.credit_inputs("cuda", 1)):
        target.copy_(value)
    graph.replay()
    assert torch.equal(gamma, rk.rhythm_credit(*static))


@gpu
def test_credit() -> None:
    on_device.check_credit("cuda")


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_reduce_overhead(backend: str) -> None:
    """`torch.compile` with CUDA graphs."""
    need(backend)
    on_device.check_compiled(backend, "cuda", {"mode": "reduce-overhead"})


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_fifty_calls_give_the_same_bits(backend: str) -> None:
    need(backend)
    on_device.check_repeatable(backend, "cuda", 50)


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_million_tokens(backend: str) -> None:
    """More than 2^31 elements of q: offsets must be 64 bits wide."""
    need(backend)
    shape = AttentionShape(2**20, heads=17, kv_heads=1, dim=128, dtype="bfloat16")
    on_device.check_long(backend, "cuda", shape)


# The same functions where there is no GPU: what the tests above call is itself tested.


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rehearsal(backend: str) -> None:
    need(backend, device="cpu")
    on_device.check_case(CASES[0], backend, "cpu")
    on_device.check_bands(CASES[0], backend, "cpu")
    on_device.check_repeatable(backend, "cpu", 2)
    on_device.check_long(backend, "cpu", AttentionShape(500, heads=2, kv_heads=1, dim=16))


def test_rehearsal_of_attention_compilation_and_credit() -> None:
    on_device.check_attention(CASES[0], None, "cpu")
    on_device.check_compiled("torch", "cpu", {"backend": "eager", "dynamic": True})
    on_device.check_credit("cpu")

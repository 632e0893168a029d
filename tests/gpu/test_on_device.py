"""The case list and the machinery around the kernels on a CUDA device; rehearsed on the CPU as far as that goes."""

from __future__ import annotations

import pytest
import torch

import rhythm_kernels as rk
from benchmarks.shapes import AttentionShape

from ..cases import BANDS, CASES, Case, check, random_cases
from . import on_device

BACKENDS = ("cuda", "triton", "torch")
SEEDS = range(8)  # of random cases
gpu = pytest.mark.gpu


def need(backend: str, *passes: str, device: str = "cuda") -> None:
    reason = on_device.lacks(backend, device, *(passes or BANDS))
    if reason:
        pytest.skip(reason)


VALUES = {192: 128}  # as in multi-head latent attention: v is smaller than k
# Every case of the list, and every head size that models have, over several tiles.
DEVICE_CASES = [
    *CASES,
    *(
        Case(f"{str(dtype)[6:]}, head size {dim}", length=300, dim=dim, dtype=dtype, value_dim=VALUES.get(dim))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for dim in (64, 80, 96, 112, 128, 192, 256)
    ),
]


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", DEVICE_CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("poisoned_memory")
def test_case(case: Case, backend: str) -> None:
    need(backend)
    on_device.check_case(case, backend, "cuda")


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(seed: int, backend: str) -> None:
    need(backend)
    for case in random_cases(seed, 5):
        try:
            on_device.check_case(case, backend, "cuda")
        except AssertionError as error:
            raise AssertionError(f"{case}") from error


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
@pytest.mark.parametrize("backend", ["cuda", "torch"])
def test_credit_is_captured(backend: str) -> None:
    need(backend, "credit")
    static = on_device.credit_inputs("cuda", 0)
    rk.rhythm_credit(*static, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gamma = rk.rhythm_credit(*static, backend=backend)
    for target, value in zip(static, on_device.credit_inputs("cuda", 1)):
        target.copy_(value)
    graph.replay()
    assert torch.equal(gamma, rk.rhythm_credit(*static, backend=backend))


@gpu
@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.usefixtures("poisoned_memory")
def test_credit(backend: str) -> None:
    need(backend, "credit")
    on_device.check_credit(backend, "cuda")


@gpu
def test_credit_of_a_million_tokens() -> None:
    need("cuda", "credit")
    generator = torch.Generator("cuda").manual_seed(0)
    waad, fai, chance = torch.rand(3, 2, 2**20, generator=generator, device="cuda")
    first, *others = (
        rk.rhythm_credit(waad, fai, chance > 0.1, backend=backend) for backend in ("torch", *["cuda"] * 5)
    )
    assert all(torch.equal(first, gamma) for gamma in others)


@gpu
def test_the_current_stream_and_device_are_used() -> None:
    """On the last device of several, from a side stream, while the current device is another."""
    need("cuda", "credit")
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    inputs = on_device.credit_inputs(last, 0)
    want = rk.rhythm_credit(*inputs, backend="torch")
    torch.cuda.synchronize(last)
    with torch.cuda.stream(torch.cuda.Stream(last)):
        torch.cuda._sleep(10_000_000)  # what the kernel reads is written late, on this stream
        with torch.cuda.device(0):
            late = [x.clone() for x in inputs]
            gamma = rk.rhythm_credit(*late, backend="cuda")
    torch.cuda.synchronize(last)
    assert torch.equal(gamma, want)


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
    check(CASES[0], backend, passes=BANDS)
    on_device.check_repeatable(backend, "cpu", 2)
    on_device.check_long(backend, "cpu", AttentionShape(500, heads=2, kv_heads=1, dim=16))


def test_rehearsal_of_attention_compilation_and_credit() -> None:
    on_device.check_case(CASES[0], "torch", "cpu")
    on_device.check_compiled("torch", "cpu", {"backend": "eager", "dynamic": True})
    for backend in ("cpu", "torch"):
        need(backend, "credit", device="cpu")
        on_device.check_credit(backend, "cpu")

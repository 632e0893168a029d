"""The CUDA band kernels against the dense definitions, a block's threads in several orders."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference
from rhythm_kernels.rule import Rule

from ..cases import BANDS, CASES, Case, check, random_cases
from .emulated import ORDERS, Emulated, KernelError
from .passes import Passes

MORE = [
    Case("head size 112", dim=112, length=40, dtype=torch.bfloat16),
    Case("head size 192", dim=192, length=33, dtype=torch.float16, heads=2, kv_heads=1),
    Case("head size 256", dim=256, length=41, dtype=torch.bfloat16, heads=3, kv_heads=1, window=30),
    Case("odd head size", dim=13, dtype=torch.bfloat16),
    Case("odd head size in aligned rows", dim=13, fused=True),
    Case("odd head size in aligned 16-bit rows", dim=13, fused=True, dtype=torch.bfloat16),
    Case("odd strides", dim=24, dtype=torch.float16, fused=True),
    Case("wide band in chunks", length=300, batch=1, heads=2, kv_heads=1, window=250, horizon=(2, 280),
         dtype=torch.float16),
    Case("window of a chunk", length=120, batch=1, window=17, dtype=torch.bfloat16, dim=64),
    Case("window past a chunk", length=120, batch=1, window=18, dtype=torch.bfloat16, dim=64),
    Case("more heads than warps", heads=24, kv_heads=3, length=50, dtype=torch.bfloat16, dim=32),
    Case("heads of several kv heads, shuffled", heads=12, kv_heads=4, length=50, dtype=torch.bfloat16, dim=32,
         options={"heads": [11, 0, 7, 1, 8, 2, 10]}),
    Case("the paper's horizon", length=170, batch=1, heads=26, kv_heads=13, horizon=(10, 100), dim=128,
         dtype=torch.bfloat16),
    Case("the paper's horizon behind a window", length=260, batch=1, heads=3, kv_heads=1, horizon=(10, 100),
         options={"window_size": (57, 0)}, dim=64, dtype=torch.float16),
    Case("more heads than warps, back and forth", heads=10, kv_heads=5, batch=1, length=60, dtype=torch.float16,
         dim=256, horizon=(0, 30), options={"heads": [4, 0, 5, 9, 1, 2, 8, 7, 3, 6]}),
    Case("a head in its last chunk of the product", heads=4, kv_heads=2, length=140, dtype=torch.bfloat16, dim=104,
         horizon=(31, 33)),
    Case("slabs of four", lengths=(130, *(0,) * 560, 200, 1), heads=3, kv_heads=1, dtype=torch.bfloat16, dim=32),
    Case("slabs of two", lengths=(130, *(0,) * 300, 100), heads=5, kv_heads=5),
]  # fmt: skip


@pytest.fixture(params=list(ORDERS))
def order(request: pytest.FixtureRequest, cuda_on_cpu: Emulated) -> str:
    cuda_on_cpu.set_order(request.param, seed=1)
    return request.param


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.name)
def test_cases(case: Case, order: str) -> None:
    check(case, "cuda", passes=BANDS)


def test_random_shapes(order: str) -> None:
    for case in random_cases(seed=list(ORDERS).index(order) + 40, n=60):
        check(case, "cuda", passes=BANDS)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(500, 506))
def test_many_random_shapes(seed: int, order: str) -> None:
    for case in random_cases(seed, n=200):
        check(case, "cuda", passes=BANDS)


def bands(q: Tensor, k: Tensor, lse: Tensor, **options: object) -> list[Tensor]:
    return [rk.waad(q, k, lse, backend="cuda", **options), rk.fai(q, k, lse, backend="cuda", **options)]


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def inputs(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, 150, 6, 32).to(request.param), torch.randn(2, 150, 3, 32).to(request.param)
    return q, k, reference.attention_lse(q.double(), k.double()).float()


def test_results_do_not_depend_on_the_order(cuda_on_cpu: Emulated, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Bit for bit: nothing is summed in the order in which threads or blocks happen to come."""
    first = bands(*inputs)
    for order in ORDERS:
        for seed in range(3):
            cuda_on_cpu.set_order(order, seed)
            assert all(torch.equal(a, b) for a, b in zip(first, bands(*inputs), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(
    bad: float, cuda_on_cpu: Emulated, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, lse = inputs
    at, tokens = 70, torch.arange(150)

    def changed(*broken: Tensor) -> list[Tensor]:
        """Which tokens of batch row 0 changed, of WAAD and FAI; batch row 1 must not have."""
        pairs = list(zip(bands(q, k, lse), bands(*broken), strict=True))
        assert all(torch.equal(before[1], after[1]) for before, after in pairs)
        return [before[0] != after[0] for before, after in pairs]

    def poisoned(x: Tensor, *index: object) -> Tensor:
        x = x.clone()
        x[index] = bad
        return x

    its_keys = (tokens <= at - 10) & (tokens >= at - 100)
    its_rows = (tokens >= at) & (tokens < at + 10)
    for broken in ((poisoned(q, 0, at, slice(None), 3), k, lse), (q, k, poisoned(lse, 0, slice(None), at))):
        waad, fai = changed(*broken)
        assert not (waad & (tokens != at)).any()
        assert not (fai & ~its_keys).any()
    waad, fai = changed(q, poisoned(k, 0, at), lse)
    assert not (waad & ~its_rows).any()
    assert not (fai & (tokens != at)).any()
    if bad != bad:
        assert bands(poisoned(q, 0, at, slice(None), 3), k, lse)[0][0, at].isnan()
        assert bands(q, poisoned(k, 0, at), lse)[1][0, at].isnan()


def test_offsets_are_64_bit(cuda_on_cpu: Emulated) -> None:
    """Strides as of a huge batch: tokens, heads and batch rows lie 2^31 elements or more apart, in untouched memory."""
    shape, kv_shape = (2, 20, 2, 8), (2, 20, 1, 8)
    q, k = torch.randn(shape), torch.randn(kv_shape)
    lse = reference.attention_lse(q.double(), k.double()).float()
    memory = mmap.mmap(-1, 2**41, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    floats = torch.frombuffer(memory, dtype=torch.float32)

    def spread(x: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
        view = floats.as_strided(x.shape, strides, offset)
        view.copy_(x)
        return view

    far = 2**31 + 8
    wide = (
        spread(q, (45 * far, far, 22 * far, 1), 0),
        spread(k, (45 * far, 2 * far, far, 1), 64),
        spread(lse, (45 * far, 22 * far, far), 128),
    )
    for packed in (False, True):
        a, b = (q, k, lse), wide
        options = {"horizon": (1, 5)}
        if packed:
            a, b = (tuple(x[1] for x in xs) for xs in (a, b))
            options["cu_seqlens"] = torch.tensor([0, 9, 20], dtype=torch.int32)
        waad = [rk.waad(*x, backend="cuda", cu_seqlens=options.get("cu_seqlens")) for x in (a, b)]
        fai = [rk.fai(*x, backend="cuda", **options) for x in (a, b)]
        assert torch.equal(*waad)
        assert torch.equal(*fai)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_position_is_written(dtype: torch.dtype, per_head: bool, cuda_on_cpu: Emulated) -> None:
    """The output comes full of NaN: prompts, gaps, ends of batch rows, empty ones and what lies past max_seqlen."""
    q, k = torch.randn(3, 300, 4, 64).to(dtype), torch.randn(3, 300, 2, 64).to(dtype)
    lse = 5 + torch.rand(3, 4, 300)  # every A is small, no measure 0
    seqs = torch.tensor(
        [[0, 10, 250, 20], [0, 255, 255, 255], [0, 260, 290, 290], [1, 0, 0, 0], [2, 3, 40, 3], [2, 40, 300, 100]],
        dtype=torch.int32,
    )
    heads = torch.tensor([[0, 0], [2, 2], [3, 3]], dtype=torch.int32)
    live = torch.zeros(3, 300, dtype=torch.bool)
    live[0, 20:84] = live[2, 3:40] = live[2, 100:164] = True
    passes = Passes(cuda_on_cpu)
    rule = Rule(seqs, heads, 64, 0.125, 0.0, -1, None)
    for got in (
        passes.band_rows(q, k, lse, rule, 10, per_head),
        passes.band_columns(q, k, lse, rule, 0, 9, per_head),
    ):
        assert not got.isnan().any()
        assert torch.equal((got != 0).amax(dim=1) if per_head else got != 0, live)


def test_a_grid_too_large_is_refused(bands: Emulated) -> None:
    """The launch says so; nothing wraps."""
    q, k, lse = torch.randn(1, 4, 1, 8), torch.randn(1, 4, 1, 8), torch.zeros(1, 1, 4)
    seqs, heads = torch.zeros(128, 4, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(KernelError, match="invalid configuration"):
        Passes(bands).band_rows(q, k, lse, Rule(seqs, heads, 2**31 - 1, 1.0, 0.0, -1, None), 10, False)

"""The compiled CPU passes on every instruction set that this machine can run, against the dense definitions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import rhythm_kernels as rk
from rhythm_kernels import reference
from rhythm_kernels.backend import cpu, extension
from rhythm_kernels.rule import Rule
from tests.cases import CASES, MEASURES, Case, check, random_cases

if extension.unusable():
    pytest.fail(extension.unusable(), pytrace=False)

CAPABILITIES = [name for name, runs in extension.build_info()["capabilities"].items() if runs]
FEW = [
    Case("wide band in chunks", length=400, batch=1, heads=2, kv_heads=1, window=300, horizon=(2, 390)),
    Case("more heads than a kv group takes", heads=12, kv_heads=1, length=90),
    Case("tile edges", length=129, batch=1, response=(63,)),
    Case("head size one", dim=1, length=30),
    Case("long", length=1000, batch=1, heads=2, kv_heads=2, dim=40, window=17, dtype=torch.bfloat16),
]


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RHYTHM_CPU_CAPABILITY", request.param)
    return request.param


@pytest.mark.parametrize("case", [*CASES, *FEW], ids=lambda case: case.name)
def test_cases(case: Case, capability: str, poisoned_memory: None) -> None:
    check(case, "cpu", passes=MEASURES)


def test_random_shapes(capability: str, poisoned_memory: None) -> None:
    for case in random_cases(seed=CAPABILITIES.index(capability) + 7, n=25):
        check(case, "cpu", passes=MEASURES)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 108))
def test_many_random_shapes(seed: int, capability: str) -> None:
    for case in random_cases(seed, n=100):
        check(case, "cpu", passes=MEASURES)


def measures(q: Tensor, k: Tensor, lse: Tensor, **options: object) -> Iterator[Tensor]:
    yield rk.attention_lse(q, k, backend="cpu")
    for given in (lse, None):
        yield rk.waad(q, k, given, backend="cpu", **options)
        yield rk.fai(q, k, given, backend="cpu", **options)
        yield rk.fai(q, k, given, horizon=(10, None), backend="cpu", **options)
        yield from rk.column_moments(q, k, given, backend="cpu", **options)
    yield rk.span(q, k, backend="cpu", **options)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(2, 301, 6, 32), torch.randn(2, 301, 3, 32)
    return q, k, reference.attention_lse(q, k)


def test_results_do_not_depend_on_threads(capability: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = list(measures(*inputs))
        for n in (2, 3, 7):
            torch.set_num_threads(n)
            for _ in range(3):
                assert all(torch.equal(a, b) for a, b in zip(alone, measures(*inputs), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_sequence_does_not_see_its_neighbours(capability: str) -> None:
    """Packed after others of any length, a sequence gets bit for bit what it gets alone."""
    lengths = [37, 0, 130, 1, 64]
    total = sum(lengths)
    q, k = torch.randn(total, 4, 24), torch.randn(total, 2, 24)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = rk.waad(q, k, cu_seqlens=cu_seqlens, backend="cpu"), rk.fai(q, k, cu_seqlens=cu_seqlens, backend="cpu")
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        if length:
            own = slice(start, start + length)
            assert torch.equal(packed[0][own], rk.waad(q[None, own], k[None, own], backend="cpu")[0])
            assert torch.equal(packed[1][own], rk.fai(q[None, own], k[None, own], backend="cpu")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_views_give_what_copies_give(capability: str, dtype: torch.dtype) -> None:
    fused = torch.randn(2, 150, 3 * 4 * 16 + 5).to(dtype)
    q = fused[:, 1::2, : 4 * 16].unflatten(-1, (4, 16))
    k = fused[:, 1::2, 4 * 16 : 6 * 16].unflatten(-1, (2, 16))
    wide = torch.randn(2, 75, 9)
    lse = wide[:, :, 2:6].transpose(1, 2)
    lse.copy_(reference.attention_lse(q, k))
    assert not q.is_contiguous()
    assert lse.stride(2) == 9
    copies = q.contiguous(), k.contiguous(), lse.contiguous()
    for viewed, copied in zip(measures(q, k, lse), measures(*copies), strict=True):
        assert torch.equal(viewed, copied)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(
    bad: float, capability: str, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, lse = inputs
    row = 130
    broken = q.clone()
    broken[0, row, :, 3] = bad
    rows = torch.arange(301) == row
    keys = (torch.arange(301) <= row - 10) & (torch.arange(301) >= row - 50)

    def changed(measure: Callable[[Tensor], Tensor]) -> Tensor:
        """Which tokens of batch row 0 changed; batch row 1 must not have."""
        before, after = measure(q), measure(broken)
        assert torch.equal(before[1], after[1])
        return (before[0] != after[0]).reshape(-1, 301).any(0)

    for given in (lse, None):
        assert not (changed(lambda x, g=given: rk.waad(x, k, g, backend="cpu")) & ~rows).any()
        assert not (changed(lambda x, g=given: rk.fai(x, k, g, horizon=(10, 50), backend="cpu")) & ~keys).any()
    assert not (changed(lambda x: rk.span(x, k, backend="cpu")) & ~rows).any()
    assert not (changed(lambda x: rk.attention_lse(x, k, backend="cpu")) & ~rows).any()
    later = torch.arange(301) > row - 4
    assert not (changed(lambda x: rk.column_moments(x, k, lse, backend="cpu").kurtosis) & later).any()
    assert rk.waad(broken, k, lse, backend="cpu")[0, row].isnan() or bad == float("inf")
    # A broken key: only the rows that see it.
    broken_key = k.clone()
    broken_key[0, row] = bad
    before, after = rk.waad(q, k, lse, backend="cpu"), rk.waad(q, broken_key, lse, backend="cpu")
    assert torch.equal(before[0, :row], after[0, :row])
    assert torch.equal(before[0, row + 10 :], after[0, row + 10 :])


def test_extreme_logits(capability: str) -> None:
    """Logits of 1e4 saturate: all of a row's attention is on one key, and nothing overflows."""
    q, k = torch.randn(1, 200, 2, 16) * 100, torch.randn(1, 200, 1, 16) * 100
    waad = rk.waad(q, k, backend="cpu")
    want = reference.waad(q.double(), k.double())
    assert waad.isfinite().all()
    assert float((waad - want).abs().max()) < 2e-2  # float32 logits of 1e4 are known to 1e-3
    error = rk.attention_lse(q, k, backend="cpu") - reference.attention_lse(q.double(), k.double())
    assert float(error.abs().max()) < 2e-2


def test_what_the_machine_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    monkeypatch.setenv("RHYTHM_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match=r"RHYTHM_CPU_CAPABILITY must be one that .*, got sse9"):
        rk.waad(*inputs, backend="cpu")


def test_build_info() -> None:
    info = rk.build_info()
    assert info["available"] is True
    assert info["capability"] in CAPABILITIES
    assert info["threads"] == torch.get_num_threads()
    assert info["torch"].count(".") == 2
    assert info["compiler"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqs": [[0, 0, 31, 0]]}, r"seqs\[0\] must lie in q .*, end 31"),
        ({"seqs": [[2, 0, 30, 0]]}, r"seqs\[0\] must lie in q .*, got batch row 2"),
        ({"seqs": [[0, 9, 30, 3]]}, r"seqs\[0\] must lie in q .*, response_start 3"),
        ({"heads": [[4, 0]]}, r"heads\[0\] must be .*, got 4 and 0"),
        ({"heads": [[0, 4]]}, r"heads\[0\] must be .*, got 0 and 4"),
        ({"heads": []}, "heads must select at least one head, got none"),
    ],
)
def test_tables_out_of_range_are_refused(change: dict[str, list], message: str) -> None:
    """The door guarantees the tables; the kernels index with them, so the binding looks again."""
    q, k = torch.randn(2, 30, 4, 8), torch.randn(2, 30, 2, 8)
    lse = torch.zeros(2, 4, 30)
    tables = {"seqs": [[0, 0, 30, 0]], "heads": [[0, 0]]} | change
    seqs = torch.tensor(tables["seqs"], dtype=torch.int32).reshape(-1, 4)
    heads = torch.tensor(tables["heads"], dtype=torch.int32).reshape(-1, 2)
    with pytest.raises(RuntimeError, match=message):
        cpu.band_rows(q, k, lse, Rule(seqs, heads, 30, 1.0, 0.0, -1, None), 10, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seqlen": 31}, "max_seqlen must be from 0 to T, got 31"),
        ({"window_left": 31}, "window_left must be from 0 to T, got 31"),
        ({"lo": -1}, "lo must be from 0 to T, got -1"),
        ({"hi": 31}, "hi must be from 3 to T, got 31"),
        ({"hi": 2}, "hi must be from 3 to T, got 2"),
    ],
)
def test_distances_beyond_the_length_are_refused(change: dict[str, int], message: str) -> None:
    """The ops limit them; the kernels count in 32 bits, so the binding looks again."""
    q, k, lse, out = torch.randn(1, 30, 4, 8), torch.randn(1, 30, 2, 8), torch.zeros(1, 4, 30), torch.zeros(1, 30)
    seqs, heads = torch.tensor([[0, 0, 30, 0]], dtype=torch.int32), torch.tensor([[0, 0]], dtype=torch.int32)

    def call(max_seqlen: int = 30, window_left: int = 30, lo: int = 3, hi: int = 30) -> None:
        rule = Rule(seqs, heads, max_seqlen, 1.0, 0.0, window_left, None)
        extension.registered().band_columns(q, k, lse, *rule, lo, hi, False, out)

    call()
    with pytest.raises(RuntimeError, match=message):
        call(**change)

"""Every Triton pass against the dense float64 definition of the same rounded inputs, in canonical form."""

from __future__ import annotations

import pytest
import torch
import triton_cases as cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_cases import DEVICE, Case

import rhythm_kernels.backend.triton as rhythm_triton
from tests import bounds

CASES = {
    "plain": Case(),
    "one token": Case(length=1),
    "tile and one": Case(length=65, head_size=32),
    "grouped, a subset in its own order": Case(n_heads=6, kv_heads=2, heads=[4, 0, 3]),
    "multi-query": Case(n_heads=3, kv_heads=1),
    "padding on both sides": Case(batch=2, length=50, table=[(0, 7, 50, 7), (1, 0, 31, 0)]),
    "response": Case(batch=2, length=70, table=[(0, 3, 60, 41), (1, 0, 70, 70)]),
    "packed, with empty sequences": Case(
        length=90, table=[(0, 0, 33, 5), (0, 33, 33, 33), (0, 33, 34, 33), (0, 34, 88, 60), (0, 90, 90, 90)]
    ),
    "window": Case(length=70, window_left=13),
    "window below W": Case(length=45, window_left=4),
    "window of the row itself": Case(window_left=0),
    "softcap": Case(softcap=3.0),
    "wide softcap": Case(softcap=5000.0),
    "sinks": Case(n_heads=4, kv_heads=2, heads=[3, 1], with_sinks=True),
    "all rules": Case(
        batch=2, length=70, n_heads=4, kv_heads=2, heads=[2, 3], softcap=4.0, window_left=20, with_sinks=True,
        table=[(0, 10, 70, 20), (1, 0, 45, 1)],
    ),
    "bfloat16": Case(dtype=torch.bfloat16, head_size=64),
    "float16": Case(dtype=torch.float16, head_size=64),
    "head size 80": Case(head_size=80, dtype=torch.bfloat16),
    "head size 96": Case(head_size=96),
    "head size 112": Case(head_size=112, dtype=torch.float16),
    "head size 192": Case(head_size=192, length=20),
    "head size 256": Case(head_size=256, length=20),
    "head size 20": Case(head_size=20, dtype=torch.bfloat16),
    "head size 1": Case(head_size=1),
    "heads before tokens in memory": Case(n_heads=4, kv_heads=2, head_major=True, batch=2, length=37),
    "negative scale": Case(scale=-0.3),
    "long response": Case(length=150, n_heads=1),
}  # fmt: skip
WINDOW = 10


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Same shape, float32, contiguous, the same non-finite elements, and the rest within an absolute tolerance."""
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=0, equal_nan=True)


def check_band_rows(case: Case, window: int = WINDOW) -> None:
    want = case.dense(cases.waad(window))
    tolerance = bounds.waad(window)
    for per_head, expected in ((False, want.mean(1)), (True, want)):
        got = rhythm_triton.band_rows(**case.given(case.lse()), window=window, per_head=per_head)
        close(got, expected, tolerance)
        assert bool(((got >= 0) & (got <= window)).all())


def check_band_columns(case: Case, lo: int, hi: int) -> None:
    want = case.dense(cases.fai(lo, hi))
    for per_head, expected in ((False, want.mean(1)), (True, want)):
        got = rhythm_triton.band_columns(**case.given(case.lse()), lo=lo, hi=hi, per_head=per_head)
        close(got, expected, bounds.fai())


def check_row_stats(case: Case, window: int = WINDOW) -> None:
    lse, waad, span = (
        case.dense(cases.row_lse, float("-inf")), case.dense(cases.waad(window)), case.dense(cases.span)
    )  # fmt: skip
    largest = float(lse[lse.isfinite()].abs().max()) if bool(lse.isfinite().any()) else 0.0
    for per_head in (False, True):
        got = rhythm_triton.row_stats(**case.given(), window=window, per_head=per_head)
        close(got[0], lse, bounds.lse(largest))
        close(got[1], waad if per_head else waad.mean(1), bounds.waad(window))
        close(got[2], span if per_head else span.mean(1), bounds.span(case.length))


def check_column_stats(case: Case, min_distance: int) -> None:
    dense = torch.stack([case.dense(moment) for moment in cases.moments(min_distance)])
    for per_head, want in ((False, dense.mean(2)), (True, dense)):
        arguments = {**case.given(case.lse()), "min_distance": min_distance, "per_head": per_head}
        mean = rhythm_triton.column_stats(**arguments, moments=False)
        assert mean.shape[0] == 1
        close(mean[0], want[1], bounds.fai())
        got = rhythm_triton.column_stats(**arguments, moments=True)
        close(got[:2], want[:2], 1e-4)
        # Variance by itself, and the ratios where there is one that float32 attention weights can show.
        torch.testing.assert_close(got[2].double(), want[2], rtol=1e-3, atol=1e-9)
        spread = dense[2].amin(1) > 1e-9 if not per_head else dense[2] > 1e-9
        for ratio, expected in zip(got[3:], want[3:], strict=True):
            torch.testing.assert_close(ratio[spread].double(), expected[spread], rtol=1e-3, atol=1e-3)
            assert bool(torch.isfinite(ratio).all())
        assert bool((got[1:, want[0] == 0] == 0).all())


@pytest.mark.parametrize("min_distance", [0, 4, 33])
def test_column_stats(case: Case, min_distance: int) -> None:
    check_column_stats(case, min_distance)


def test_band_rows(case: Case) -> None:
    check_band_rows(case)


@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (3, 9), (10, 50)])
def test_band_columns(case: Case, lo: int, hi: int) -> None:
    check_band_columns(case, lo, hi)


def test_row_stats(case: Case) -> None:
    check_row_stats(case)


@pytest.mark.parametrize("window", [1, 2, 33, 70])
def test_any_window_of_waad(window: int) -> None:
    case = Case(length=70, table=[(0, 2, 69, 40)], heads=[1])
    want = case.dense(cases.waad(window))
    tolerance = bounds.waad(window)
    close(rhythm_triton.band_rows(**case.given(case.lse()), window=window, per_head=True), want, tolerance)
    close(rhythm_triton.row_stats(**case.given(), window=window, per_head=True)[1], want, tolerance)


@pytest.mark.parametrize(("lo", "hi"), [(0, 70), (69, 70), (70, 70)])
def test_any_horizon_of_fai(lo: int, hi: int) -> None:
    check_band_columns(Case(length=70), lo, hi)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """All features crossed: sequences with gaps and empty ones, grouped heads, subsets, rules, dtypes, layouts."""
    length = draw(st.integers(1, 80))
    table = []
    for row in range(draw(st.integers(1, 2))):
        cuts = sorted(draw(st.lists(st.integers(0, length), min_size=2, max_size=6)))
        for start, end in zip(cuts[::2], cuts[1::2], strict=False):
            table.append((row, start, end, draw(st.integers(start, end))))
    kv_heads = draw(st.integers(1, 2))
    n_heads = kv_heads * draw(st.integers(1, 3))
    return Case(
        length=length,
        batch=max(row for row, *_ in table) + 1,
        n_heads=n_heads,
        kv_heads=kv_heads,
        head_size=draw(st.sampled_from([1, 16, 17, 24, 32, 40, 80])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        table=table,
        heads=draw(st.lists(st.integers(0, n_heads - 1), min_size=1, max_size=n_heads, unique=True)),
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
        window_left=draw(st.sampled_from([-1, 0, 3, 17, 100])),
        with_sinks=draw(st.booleans()),
        head_major=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
        magnitude=draw(st.sampled_from([0.3, 1.5, 4.0])),
    )


def check_all(case: Case, window: int, lo: int, width: int) -> None:
    check_band_rows(case, window)
    check_band_columns(case, lo, lo + width)
    check_row_stats(case, window)
    check_column_stats(case, lo)


WINDOWS, LOWS, WIDTHS = st.sampled_from([1, 5, 10, 40, 100]), st.integers(0, 40), st.integers(0, 60)
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@given(random_cases(), WINDOWS, LOWS, WIDTHS)
@settings(max_examples=25, **SETTINGS)
def test_random_cases(case: Case, window: int, lo: int, width: int) -> None:
    check_all(case, window, lo, width)


@pytest.mark.long
@given(random_cases(), WINDOWS, LOWS, WIDTHS)
@settings(max_examples=400, **SETTINGS)
def test_many_random_cases(case: Case, window: int, lo: int, width: int) -> None:
    check_all(case, window, lo, width)


def test_any_number_and_order_of_heads() -> None:
    """Five heads on one kv head, in no order: each has programs of its own, and the mean is over them."""
    check_all(Case(length=20, n_heads=5, kv_heads=1, heads=[4, 0, 1, 2, 3], with_sinks=True), 10, 2, 9)


def test_no_sequences() -> None:
    case = Case(table=[])
    assert not rhythm_triton.band_rows(**case.given(case.lse()), window=3, per_head=False).any()
    assert not rhythm_triton.band_columns(**case.given(case.lse()), lo=1, hi=3, per_head=True).any()
    for moments in (False, True):
        arguments = {"min_distance": 4, "moments": moments, "per_head": False}
        assert not rhythm_triton.column_stats(**case.given(case.lse()), **arguments).any()
    lse, waad, span = rhythm_triton.row_stats(**case.given(), window=3, per_head=False)
    assert bool((lse == float("-inf")).all())
    assert not waad.any()
    assert not span.any()


def test_same_bits_every_time() -> None:
    case = Case(length=70, n_heads=4, kv_heads=2, dtype=torch.bfloat16)
    first = rhythm_triton.row_stats(**case.given(), window=WINDOW, per_head=False)
    for _ in range(3):
        for a, b in zip(first, rhythm_triton.row_stats(**case.given(), window=WINDOW, per_head=False), strict=True):
            assert torch.equal(a, b)


def test_any_strides_of_lse() -> None:
    """The head table's second column says which row of lse is meant; lse may be a strided view of fewer heads."""
    case = Case(n_heads=4, kv_heads=2, heads=[3, 1], length=45)
    lse = case.lse()[:, [1, 3]].transpose(1, 2).contiguous().transpose(1, 2)
    given_arguments = case.given(lse)
    table = torch.tensor([[3, 1], [1, 0]], dtype=torch.int32, device=DEVICE)
    given_arguments["rule"] = given_arguments["rule"]._replace(heads=table)
    got = rhythm_triton.band_rows(**given_arguments, window=WINDOW, per_head=True)
    close(got, case.dense(cases.waad(WINDOW)), bounds.waad(WINDOW))
    got = rhythm_triton.band_columns(**given_arguments, lo=2, hi=9, per_head=True)
    close(got, case.dense(cases.fai(2, 9)), bounds.fai())

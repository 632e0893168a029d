"""Every Triton pass on the quick cases, on those of its tiles, and on tables that public functions cannot make."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rhythm_kernels import ops, reference
from rhythm_kernels.canonical import canonical
from rhythm_kernels.rule import Rule

from .. import bounds
from ..cases import CASES, Case, check, close, close_moments, random_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"batch": 1, "heads": 2, "kv_heads": 1}
# Tiles of 32 tokens: their edges, whole tiles between two edges, and how rows of each type and size are loaded.
MORE = [
    Case("two tiles and one", **SMALL, length=65, dim=32),
    Case("several tiles of rows after the band", **SMALL, length=150, dim=8),
    Case("whole tiles between two edges", **SMALL, length=140, options={"window_size": (75, 0)}),
    Case("W over several tiles", **SMALL, window=70, length=110, options={"heads": [1]}),
    Case("head sizes 144 and 136", **SMALL, dim=144, value_dim=136, length=36),
    Case("float16, 64", **SMALL, dim=64, dtype=torch.float16, length=40),
    Case("bfloat16, 64", **SMALL, dim=64, dtype=torch.bfloat16, length=40),
    Case("float16, 80", batch=2, heads=2, kv_heads=1, dim=80, dtype=torch.float16, length=35, fused=True),
    Case("bfloat16, 112 and 80", **SMALL, dim=112, value_dim=80, dtype=torch.bfloat16, length=35, fused=True),
    Case("bfloat16, 20", **SMALL, dim=20, dtype=torch.bfloat16, length=40),
    Case("five heads on one, in no order", batch=1, length=20, heads=5, kv_heads=1, options={"heads": [4, 0, 1, 2, 3]},
         sinks=True, horizon=(2, 11), min_distance=2),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[] if c.quick else pytest.mark.long) for c in CASES]
)  # fmt: skip
def test_common_cases(case: Case) -> None:
    check(case, "triton", DEVICE)


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_cases_of_tiles(case: Case) -> None:
    check(case, "triton", DEVICE)


@pytest.mark.parametrize("seed", [500, *(pytest.param(s, marks=pytest.mark.long) for s in range(501, 506))])
def test_random_cases(seed: int) -> None:
    for case in random_cases(seed, 4 if seed == 500 else 8):
        try:
            check(case, "triton", DEVICE)
        except AssertionError as error:
            raise AssertionError(f"{case}") from error


def middle(**more: Any) -> Case:
    """Tokens 2 to 69 of 70, 40 and later the response."""
    return Case("middle", length=70, starts=(2,), ends=(69,), response=(40,), **SMALL, **more)


@pytest.mark.parametrize("window", [1, 2, 33, 70])
def test_any_window_of_waad(window: int) -> None:
    options = {"heads": [1], "per_head": True}
    check(middle(window=window, options=options), "triton", DEVICE, ("band_rows", "row_stats"))


@pytest.mark.parametrize("horizon", [(0, 0), (3, 9), (0, 70), (69, 70), (70, 70)])
@pytest.mark.parametrize("per_head", [False, True])
def test_any_horizon_of_fai(horizon: tuple[int, int], per_head: bool) -> None:
    case = Case("horizon", length=70, **SMALL, horizon=horizon, options={"per_head": per_head})
    check(case, "triton", DEVICE, ("band_columns",))


@pytest.mark.parametrize("min_distance", [0, 33])
@pytest.mark.parametrize("per_head", [False, True])
def test_any_distance_of_moments(min_distance: int, per_head: bool) -> None:
    case = middle(min_distance=min_distance, horizon=(min_distance, None), options={"per_head": per_head})
    check(case, "triton", DEVICE, ("column_stats",))


Table = list[tuple[int, int, int, int]]  # (row, start, end, response_start) of each sequence


def canonical_form(case: Case, table: Table) -> tuple[Tensor, Tensor, Rule]:
    """Of a padded case's tokens, cut into these sequences."""
    q, k, options = case.inputs(DEVICE)
    seqs = torch.tensor(table, dtype=torch.int32, device=DEVICE).reshape(-1, 4)
    rule = canonical(q, k, None, **options).rule
    longest = max((end - start for _, start, end, _ in table), default=0)
    return q, k, rule._replace(seqs=seqs, max_seqlen=longest)


def dense(measure: Callable[..., Any], case: Case, table: Table, empty: float = 0.0, **options: Any) -> Any:
    """The definition's measure of each sequence by itself, put together; `empty` where there is none."""
    q, k, given = case.inputs(DEVICE)
    parts = []
    for row, start, end, response in table:
        ends = {"seq_start": start, "seq_end": end, "response_start": response}
        if measure is reference.attention_lse:
            del ends["response_start"]
            given.pop("heads", None)
        ends = {name: torch.tensor([x], dtype=torch.int32, device=DEVICE) for name, x in ends.items()}
        found = measure(q[row : row + 1].double(), k[row : row + 1].double(), **given, **ends, **options)
        parts.append(found if isinstance(found, tuple) else (found,))
    results = []
    for field in zip(*parts):
        result = torch.full((case.batch, *field[0].shape[1:]), empty, dtype=torch.float64, device=DEVICE)
        for (row, start, end, _), part in zip(table, field):
            result[row, ..., start:end] = part[0, ..., start:end]
        results.append(result)
    return reference.ColumnMoments(*results) if measure is reference.column_moments else results[0]


def check_table(case: Case, table: Table, per_head: bool) -> None:
    """Every pass but attention, straight through the operators."""
    q, k, rule = canonical_form(case, table)
    every = dense(reference.attention_lse, case, table, float("nan"))
    lse = every.float()
    lo, hi = case.horizon
    waad = dense(reference.waad, case, table, window=case.window, per_head=per_head)
    close("band_rows", ops.band_rows(q, k, lse, *rule, case.window, per_head, "triton"), waad, bounds.waad(case.window))
    fai = dense(reference.fai, case, table, horizon=(lo, hi), per_head=per_head)
    close("band_columns", ops.band_columns(q, k, lse, *rule, lo, hi, per_head, "triton"), fai, bounds.fai())
    got = ops.row_stats(q, k, *rule, case.window, per_head, "triton")
    want = torch.full_like(every, float("-inf"))
    for row, _, end, response in table:
        want[row, :, response:end] = every[row, :, response:end]
    want = want[:, rule.heads[:, 0].long()]
    close("lse", got[0], want, bounds.lse(want))
    close("waad", got[1], waad, bounds.waad(case.window))
    close("span", got[2], dense(reference.span, case, table, per_head=per_head), bounds.span(case.length))
    moments, heads = (
        dense(reference.column_moments, case, table, min_distance=case.min_distance, per_head=x)
        for x in (per_head, True)
    )
    seen = bounds.seen(heads) if per_head else bounds.seen(heads).all(dim=-2)
    got = ops.column_stats(q, k, lse, *rule, case.min_distance, True, per_head, "triton")
    close_moments(reference.ColumnMoments(*got), moments, seen)
    [mean] = ops.column_stats(q, k, lse, *rule, case.min_distance, False, per_head, "triton")
    close("mean", mean, moments.mean, bounds.fai())


def test_several_sequences_a_row_with_gaps() -> None:
    table = [(0, 0, 33, 5), (0, 33, 33, 33), (0, 33, 34, 33), (0, 34, 88, 60), (0, 90, 90, 90), (1, 7, 31, 20)]
    case = Case("gaps", length=90, heads=2, kv_heads=1, horizon=(3, 20))
    for per_head in (False, True):
        check_table(case, table, per_head)


def random_tables(seed: int, n: int) -> Iterator[tuple[Case, Table]]:
    """Shapes and rules of the padded random cases, their rows cut into sequences with gaps and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    padded = (case for case in random_cases(seed, 8 * n) if case.lengths is None)
    for case, _ in zip(padded, range(n)):
        table = []
        for row in range(case.batch):
            cuts = torch.randint(case.length + 1, (6,), generator=generator).sort().values.tolist()
            for start, end in zip(cuts[::2], cuts[1::2]):
                table.append((row, start, end, int(torch.randint(start, end + 1, (), generator=generator))))
        lo, hi = case.horizon
        yield bare(case, (lo, lo + 20 if hi is None else hi)), table


def bare(case: Case, horizon: tuple[int, int]) -> Case:
    """Without what a table says; slopes of sequences would be a row for each of the table's."""
    slopes = "of heads" if case.slopes else ""
    options = {name: x for name, x in case.options.items() if name != "per_head"}
    return replace(case, options=options, slopes=slopes, horizon=horizon, starts=None, ends=None, response=None)


@pytest.mark.parametrize("seed", [40, *(pytest.param(s, marks=pytest.mark.long) for s in range(41, 48))])
def test_random_tables(seed: int) -> None:
    for i, (case, table) in enumerate(random_tables(seed, 8 if seed == 40 else 30)):
        try:
            check_table(case, table, per_head=i % 2 == 1)
        except AssertionError as error:
            raise AssertionError(f"{case} {table}") from error


def test_no_sequences() -> None:
    case = Case("nothing", **SMALL)
    q, k, rule = canonical_form(case, [])
    lse = torch.full((1, 2, case.length), float("nan"), device=DEVICE)
    assert not ops.band_rows(q, k, lse, *rule, 3, False, "triton").any()
    assert not ops.band_columns(q, k, lse, *rule, 1, 3, True, "triton").any()
    for moments in (False, True):
        assert not ops.column_stats(q, k, lse, *rule, 4, moments, False, "triton").any()
    lse, waad, span = ops.row_stats(q, k, *rule, 3, False, "triton")
    assert bool((lse == float("-inf")).all())
    assert not waad.any()
    assert not span.any()


def test_same_bits_every_time() -> None:
    case = Case("repeated", batch=1, length=70, dtype=torch.bfloat16)
    q, k, rule = canonical_form(case, [(0, 0, 70, 0)])
    first = ops.row_stats(q, k, *rule, 10, False, "triton")
    for _ in range(3):
        for a, b in zip(first, ops.row_stats(q, k, *rule, 10, False, "triton"), strict=True):
            assert torch.equal(a, b)


def test_any_strides_of_lse() -> None:
    """The head table's second column says which row of lse is meant; lse may be a strided view of fewer heads."""
    case, table = Case("fewer heads", batch=1, length=45, options={"heads": [3, 1]}), [(0, 0, 45, 0)]
    q, k, rule = canonical_form(case, table)
    lse = dense(reference.attention_lse, case, table).float()[:, [1, 3]].transpose(1, 2).contiguous().transpose(1, 2)
    rule = rule._replace(heads=torch.tensor([[3, 1], [1, 0]], dtype=torch.int32, device=DEVICE))
    got = ops.band_rows(q, k, lse, *rule, 10, True, "triton")
    close("band_rows", got, dense(reference.waad, case, table, window=10, per_head=True), bounds.waad(10))
    got = ops.band_columns(q, k, lse, *rule, 2, 9, True, "triton")
    close("band_columns", got, dense(reference.fai, case, table, horizon=(2, 9), per_head=True), bounds.fai())

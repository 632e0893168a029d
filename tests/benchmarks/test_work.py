"""The counting functions, against tensors and loops."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import ceilings
from benchmarks.problem import AttentionProblem, CreditProblem
from benchmarks.shapes import AttentionShape, CreditShape, ModelShape, shapes
from benchmarks.suites import SUITES, attention, probe
from benchmarks.work import pairs

CPU = torch.device("cpu")
SHAPE = AttentionShape(23, batch=2, heads=6, kv_heads=2, dim=8, dtype="bfloat16", window=4, lo=3, hi=9)


@pytest.mark.parametrize("length", [1, 2, 11, 60])
@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (0, 9), (10, 50), (0, None), (3, None), (70, 80)])
def test_pairs(length: int, lo: int, hi: int | None) -> None:
    top = length if hi is None else hi
    assert pairs(length, lo, hi) == sum(lo <= t - s <= top for t in range(length) for s in range(t + 1))


def test_bytes_are_those_of_the_tensors() -> None:
    p = AttentionProblem.draw(SHAPE, CPU)
    one = torch.empty(SHAPE.batch, SHAPE.length).nbytes
    q, k, v, lse = (x.nbytes for x in (p.q, p.k, p.v, p.lse))
    want = {
        "band_rows": q + k + lse + one,
        "band_columns": q + k + lse + one,
        "row_stats": q + k + lse + 2 * one,
        "column_stats": q + k + lse + one,
        "column_moments": q + k + lse + 5 * one,
        "attention": 2 * q + k + v + lse + 2 * one,
        "attention_backward": 4 * q + 2 * k + 2 * v + lse,  # q, out, its gradient, dq; k, v, dk, dv
    }
    assert {name: SUITES[name].work(SHAPE).bytes for name in want} == want
    assert attention.forward_work(SHAPE).bytes == 2 * q + k + v


def test_operations_are_those_of_loops() -> None:
    bands = {"band_rows": range(4), "band_columns": range(3, 10), "row_stats": range(23), "column_stats": range(23)}
    for name, distances in bands.items():
        dots = sum(t - s in distances for t in range(SHAPE.length) for s in range(t + 1))
        assert SUITES[name].work(SHAPE).flops == 2 * 8 * dots * 6 * 2, name
    assert SUITES["attention"].work(SHAPE).flops == 2 * SUITES["row_stats"].work(SHAPE).flops


def test_the_model() -> None:
    shape = shapes("probe", "cpu", "tiny")[0]
    assert isinstance(shape, ModelShape)
    model = SUITES["probe"].problem(shape, CPU).model
    matrices = [
        x for name, x in model.named_parameters() if x.dim() == 2 and "embed" not in name and "head" not in name
    ]
    assert probe.parameters(shape) == sum(x.numel() for x in matrices)
    assert SUITES["probe"].work(shape).bytes == sum(x.nbytes for x in matrices)


def test_credit_and_ceilings() -> None:
    p = CreditProblem.draw(CreditShape(3, 17), CPU)
    assert SUITES["credit"].work(p.shape).bytes == p.waad.nbytes + p.fai.nbytes + p.mask.nbytes + p.waad.nbytes
    assert 8 * ceilings.copy_floats(2**30) == 2**30

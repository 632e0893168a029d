"""The gate lets right results through and nothing else."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders import backward
from benchmarks.gate import WHOLE, AttentionGate, head_definition, tail_definition
from benchmarks.problem import AttentionProblem, attention_lse
from benchmarks.shapes import AttentionShape
from rhythm_kernels import reference

LONG = AttentionShape(WHOLE + 60, batch=2, heads=4, kv_heads=2, dim=8)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> AttentionProblem:
    return AttentionProblem.draw(LONG, CPU)


def test_the_log_sum_exp_is_that_of_the_definition(problem: AttentionProblem) -> None:
    want = reference.attention_lse(problem.q.double(), problem.k.double())
    torch.testing.assert_close(attention_lse(problem.q, problem.k, problem.v).double(), want, atol=1e-5, rtol=0)


def test_the_tail_is_that_of_the_dense_definition(problem: AttentionProblem) -> None:
    """The last rows, one kv head at a time, give what whole maps of all heads give."""
    first = LONG.length - 100
    whole = head_definition(problem, LONG.length)
    for name, found in tail_definition(problem, first, with_out=True).items():
        want = whole[name][:, first:] if name == "out" else whole[name][..., first:]
        torch.testing.assert_close(found, want, atol=1e-12, rtol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_definition_passes_and_a_late_error_does_not(problem: AttentionProblem) -> None:
    gate = AttentionGate(problem)
    right = {name: x.float() for name, x in head_definition(problem, LONG.length).items()}
    assert gate.error(right)[0] < 0.5
    for name, result in right.items():
        wrong = result.clone()
        last = wrong[:, -30] if name == "out" else wrong[..., -30]
        last += 0.02 * result.abs().max()
        error, where = gate.error({name: wrong})
        assert error > 1, f"{name} passed"
        assert where == f"{name} of the tail"


@pytest.mark.parametrize("length", [60, LONG.length])
def test_what_is_not_a_result_does_not_pass(length: int) -> None:
    problem = AttentionProblem.draw(AttentionShape(length, heads=2, kv_heads=1, dim=8), CPU)
    gate = AttentionGate(problem)
    assert gate.error({"waad": torch.full((1, length), float("nan"))})[0] > 1
    assert gate.error({"waad": torch.zeros(1, length)})[0] > 1
    assert gate.error({"fai": torch.zeros(1, length)})[0] > 1
    assert gate.error({"fai_full": torch.zeros(1, length)})[0] > 1
    assert gate.error({"waad": torch.zeros(2, length)})[0] > 1


@pytest.mark.parametrize("length", [60, LONG.length])
def test_gradients_at_both_ends(length: int) -> None:
    """The definition's gradients, by autograd through the dense float64 forward, pass; a late error does not."""
    problem = AttentionProblem.draw(AttentionShape(length, batch=2, heads=4, kv_heads=2, dim=8), CPU)
    inputs = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = reference.attention_with_rhythm(*inputs)[0]
    right = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, backward.upstream(problem).double())))
    gate = backward.BackwardGate(problem)
    assert gate.error(right)[0] < 1e-6
    for name, result in right.items():
        for token in (-1, -30):
            wrong = result.clone()
            wrong[:, token] += 0.02 * result.abs().max()
            error, where = gate.error({**right, name: wrong})
            assert error > 1 and where == f"{name} of the tail"
        assert gate.error({**right, name: torch.full_like(result, float("nan"))})[0] > 1
        assert gate.error({**right, name: result[:, 1:]})[0] > 1
    early = right["dq"].clone()
    early[:, 3] = 0
    assert gate.error({**right, "dq": early})[0] > 1

"""The CUDA credit kernel, run on the CPU, against the reference bit for bit, a block's threads in several orders."""

from __future__ import annotations

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rhythm_kernels import reference
from rhythm_kernels.backend import cuda
from rhythm_kernels.credit import rhythm_credit
from rhythm_kernels.ops import dispatch
from rhythm_kernels.rule import Choice
from rhythm_kernels.settings import CREDIT_MODES
from tests.credit_cases import credit_cases, many_tokens

from .emulated import KERNELS, ORDERS, SANITIZED, Emulated, build

_MODES = {"local": 0, "global": 1, "coupled": 2, "random": 3, "entropy": 3}
_CANARY = 64  # bytes on either side of what the kernel writes
_POINTER = ctypes.c_void_p


class CreditInputs(ctypes.Structure):
    """`rhythm::CreditInputs` of csrc/include/rhythm/credit.h."""

    _fields_ = (
        ("wide", ctypes.c_bool), ("waad", _POINTER), ("fai", _POINTER), ("score", _POINTER), ("mask", _POINTER),
        ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64),
        ("mode", ctypes.c_int), ("top", ctypes.c_double), ("neighbors", ctypes.c_int64), ("lowest", ctypes.c_bool),
        ("given_tau_waad", ctypes.c_bool), ("given_tau_delta", ctypes.c_bool),
        ("tau_waad", ctypes.c_double), ("tau_delta", ctypes.c_double),
        ("levels", ctypes.c_float * 6), ("out", _POINTER),
    )  # fmt: skip


@functools.cache
def library() -> Emulated:
    return Emulated(build([KERNELS / "credit.cu"], sanitize=SANITIZED))


def emulated_credit(
    waad: Tensor, fai: Tensor, score: Tensor | None, mask: Tensor, choice: Choice
) -> Tensor:  # fmt: skip
    """The `credit` of every backend."""
    mode, top, neighbors, bottom, tau_waad, tau_delta, levels = choice
    batch, tokens = mask.shape
    scratch, out = (
        torch.full((n + 2 * _CANARY,), 0xA5, dtype=torch.uint8) for n in (cuda._credit_scratch(waad), 4 * mask.numel())
    )
    inputs = CreditInputs(
        wide=waad.dtype == torch.float64, waad=waad.data_ptr(), fai=fai.data_ptr(),
        score=None if score is None else score.data_ptr(), mask=mask.data_ptr(),
        batch=batch, tokens=tokens, mode=_MODES[mode], top=top, neighbors=neighbors,
        lowest=bottom, given_tau_waad=tau_waad is not None, given_tau_delta=tau_delta is not None,
        tau_waad=tau_waad or 0.0, tau_delta=tau_delta or 0.0,
        levels=(ctypes.c_float * 6)(*levels), out=out.data_ptr() + _CANARY,
    )  # fmt: skip
    library().call("rhythm_cuda_credit", ctypes.byref(inputs), ctypes.c_void_p(scratch.data_ptr() + _CANARY), None)
    for written in (scratch, out):
        assert (written[:_CANARY] == 0xA5).all() and (written[-_CANARY:] == 0xA5).all()
    return out[_CANARY:-_CANARY].clone().view(torch.float32).view(batch, tokens)


def cuda_credit(*measures: Tensor, **options: Any) -> Tensor:
    """`rhythm_credit`, from the CUDA kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", lambda *_: "cuda")
        patch.setattr(dispatch, "_module", lambda _: SimpleNamespace(credit=emulated_credit, available=lambda _: ""))
        return rhythm_credit(*measures, **options)


@settings(max_examples=50 if SANITIZED else 200, deadline=None)
@given(credit_cases(), st.sampled_from(list(ORDERS)))
def test_the_bits_of_the_reference(case: tuple[Tensor, Tensor, Tensor, dict[str, Any], int], order: str) -> None:
    waad, fai, mask, options, seed = case
    library().set_order(order, seed)
    got, want = (
        credit(waad, fai, mask, generator=torch.Generator().manual_seed(seed), **options)
        for credit in (cuda_credit, reference.rhythm_credit)
    )
    assert torch.equal(got, want)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", [mode for mode in CREDIT_MODES if mode != "uniform"])
def test_more_tokens_than_a_block_takes_at_a_time(mode: str, order: str) -> None:
    """128 threads take 1,024 tokens at a time, 1,024 threads 8,192."""
    library().set_order(order, 3)
    for length, bottom in ((1100, True), (9000, False)):
        waad, fai, mask = many_tokens(length)
        got, want = (
            credit(waad, fai, mask, mode=mode, bottom=bottom, entropy=waad.flip(1), neighbors=5,
                   generator=torch.Generator().manual_seed(2))
            for credit in (cuda_credit, reference.rhythm_credit)
        )  # fmt: skip
        assert (want != 1).any()
        assert torch.equal(got, want)


def test_responses_of_different_lengths_in_one_launch() -> None:
    library().set_order("shuffled", 4)
    waad, fai, _ = (x.view(9, -1) for x in many_tokens(9 * 1500))
    lengths = torch.tensor([0, 1, 2, 3, 700, 1499, 1500, 31, 1025])
    mask = torch.arange(1500) < lengths[:, None]
    fai[6, 3], waad[5, 1499] = float("nan"), float("inf")  # the second outside of its response
    got = cuda_credit(waad, fai, mask)
    assert torch.equal(got, reference.rhythm_credit(waad, fai, mask))
    assert (got[6] == 1).all() and (got[5] != 1).any()

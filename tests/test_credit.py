"""Credit: a ten-token response worked by hand for every mode, the oracle, and the contract of the arguments."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import rhythm_kernels as rk
from rhythm_kernels import ops, reference
from rhythm_kernels.credit import rhythm_credit, shape_advantages
from rhythm_kernels.settings import CREDIT_MODES, SIGNS
from tests.credit_cases import credit_cases, many_tokens

# A response of ten tokens; m = ceil(0.4 * 10) = 4, k = 3.
#   t               0    1    2    3    4    5    6    7    8    9
WAAD = torch.tensor([[2.0, 8.0, 7.0, 1.0, 1.5, 9.0, 3.0, 2.5, 2.0, 4.0]])
# delta             6    1    6   .5  7.5    6   .5   .5    2    0    four largest: t = 4, then the 6s at 0, 2, 5
FAI = torch.tensor([[0.1, 0.4, 0.2, 0.9, 0.3, 0.0, 0.8, 0.7, 0.0, 0.0]])
# T_glob = {3, 6, 7, 1}. tau_waad = 2.5 (the fifth of 1 1.5 2 2 2.5 3 4 7 8 9), tau_delta = 6.
#   3: WAAD 1 <= 2.5, deltas before it 6 1 6: dominated; the tie of 0 and 2 goes to the later: intro 2
#   6: WAAD 3 > 2.5: stays an anchor.    7: WAAD 2.5, deltas before it 7.5 6 .5: dominated, intro 4
#   1: WAAD 8 > 2.5: stays an anchor.
MASK = torch.ones(1, 10, dtype=torch.bool)
BY_HAND = {
    "local": [1.5, 1.0, 1.5, 1.0, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0],
    "global": [1.0, 1.5, 1.0, 1.5, 1.0, 1.0, 1.5, 1.5, 1.0, 1.0],
    "coupled": [1.0, 1.5, 1.25, 1.25, 1.25, 1.0, 1.5, 1.25, 1.0, 1.0],
    "uniform": [1.0] * 10,
}
BACKENDS = [name for name in ("cpu", "torch") if not rk.backends()[name]]
CREDITS = {"oracle": reference.rhythm_credit} | {name: partial(rhythm_credit, backend=name) for name in BACKENDS}
IMPLEMENTATIONS = pytest.mark.parametrize("credit", CREDITS.values(), ids=list(CREDITS))


@IMPLEMENTATIONS
@pytest.mark.parametrize("mode", BY_HAND)
def test_ten_tokens_by_hand(credit, mode):
    gamma = credit(WAAD, FAI, MASK, mode=mode)
    assert gamma.dtype == torch.float32
    assert gamma.tolist() == [BY_HAND[mode]]


@IMPLEMENTATIONS
def test_ten_tokens_by_entropy(credit):
    entropy = torch.tensor([[0.1, 2.0, 0.3, 0.3, 0.2, 0.0, 1.0, 0.3, 0.3, 0.1]])  # 1, 6, then the earlier 0.3s: 2, 3
    gamma = credit(WAAD, FAI, MASK, mode="entropy", entropy=entropy)
    assert gamma.tolist() == [[1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.5, 1.0, 1.0, 1.0]]


@IMPLEMENTATIONS
def test_ten_tokens_bottom(credit):
    # FAI > 0: tokens 0 1 2 3 4 6 7; the lowest four of them: 0 (.1), 2 (.2), 4 (.3), 1 (.4).
    gamma = credit(WAAD, FAI, MASK, mode="global", bottom=True)
    assert gamma.tolist() == [[1.5, 1.5, 1.5, 1.0, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0]]
    # 0 has nothing before it; 1 and 2 have high WAAD; 4: WAAD 1.5, deltas before it 1 6 .5: dominated, intro 2.
    gamma = credit(WAAD, FAI, MASK, mode="coupled", bottom=True)
    assert gamma.tolist() == [[1.5, 1.5, 1.75, 1.0, 1.25, 1.0, 1.0, 1.0, 1.0, 1.0]]
    # The lowest four deltas: 9 (0), then the halves at 3, 6, 7.
    gamma = credit(WAAD, FAI, MASK, mode="local", bottom=True)
    assert gamma.tolist() == [[1.0, 1.0, 1.0, 1.5, 1.0, 1.0, 1.5, 1.5, 1.0, 1.5]]


@IMPLEMENTATIONS
def test_options_by_hand(credit):
    # alpha = 1 hands the whole bonus over; a threshold of 1 on WAAD leaves 3 as the only dominated token.
    gamma = credit(WAAD, FAI, MASK, gamma_amp=3.0, alpha=1.0, tau_waad=1.0)
    assert gamma.tolist() == [[1.0, 3.0, 3.0, 1.0, 1.0, 1.0, 3.0, 3.0, 1.0, 1.0]]
    # One neighbour: 3 still has the 6 of token 2 before it; 7 has only the .5 of token 6.
    gamma = credit(WAAD, FAI, MASK, neighbors=1)
    assert gamma.tolist() == [[1.0, 1.5, 1.25, 1.25, 1.0, 1.0, 1.5, 1.5, 1.0, 1.0]]
    # A lower threshold on delta lets 7 be dominated by its one neighbour.
    gamma = credit(WAAD, FAI, MASK, neighbors=1, tau_delta=0.5)
    assert gamma.tolist() == [[1.0, 1.5, 1.25, 1.25, 1.0, 1.0, 1.75, 1.25, 1.0, 1.0]]


@IMPLEMENTATIONS
def test_holes_are_closed_up(credit):
    """A response with a tool call in it is the same response as without."""
    mask = torch.zeros(1, 16, dtype=torch.long)
    mask[0, [2, 3, 4, 5, 9, 10, 11, 12, 13, 14]] = 1
    spread = torch.full((2, 1, 16), 100.0).masked_scatter(mask.bool(), torch.stack([WAAD, FAI]))
    gamma = credit(spread[0], spread[1], mask)
    assert gamma[mask.bool()].tolist() == BY_HAND["coupled"]
    assert (gamma[mask == 0] == 1).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("mode", CREDIT_MODES)
def test_broken_and_empty_responses_get_one(credit, mode):
    waad, fai, mask = WAAD.repeat(5, 1), FAI.repeat(5, 1), MASK.repeat(5, 1)
    waad[0, 3] = math.nan
    fai[1, 9] = math.inf
    mask[2] = False
    waad[3, 4], mask[3, 4] = math.nan, False  # outside the response: harmless
    gamma = credit(waad, fai, mask, mode=mode, entropy=fai.nan_to_num())
    assert (gamma[:3] == 1).all()
    if mode != "uniform":
        assert (gamma[3] != 1).any()
        assert (gamma[4] != 1).any()


@IMPLEMENTATIONS
def test_non_finite_entropy_gives_one(credit):
    entropy = torch.full_like(WAAD, math.nan)
    assert (credit(WAAD, FAI, MASK, mode="entropy", entropy=entropy) == 1).all()
    assert (credit(WAAD, FAI, MASK, mode="global", entropy=entropy) != 1).any()


@settings(max_examples=500, deadline=None)
@given(credit_cases())
def test_every_backend_gives_the_bits_of_the_oracle(case):
    waad, fai, mask, options, seed = case
    oracle, *others = (
        credit(waad, fai, mask, generator=torch.Generator().manual_seed(seed), **options) for credit in CREDITS.values()
    )
    assert (oracle[~mask] == 1).all()
    for name, gamma in zip(BACKENDS, others, strict=True):
        assert torch.equal(gamma, oracle), name


@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("mode", CREDIT_MODES)
def test_a_hundred_thousand_tokens(mode, bottom):
    waad, fai, mask = many_tokens(100_000)
    oracle, *others = (
        credit(waad, fai, mask, mode, bottom=bottom, entropy=waad.flip(1), generator=torch.Generator().manual_seed(2))
        for credit in CREDITS.values()
    )
    assert (oracle != 1).any() == (mode != "uniform")
    for name, gamma in zip(BACKENDS, others, strict=True):
        assert torch.equal(gamma, oracle), name


@IMPLEMENTATIONS
def test_a_given_threshold_has_the_precision_of_the_measures(credit):
    """0.1 as float32 is above 0.1: a token whose WAAD is that float32 is at a `tau_waad` of 0.1, not above it."""
    waad, fai = torch.tensor([[3.0, 0.1, 2.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    mask = torch.ones(1, 3)
    options = {"tau_waad": 0.1, "tau_delta": 1.0}
    assert credit(waad, fai, mask, **options).tolist() == [[1.25, 1.25, 1.0]]
    assert credit(waad.double(), fai, mask, **options).tolist() == [[1.0, 1.5, 1.0]]


@IMPLEMENTATIONS
def test_zero_and_minus_zero_are_a_tie(credit):
    entropy = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    gamma = credit(WAAD[:, :4], FAI[:, :4], MASK[:, :4], "entropy", top=0.5, entropy=entropy)
    assert gamma.tolist() == [[1.5, 1.5, 1.0, 1.0]]
    assert (credit(WAAD[:, :4], entropy, MASK[:, :4], "global") == 1).all()


@IMPLEMENTATIONS
def test_a_share_that_holds_no_token(credit):
    for mode in CREDIT_MODES:
        assert (credit(WAAD, FAI, MASK, mode, top=1e-12, entropy=FAI) == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["local", "global", "coupled", "random", "entropy"])
def test_opcheck(mode, backend):
    score = torch.rand(2, 10) if mode in ("random", "entropy") else None
    measures = WAAD.repeat(2, 1), FAI.repeat(2, 1), score, MASK.repeat(2, 1)
    opcheck(ops.credit, (*measures, mode, 1.5, 0.4, 0.5, 3, False, 2.0, None, backend))


def test_results_do_not_depend_on_threads():
    waad, fai, mask = torch.rand(33, 200), torch.rand(33, 200), torch.rand(33, 200) > 0.2
    alone, threads = rhythm_credit(waad, fai, mask), torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert torch.equal(rhythm_credit(waad, fai, mask), alone)
    finally:
        torch.set_num_threads(threads)


@IMPLEMENTATIONS
def test_strided_measures(credit):
    both = torch.stack([WAAD, FAI], dim=2)
    assert credit(both[..., 0], both[..., 1], MASK).tolist() == [BY_HAND["coupled"]]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99))
def test_random_draws_exactly_m_tokens(length, top, seed):
    mask = torch.arange(40) < length
    waad = torch.rand(3, 40)
    draws = [
        rhythm_credit(waad, waad, mask.expand(3, 40), "random", top=top, generator=torch.Generator().manual_seed(seed))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert (draws[0] > 1).sum(dim=1).tolist() == [math.ceil(top * length - 1e-9)] * 3


def test_random_draws_differ_between_calls():
    generator = torch.Generator().manual_seed(0)
    one, two = (rhythm_credit(WAAD, FAI, MASK, "random", top=0.5, generator=generator) for _ in range(2))
    assert not torch.equal(one, two)


def test_top_share_is_counted_in_double():
    """0.2 * 35 is 7.000000000000001 in double: the share is 7 tokens, not 8."""
    waad = torch.rand(1, 35)
    gamma = rhythm_credit(waad, waad + 1, torch.ones(1, 35), "global", top=0.2)
    assert (gamma > 1).sum() == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_precision(dtype):
    gamma = rhythm_credit(WAAD.to(dtype), FAI.to(dtype), MASK)
    assert gamma.dtype == torch.float32
    assert gamma.tolist() == [BY_HAND["coupled"]]


def test_gamma_is_detached():
    gamma = rhythm_credit(WAAD.requires_grad_(), FAI.clone().requires_grad_(), MASK)
    WAAD.requires_grad_(False)
    assert not gamma.requires_grad


def test_reads_nothing_back():
    """On a meta device no value can be read: the rule that CUDA graphs need."""
    waad, fai = WAAD.to("meta"), FAI.to("meta")
    for mode in CREDIT_MODES:
        gamma = rhythm_credit(waad, fai, MASK.to("meta"), mode=mode, entropy=fai)
        assert gamma.shape == (1, 10)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(rhythm_credit, fullgraph=True, backend="aot_eager")
    assert compiled(WAAD, FAI, MASK).tolist() == [BY_HAND["coupled"]]


def test_shape_advantages():
    gamma = torch.tensor([[1.0, 1.5, 1.25], [1.0, 1.5, 1.25], [1.5, 1.5, 1.5]])
    shaped = shape_advantages(torch.tensor([2.0, -2.0, 0.0]), gamma)
    assert shaped.tolist() == [[2.0, 3.0, 2.5], [-2.0, -3.0, -2.5], [0.0, 0.0, 0.0]]  # eq. 13: both signs
    per_token = torch.tensor([[2.0, -1.0, 4.0]])
    assert shape_advantages(per_token, gamma[:1]).tolist() == [[2.0, -1.5, 5.0]]
    assert not shape_advantages(per_token.requires_grad_(), gamma[:1]).requires_grad


@pytest.mark.parametrize(
    ("sign", "shaped"),
    [("both", [3.0, -3.0, 0.0]), ("positive", [3.0, -2.0, 0.0]), ("negative", [2.0, -3.0, 0.0])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_which_signs_are_shaped(sign, shaped, dtype):
    advantages = torch.tensor([2.0, -2.0, 0.0], dtype=dtype)
    gamma = torch.full((3, 2), 1.5)
    for of_each in (advantages, advantages[:, None].expand(3, 2)):
        assert shape_advantages(of_each, gamma, sign).tolist() == [[x, x] for x in shaped]
    assert shape_advantages(advantages, gamma, sign=sign).dtype == torch.promote_types(dtype, torch.float32)


def test_the_signs_meet_only_where_an_advantage_is_zero_or_not_a_number():
    """`positive` and `negative` between them shape each advantage once; NaN stays NaN and hides in neither."""
    advantages, gamma = torch.tensor([-math.inf, -1e-45, -0.0, 0.0, 1e-45, math.nan]), torch.full((6, 1), 2.0)
    positive, negative = (shape_advantages(advantages, gamma, sign) for sign in ("positive", "negative"))
    twice = shape_advantages(shape_advantages(advantages, gamma, "positive"), gamma, "negative")
    torch.testing.assert_close(twice, shape_advantages(advantages, gamma), rtol=0, atol=0, equal_nan=True)
    assert positive[1] == advantages[1]
    assert negative[4] == advantages[4]
    assert positive[5].isnan()
    assert negative[5].isnan()


@pytest.mark.parametrize("sign", SIGNS)
def test_gamma_of_one_changes_no_bit(sign):
    advantages = torch.randn(64)
    assert torch.equal(shape_advantages(advantages, torch.ones(64, 7), sign), advantages[:, None].expand(64, 7))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"mode": "coupling"}, ValueError, "mode must be one of local, global, coupled, .*, got 'coupling'"),
        ({"gamma_amp": 0}, ValueError, "gamma_amp must be above 0 and finite, got 0"),
        ({"gamma_amp": math.inf}, ValueError, "gamma_amp must be above 0 and finite, got inf"),
        ({"gamma_amp": 10**400}, ValueError, "gamma_amp must be a float, got a number beyond all of them"),
        ({"mode": np.array(["local", "global"])}, ValueError, "mode must be one of .*, got array"),
        ({"waad": WAAD.to(torch.float8_e4m3fn)}, TypeError, "waad must be floating point of .*, got torch.float8_e4m3"),
        (
            {"response_mask": MASK.to(torch.complex64)},
            TypeError,
            "response_mask must be bool, or 0 and 1, got torch.complex64",
        ),
        ({"gamma_amp": "2"}, TypeError, "gamma_amp must be a float, got str '2'"),
        ({"top": 0.0}, ValueError, "top must be above 0 and at most 1, got 0.0"),
        ({"top": 1.1}, ValueError, "top must be .*, got 1.1"),
        ({"top": math.nan}, ValueError, "top must be .*, got nan"),
        ({"alpha": -0.1}, ValueError, "alpha must be from 0 to 1, got -0.1"),
        ({"neighbors": 0}, ValueError, "neighbors must be at least 1, got 0"),
        ({"neighbors": 2.0}, TypeError, "neighbors must be an int, got float 2.0"),
        ({"tau_waad": "median"}, TypeError, "tau_waad must be a float, got str 'median'"),
        ({"tau_delta": math.nan}, ValueError, "tau_delta must be a number, got nan"),
        ({"mode": "entropy"}, ValueError, 'entropy must be .* for mode="entropy", got None'),
        (
            {"entropy": torch.zeros(1, 9)},
            ValueError,
            r"entropy must have the shape of waad, \(1, 10\), got shape \(1, 9\)",
        ),
        ({"bottom": "no"}, TypeError, "bottom must be a bool, got 'no'"),
        ({"backend": 3}, TypeError, "backend must be a str or None, got int"),
        ({"backend": "cublas"}, ValueError, "backend must be one of .*'torch'.* got 'cublas'"),
        ({"backend": "cuda"}, ValueError, "backend must be one that runs credit on cpu tensors, got 'cuda'"),
        ({"backend": "triton"}, ValueError, "backend must be one that runs credit .*, got 'triton': .*(no credit|GPU)"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"waad": WAAD[0]}, ValueError, r"waad must be \(B, T\) .*, got shape \(10,\)"),
        ({"waad": WAAD[:0]}, ValueError, r"waad must be .*, got shape \(0, 10\)"),
        ({"waad": WAAD.tolist()}, TypeError, "waad must be a torch.Tensor, got list"),
        ({"waad": WAAD.long()}, TypeError, "waad must be floating point .*, got torch.int64"),
        ({"fai": FAI[:, :9]}, ValueError, r"fai must .*, got shape \(1, 9\)"),
        ({"fai": FAI.to("meta")}, ValueError, "fai must be where waad is, on cpu, got one on meta"),
        ({"response_mask": MASK[0]}, ValueError, "response_mask must have the shape of waad"),
        ({"response_mask": MASK * 2}, ValueError, "response_mask must hold 0 and 1 only, got 2"),
    ],
)
def test_wrong_arguments_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        rhythm_credit(**{"waad": WAAD, "fai": FAI, "response_mask": MASK, **changed})


@pytest.mark.parametrize(
    ("advantages", "gamma", "error", "message"),
    [
        (torch.zeros(2), torch.ones(3, 4), ValueError, r"advantages must be .*, got shape \(2,\)"),
        (torch.zeros(3, 5), torch.ones(3, 4), ValueError, r"advantages must be .*, got shape \(3, 5\)"),
        (torch.zeros(3), torch.ones(3), ValueError, r"gamma must be \(B, T\), got shape \(3,\)"),
        (torch.zeros(3).long(), torch.ones(3, 4), TypeError, "advantages must be .*, got torch.int64"),
        (
            torch.zeros(3),
            torch.ones(3, 4).to(torch.float8_e4m3fn),
            TypeError,
            "gamma must be .*, got torch.float8_e4m3fn",
        ),
        ([0.0], torch.ones(1, 4), TypeError, "advantages must be a torch.Tensor, got list"),
        (
            torch.zeros(3),
            torch.ones(3, 4, device="meta"),
            ValueError,
            "advantages must be where gamma is, on meta, got one on cpu",
        ),
    ],
)
def test_wrong_advantages_are_named(advantages, gamma, error, message):
    with pytest.raises(error, match=message):
        shape_advantages(advantages, gamma)


def test_a_changing_factor_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    measures = torch.rand(2, 9), torch.rand(2, 9), torch.ones(2, 9)
    compiled = torch.compile(rhythm_credit, fullgraph=True, backend="aot_eager", dynamic=True)
    for gamma_amp in (1.5, 1.6, 1.75):
        got = compiled(*measures, gamma_amp=gamma_amp)
        torch.testing.assert_close(got, rhythm_credit(*measures, gamma_amp=gamma_amp))

"""The definitions themselves, against attention nobody here wrote and against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from rhythm_kernels import reference


def sdpa_maps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`(H, n, n)` out of torch's own attention: the output for one-hot values is the map."""
    n = q.shape[0]
    one_hot = torch.eye(n, dtype=q.dtype).expand(q.shape[1], n, n)
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return F.scaled_dot_product_attention(q.transpose(0, 1), keys.transpose(0, 1), one_hot, is_causal=True)


def test_maps_are_those_of_torch() -> None:
    q, k = torch.randn(33, 4, 8).double(), torch.randn(33, 2, 8).double()
    torch.testing.assert_close(reference.attention_maps(q, k), sdpa_maps(q, k), atol=1e-12, rtol=0)
    lse = reference.attention_lse(q[None], k[None])
    torch.testing.assert_close(reference.attention_maps(q, k, lse[0]), sdpa_maps(q, k), atol=1e-12, rtol=0)


def test_lse_with_window_softcap_and_sink_is_flex_attentions() -> None:
    q, k = torch.randn(1, 33, 2, 16), torch.randn(1, 33, 2, 16)

    def rule(score, b, h, t, s):
        score = 3.0 * torch.tanh(score / 3.0)
        return torch.where((t >= s) & (t - s <= 6), score, -float("inf"))

    heads_first = [x.transpose(1, 2) for x in (q, k, k)]
    _, aux = flex_attention(*heads_first, score_mod=rule, return_aux=AuxRequest(lse=True))
    ours = reference.attention_lse(q, k, window_size=(6, 0), softcap=3.0)
    torch.testing.assert_close(ours, aux.lse, atol=1e-5, rtol=1e-5)
    sinks = torch.tensor([0.5, -2.0])
    with_sink = reference.attention_lse(q, k, window_size=(6, 0), softcap=3.0, sinks=sinks)
    expected = torch.log(torch.exp(aux.lse) + torch.exp(sinks)[None, :, None])
    torch.testing.assert_close(with_sink, expected, atol=1e-5, rtol=1e-5)


def test_a_sink_takes_its_share_and_nothing_is_renormalised() -> None:
    q, k, sinks = torch.randn(9, 2, 4).double(), torch.randn(9, 2, 4).double(), torch.tensor([5.0, -1.0]).double()
    maps = reference.attention_maps(q, k, sinks=sinks)
    lse = reference.attention_lse(q[None], k[None], sinks=sinks)[0]
    torch.testing.assert_close(maps.sum(-1), 1 - torch.exp(sinks[:, None] - lse))


def hand_map() -> tuple[torch.Tensor, torch.Tensor]:
    """q, k of one head whose causal map is known: every row is uniform over its keys."""
    return torch.zeros(1, 5, 1, 4).double(), torch.randn(1, 5, 1, 4).double()


def test_hand_computed_measures_of_uniform_attention() -> None:
    q, k = hand_map()
    # Row t gives 1 / (t + 1) to each of its keys.
    waad = [0, 1 / 2, (1 + 2) / 3, (1 + 2 + 2) / 4, (1 + 2 + 2 + 2) / 5]
    torch.testing.assert_close(reference.waad(q, k, window=2)[0], torch.tensor(waad).double())
    span = [0, 1 / 2, 3 / 3, 6 / 4, 10 / 5]
    torch.testing.assert_close(reference.span(q, k)[0], torch.tensor(span).double())
    # T(s) = rows s + 1 .. s + 2, as far as there are any.
    fai = [(1 / 2 + 1 / 3) / 2, (1 / 3 + 1 / 4) / 2, (1 / 4 + 1 / 5) / 2, 1 / 5, 0]
    torch.testing.assert_close(reference.fai(q, k, horizon=(1, 2))[0], torch.tensor(fai).double())
    lse = [math.log(t + 1) for t in range(5)]
    torch.testing.assert_close(reference.attention_lse(q, k)[0, 0], torch.tensor(lse).double())
    moments = reference.column_moments(q, k, min_distance=2)
    received = torch.tensor([1 / 3, 1 / 4, 1 / 5]).double()  # by token 0, from rows 2, 3, 4
    assert moments.count[0].tolist() == [3, 2, 1, 0, 0]
    deviation = received - received.mean()
    m2, m3, m4 = (deviation.pow(p).mean() for p in (2, 3, 4))
    for name, want in (
        ("mean", received.mean()),
        ("variance", m2),
        ("skewness", m3 / m2**1.5),
        ("kurtosis", m4 / m2**2),
    ):
        torch.testing.assert_close(getattr(moments, name)[0, 0], want)
    assert moments.variance[0, 2] == 0 and moments.kurtosis[0, 2] == 0


def test_rows_count_for_the_response_alone_and_keys_for_the_prompt_too() -> None:
    q, k = hand_map()
    start = torch.tensor([3])
    torch.testing.assert_close(
        reference.waad(q, k, window=2, response_start=start)[0], torch.tensor([0, 0, 0, 5 / 4, 7 / 5]).double()
    )
    torch.testing.assert_close(
        reference.fai(q, k, horizon=(1, 9), response_start=start)[0], torch.tensor([0, 0, 0, 1 / 5, 0]).double()
    )


def test_padding_and_packing_are_the_sequences_alone() -> None:
    q, k = torch.randn(1, 40, 2, 8).double(), torch.randn(1, 40, 2, 8).double()
    alone = reference.waad(q[:, 5:31], k[:, 5:31])
    padded = reference.waad(q, k, seq_start=torch.tensor([5]), seq_end=torch.tensor([31]))
    torch.testing.assert_close(padded[:, 5:31], alone)
    assert padded[:, :5].abs().sum() == 0 and padded[:, 31:].abs().sum() == 0
    packed = reference.fai(q[0], k[0], cu_seqlens=torch.tensor([0, 13, 40]))
    torch.testing.assert_close(packed[:13], reference.fai(q[:, :13], k[:, :13])[0])
    torch.testing.assert_close(packed[13:], reference.fai(q[:, 13:], k[:, 13:])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_inputs_and_at_least_float32(dtype: torch.dtype) -> None:
    q = torch.randn(1, 9, 1, 4).to(dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert reference.waad(q, q).dtype == want
    assert reference.attention_lse(q, q).dtype == want


def test_autocast_changes_no_definition() -> None:
    q, v = torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8)
    plain = reference.waad(q, q), reference.attention_with_rhythm(q, q, v)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = reference.waad(q, q), reference.attention_with_rhythm(q, q, v)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, lowered))


def test_moments_of_a_column_whose_variance_vanishes_when_squared() -> None:
    """A of 1e-90 and less: its variance is a number, that squared is 0, and 0 by 0 is no kurtosis."""
    q, k = torch.ones(1, 30, 1, 1, dtype=torch.float64), torch.linspace(0, -400, 30, dtype=torch.float64)
    moments = reference.column_moments(q, k[None, :, None, None], softmax_scale=1.0)
    assert torch.stack(moments).isfinite().all()
    assert ((moments.variance > 0) & (moments.kurtosis == 0)).any()

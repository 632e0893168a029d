"""Responses and settings for the credit, which every backend answers with the bits of the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rhythm_kernels.settings import CREDIT_MODES

TIES = [0.0, -0.0, 0.125, 0.25, 0.5, 1.0, -0.5]  # few values: many ties, and FAI of 0 and below


@st.composite
def credit_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, dict[str, Any], int]:
    """WAAD, FAI, mask, keyword arguments and a seed: holes, ties, signed zeros, empty and broken responses."""
    batch, length = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3]) | st.integers(1, 40))
    value = st.sampled_from(TIES) if draw(st.booleans()) else st.floats(-1, 10, width=32)

    def tensor(of: st.SearchStrategy) -> Tensor:
        return torch.tensor(draw(st.lists(of, min_size=batch * length, max_size=batch * length))).view(batch, length)

    dtype = st.sampled_from([torch.float32] * 4 + [torch.float64, torch.float16])
    waad, fai, entropy = (tensor(value).to(draw(dtype)) for _ in range(3))
    mask = tensor(st.booleans()) | (torch.arange(batch)[:, None] == 0)
    for x in (waad, fai, entropy):
        if draw(st.integers(0, 5)) == 0:
            x[draw(st.integers(0, batch - 1)), draw(st.integers(0, length - 1))] = draw(
                st.sampled_from([math.nan, math.inf, -math.inf])
            )
    threshold = st.none() | st.sampled_from([-math.inf, 0.0, 0.1, 0.25, 1.0, 1e300, math.inf]) | st.floats(0, 2)
    options = {
        "mode": draw(st.sampled_from(CREDIT_MODES)),
        "gamma_amp": draw(st.sampled_from([0.5, 1.0, 1.5, 2.0]) | st.floats(0.1, 3)),
        "top": draw(st.sampled_from([1e-12, 1e-6, 0.2, 0.3, 0.4, 0.6, 1.0]) | st.floats(0.01, 1)),
        "alpha": draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)),
        "neighbors": draw(st.sampled_from([1, 3, 2**40]) | st.integers(1, 30)),
        "bottom": draw(st.booleans()),
        "tau_waad": draw(threshold),
        "tau_delta": draw(threshold),
        "entropy": entropy,
    }
    return waad, fai, mask, options, draw(st.integers(0, 1000))


def many_tokens(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """WAAD, FAI and mask of one long response: ties, holes, tokens that nobody looks at."""
    generator = torch.Generator().manual_seed(1)
    waad = (torch.rand(1, length, generator=generator) * 400).round() / 40
    fai = (torch.rand(1, length, generator=generator) * 1e4 - 1e3).round().clamp(min=0) / 1e5
    return waad, fai, torch.rand(1, length, generator=generator) > 0.1

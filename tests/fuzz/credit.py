"""Credit: what hypothesis draws, and gamma by eqs. 13 to 19 in NumPy, one response at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from rhythm_kernels.settings import CREDIT_MODES, SIGNS
from tests.fuzz.memory import LAYOUTS, laid_out

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CreditCase:
    lengths: tuple[int, ...]  # tokens of each response; the batch is as long as the longest, and 2 more
    holes: bool
    ties: bool  # measures of a few values only
    broken: str  # "", "nan" or "inf": one number of the first response
    broken_at: str  # of which measure
    dtypes: tuple[str, str, str]
    layouts: tuple[str, str, str, str]
    mode: str
    gamma_amp: float
    top: float
    alpha: float
    neighbors: int
    bottom: bool
    tau_waad: float | None
    tau_delta: float | None
    sign: str
    per_token: bool  # advantages (B, T), not (B,)
    seed: int

    @property
    def traits(self) -> set[str]:
        named = {
            "holes": self.holes,
            "ties": self.ties,
            "not finite": bool(self.broken),
            "an empty response": 0 in self.lengths,
            "strided": self.layouts != ("contiguous",) * 4,
            "bottom": self.bottom,
            "thresholds given": self.tau_waad is not None or self.tau_delta is not None,
            "coupled": self.mode == "coupled",
            "not float32": self.dtypes != ("float32",) * 3,
        }
        return {name for name, has in named.items() if has}

    @property
    def options(self) -> dict[str, Any]:
        names = ("mode", "gamma_amp", "top", "alpha", "neighbors", "bottom", "tau_waad", "tau_delta")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """WAAD, FAI, entropy and mask."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, length = len(self.lengths), max(self.lengths) + 2
        found = []
        for dtype, most in zip(self.dtypes, (10.0, 0.3, 4.0), strict=True):
            x = torch.rand(batch, length, generator=generator, dtype=torch.float64)
            x = ((x * 5).round() / 5 if self.ties else x) * most
            found.append(x.to(DTYPES[dtype]))
        waad, fai, entropy = found
        fai[torch.rand(batch, length, generator=generator) < 0.2] = 0.0
        chosen = torch.rand(batch, length, generator=generator)
        mask = torch.zeros(batch, length, dtype=torch.bool)
        for row, n in enumerate(self.lengths):
            room = chosen[row] if self.holes else torch.arange(length) + 0.0
            mask[row, room.argsort()[:n]] = True
        if self.broken and self.lengths[0]:
            at = int(mask[0].nonzero()[self.seed % self.lengths[0]])
            {"waad": waad, "fai": fai, "entropy": entropy}[self.broken_at][0, at] = float(self.broken)
        for x in (waad, fai, entropy):  # what lies outside of a response is nobody's
            x[~mask] = math.nan
        laid = [laid_out(x, layout) for x, layout in zip((waad, fai, entropy), self.layouts[:3], strict=True)]
        return laid[0], laid[1], laid[2], laid_out(mask, self.layouts[3])


@st.composite
def credit_cases(draw: st.DrawFn) -> CreditCase:
    yes, layout = st.booleans(), st.sampled_from(list(LAYOUTS))
    threshold = st.none() | st.sampled_from([0.0, 0.1, 2.0, 5.0, math.inf]) | st.floats(0, 10)
    strided = draw(yes)
    mode = st.sampled_from(["coupled", "coupled", "coupled", "coupled", *(x for x in CREDIT_MODES if x != "random")])
    dtype = st.sampled_from(["float32", "float32", *DTYPES])
    return CreditCase(
        lengths=tuple(draw(st.lists(st.integers(0, 6) | st.integers(0, 70), min_size=1, max_size=4))),
        holes=draw(yes),
        ties=draw(yes),
        broken=draw(st.sampled_from(["nan", "inf", "-inf"])) if draw(yes) and draw(yes) else "",
        broken_at=draw(st.sampled_from(["waad", "fai", "entropy"])),
        dtypes=draw(st.tuples(dtype, dtype, dtype)),
        layouts=draw(st.tuples(layout, layout, layout, layout)) if strided else ("contiguous",) * 4,
        mode=draw(mode),
        gamma_amp=draw(st.sampled_from([0.5, 1.0, 1.5, 2.0]) | st.floats(0.1, 3)),
        top=draw(st.sampled_from([1e-9, 0.2, 0.4, 0.6, 1.0]) | st.floats(0.01, 1)),
        alpha=draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)),
        neighbors=draw(st.sampled_from([1, 2, 3, 100])),
        bottom=draw(yes),
        tau_waad=draw(threshold),
        tau_delta=draw(threshold),
        sign=draw(st.sampled_from(SIGNS)),
        per_token=draw(yes),
        seed=draw(st.integers(0, 2**16)),
    )


def gamma(case: CreditCase, waad: Tensor, fai: Tensor, entropy: Tensor, mask: Tensor) -> np.ndarray:
    """`(B, T)`; measures are compared in float32, or in float64 where one of those that the mode has is float64."""
    measures = [waad, fai, entropy] if case.mode == "entropy" else [waad, fai]
    kind = np.float64 if any(x.dtype == torch.float64 for x in measures) else np.float32
    found = np.ones(tuple(mask.shape))
    for row in range(mask.shape[0]):
        tokens = np.flatnonzero(mask[row].numpy())
        one = [x[row].double().numpy().astype(kind)[tokens] for x in measures]
        if len(tokens) and case.mode != "uniform" and all(np.isfinite(x).all() for x in one):
            found[row, tokens] = _of_response(case, *one)
    return found


def _highest(x: np.ndarray, m: int, among: np.ndarray | None = None, lowest: bool = False) -> list[int]:
    places = np.arange(len(x)) if among is None else np.flatnonzero(among)
    order = np.argsort(x[places] if lowest else -x[places], kind="stable")  # ties: the earlier first
    return [int(i) for i in places[order[:m]]]


def _of_response(case: CreditCase, waad: np.ndarray, fai: np.ndarray, entropy: np.ndarray | None = None) -> np.ndarray:
    n = len(waad)
    m = math.ceil(case.top * n - 1e-9)
    delta = np.append(abs(waad[:-1] - waad[1:]), waad.dtype.type(0))
    share = np.zeros(n)
    if case.mode == "local":
        share[_highest(delta, m, lowest=case.bottom)] = 1
    elif case.mode == "entropy":
        assert entropy is not None
        share[_highest(entropy, m, lowest=case.bottom)] = 1
    else:
        if case.bottom:
            anchors = _highest(fai, m, among=fai > 0, lowest=True)
        else:
            anchors = [t for t in _highest(fai, m) if fai[t] != 0]
        share[anchors] = 1
    if case.mode != "coupled":
        return 1 + (case.gamma_amp - 1) * share
    local = _highest(delta, m)
    low = np.sort(waad)[(n - 1) // 2] if case.tau_waad is None else waad.dtype.type(case.tau_waad)
    if case.tau_delta is not None:
        steep = waad.dtype.type(case.tau_delta)
    else:
        steep = delta[local].min() if local else np.inf
    introduced = set()
    for t in anchors:
        before = range(max(0, t - case.neighbors), t)
        if len(before) and waad[t] <= low and max(delta[u] for u in before) >= steep:
            share[t] = 1 - case.alpha
            introduced.add(max(before, key=lambda u: (delta[u], u)))
    share[list(introduced)] += case.alpha
    return 1 + (case.gamma_amp - 1) * share


def shaped(advantages: Tensor, gamma: np.ndarray, sign: str) -> np.ndarray:
    """Eq. 13 for the advantages of a sign."""
    a = np.broadcast_to(advantages.double().numpy().reshape(len(gamma), -1), gamma.shape)
    scaled = {"both": a == a, "positive": a >= 0, "negative": a < 0}[sign]
    return np.where(scaled, a * gamma, a)

"""Gamma, eqs. 14 to 19 of arXiv 2510.13554v2, as loops over the tokens of a response."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..settings import RhythmSettings


def rhythm_credit(
    waad: Tensor,
    fai: Tensor,
    response_mask: Tensor,
    mode: str = RhythmSettings.mode,
    gamma_amp: float = RhythmSettings.gamma_amp,
    top: float = RhythmSettings.top,
    alpha: float = RhythmSettings.alpha,
    neighbors: int = RhythmSettings.neighbors,
    *,
    bottom: bool = False,
    entropy: Tensor | None = None,
    generator: torch.Generator | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """`gamma (B, T)` of eqs. 14 to 19, token by token: see :func:`rhythm_kernels.rhythm_credit`.

    Measures are compared in float32, or in float64 where one of them is; so are given thresholds. A draw belongs to
    the token it stands at, and gamma is computed in double and rounded once.
    """
    gamma = torch.ones(waad.shape, dtype=torch.float32, device=waad.device)
    draw = None
    if mode == "random":
        where = waad.device if generator is None else generator.device
        draw = torch.rand(waad.shape, dtype=torch.float32, generator=generator, device=where)
    for row in range(waad.shape[0]):
        tokens = [t for t in range(waad.shape[1]) if response_mask[row, t]]
        n, m = len(tokens), math.ceil(top * len(tokens) - 1e-9)
        measures = [waad, fai]
        if mode in ("entropy", "random"):
            choice = entropy if mode == "entropy" else draw
            assert choice is not None
            measures.append(choice)
        double = any(x.dtype == torch.float64 for x in measures)
        precision = torch.float64 if double else torch.float32
        widened = [x[row, tokens].to(precision) for x in measures]
        if n == 0 or not all(x.isfinite().all() for x in widened):
            continue
        delta = [*(widened[0][:-1] - widened[0][1:]).abs().tolist(), 0.0]  # eq. 14
        w, f, *rest = (x.tolist() for x in widened)
        everyone = range(n)
        heard = [t for t in everyone if f[t] > 0]
        t_loc = _top(delta, everyone, m, lowest=bottom and mode == "local")
        t_glob = _top(f, heard, m, lowest=bottom)

        bonus = [0.0] * n
        if mode == "local":  # eq. 15
            bonus = [float(t in t_loc) for t in everyone]
        elif mode == "global":  # eq. 17
            bonus = [float(t in t_glob) for t in everyone]
        elif mode in ("entropy", "random"):
            t_score = _top(rest[0], everyone, m, lowest=bottom and mode == "entropy")
            bonus = [float(t in t_score) for t in everyone]
        elif mode == "coupled":
            low = sorted(w)[(n - 1) // 2] if tau_waad is None else _rounded(tau_waad, precision)
            high = min((delta[t] for t in t_loc), default=math.inf)
            high = high if tau_delta is None else _rounded(tau_delta, precision)
            dominated, intros = set(), set()
            for t in t_glob:  # eq. 18
                before = range(max(0, t - neighbors), t)
                if len(before) > 0 and w[t] <= low and max(delta[u] for u in before) >= high:
                    dominated.add(t)
                    intros.add(max(before, key=lambda u: (delta[u], u)))
            for t in everyone:  # eq. 19
                bonus[t] += float(t in t_glob and t not in dominated)
                bonus[t] += (1 - alpha) * (t in dominated)
                bonus[t] += alpha * (t in intros)
        factors = [1 + (gamma_amp - 1) * b for b in bonus]
        gamma[row, tokens] = torch.tensor(factors, dtype=torch.float32, device=gamma.device)
    return gamma


def _rounded(threshold: float, precision: torch.dtype) -> float:
    """A given threshold as a measure of that precision would hold it: the one it is compared with."""
    return float(torch.tensor(threshold, dtype=precision, device="cpu"))


def _top(x: list[float], among: Iterable[int], m: int, *, lowest: bool) -> set[int]:
    """`TopQ`: the `m` highest (or lowest) of `x` among some tokens; ties go to the earlier."""
    return set(sorted(among, key=lambda t: (x[t] if lowest else -x[t], t))[:m])

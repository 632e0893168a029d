"""Measures, attention and its gradients in float64 NumPy, written from the paper's equations and shared with nobody.

Whole maps, one sequence at a time. Beside each value stands its `slack`: how far the value moves when every logit errs
by what float32 may err in it (`bounds.logit`). Nearly nothing for ordinary logits, it is what is left to ask of float32
where they are in the thousands. Arrays that end in `T` are those of the whole batch, 0 (`lse`: -inf) at tokens outside
of the responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tests import bounds


class Stretch(NamedTuple):
    """One sequence: tokens `start .. end - 1` of a batch row; its response begins at `first`."""

    batch_row: int
    start: int
    end: int
    first: int

    @property
    def live(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Inputs:
    """A case's numbers in float64: `q (B, T, H, D)`, `k (B, T, H_kv, D)`, `v (B, T, H_kv, D_v)`, `upstream` as out."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    upstream: np.ndarray
    stretches: list[Stretch]
    scale: float
    softcap: float
    left: int  # the sliding window: how many keys before itself a query sees; -1: all
    sinks: np.ndarray | None  # (H,)
    slopes: np.ndarray | None  # (stretches, H)
    computed: dict[object, Maps] = field(default_factory=dict, repr=False)


class Answer(NamedTuple):
    value: np.ndarray
    slack: np.ndarray


class Maps(NamedTuple):
    """Of the heads of one sequence of n tokens, `(H, n, n)`; the log-sum-exp `(H, n)`, the distance `(n, n)`."""

    weights: np.ndarray  # A
    error: np.ndarray  # of A
    lse: np.ndarray
    lse_error: np.ndarray
    slope: np.ndarray  # of the softcap
    slope_error: np.ndarray
    distance: np.ndarray  # t - s


def maps(p: Inputs, at: Stretch, heads: list[int], lse: np.ndarray | None = None) -> Maps:
    """The maps of these heads, computed once; with the given `lse (B, H, T)`, else with each row's own."""
    key = (at.batch_row, at.start, lse is None)
    if key not in p.computed:
        p.computed[key] = _maps(p, at, lse)
    *found, distance = p.computed[key]
    return Maps(*(x[heads] for x in found), distance)


def _maps(p: Inputs, at: Stretch, lse: np.ndarray | None) -> Maps:
    kv_group = p.q.shape[2] // p.k.shape[2]
    q = np.moveaxis(p.q[at.batch_row, at.live], 1, 0)
    k = np.moveaxis(p.k[at.batch_row, at.live].repeat(kv_group, 1), 1, 0)
    x = p.scale * (q @ k.swapaxes(1, 2))
    size = abs(p.scale) * (abs(q) @ abs(k).swapaxes(1, 2))
    slope, slope_error = np.ones_like(x), np.zeros_like(x)
    if p.softcap > 0:
        tanh = np.tanh(x / p.softcap)
        slope = 1 - tanh**2
        slope_error = np.minimum(1, 2 * bounds.logit(size) / p.softcap)
        x = p.softcap * tanh
        size = np.minimum(size, 2 * p.softcap) * slope + abs(x)
    n = at.end - at.start
    distance = np.arange(n)[:, None] - np.arange(n)
    if p.slopes is not None:
        bias = p.slopes[p.stretches.index(at)][:, None, None] * distance
        x, size = x - bias, size + abs(bias)
    seen = (distance >= 0) & ((p.left < 0) | (distance <= p.left))
    masked = np.where(seen, x, -np.inf)
    top = masked.max(-1)
    if p.sinks is not None:
        sink = p.sinks[:, None]
        top = np.maximum(top, sink)
    mass = np.exp(masked - top[..., None]).sum(-1)
    if p.sinks is not None:
        mass += np.exp(sink - top)
    own = top + np.log(mass)
    share = np.exp(masked - own[..., None])
    logit_error = bounds.logit(size)
    lse_error = (share * logit_error).sum(-1) + bounds.logit(0 * own)
    used = own if lse is None else lse[at.batch_row][:, at.live]
    weights = np.where(seen, np.exp(masked - used[..., None]), 0.0)
    off = 2 * (logit_error + lse_error[..., None])
    most = np.exp(np.minimum(masked - used[..., None] + off, 0.0))
    error = np.minimum(weights * np.expm1(np.minimum(off, 1.0)), 1.0) + np.where(off > 0.1, most, 0.0)
    return Maps(weights, error, own, lse_error, slope, slope_error, distance)


def _empty(p: Inputs, heads: list[int], fill: float = 0.0) -> Answer:
    shape = (p.q.shape[0], len(heads), p.q.shape[1])
    return Answer(np.full(shape, fill), np.zeros(shape))


def _write(answer: Answer, at: Stretch, value: np.ndarray, slack: np.ndarray) -> None:
    """Write the response's tokens; those of the prompt stay 0."""
    skip, tokens = at.first - at.start, slice(at.first, at.end)
    answer.value[at.batch_row, :, tokens] = value[:, skip:]
    answer.slack[at.batch_row, :, tokens] = slack[:, skip:]


def rows(p: Inputs, heads: list[int], window: int, lse: np.ndarray | None) -> dict[str, Answer]:
    """`lse`, `waad` (eq. 9), `span` (the summand of eq. 7) and `share`, what a sink leaves to the keys of each row."""
    found = {"waad": _empty(p, heads), "span": _empty(p, heads), "lse": _empty(p, heads, -np.inf)}
    found["share"] = _empty(p, heads)
    for at in p.stretches:
        if at.end <= at.start:
            continue
        m = maps(p, at, heads, lse)
        away = np.maximum(m.distance, 0)
        window_here = min(window, p.q.shape[1])  # backends limit W by T
        used = m.lse if lse is None else lse[at.batch_row][heads, at.live]
        # Backends compute W - sum A (W - d), so the rounding of a given lse counts W times.
        whole = (m.error.sum(-1) + (0 if lse is None else abs(np.nan_to_num(used)) * 2.0**-23)) * window_here
        keys = np.ones_like(m.lse) if p.sinks is None else -np.expm1(p.sinks[heads][:, None] - m.lse)
        _write(found["waad"], at, (m.weights * np.minimum(away, window)).sum(-1), whole)
        _write(found["span"], at, (m.weights * away).sum(-1), (m.error * away).sum(-1))
        _write(found["lse"], at, m.lse, m.lse_error)
        _write(found["share"], at, keys, 0 * keys)
    return found


def counted(at: Stretch, distance: np.ndarray, low: int, high: int | None) -> np.ndarray:
    """`(n, n)`: T(s) of eq. 10, response rows by their position alone, whatever a window hides from them."""
    response = np.arange(at.start, at.end)[:, None] >= at.first
    return response & (distance >= low) & ((high is None) | (distance <= (high or 0)))


def fai(p: Inputs, heads: list[int], horizon: tuple[int, int | None], lse: np.ndarray | None) -> Answer:
    """Eq. 10; `horizon[1]` None: to the sequence's end."""
    found = _empty(p, heads)
    for at in p.stretches:
        if at.end > at.start:
            m = maps(p, at, heads, lse)
            chosen = counted(at, m.distance, *horizon)
            number = np.maximum(chosen.sum(0), 1)
            value, slack = (np.where(chosen, x, 0.0).sum(1) / number for x in (m.weights, m.error))
            _write(found, at, value, slack)
    return found


def moments(p: Inputs, heads: list[int], nearest: int, lse: np.ndarray | None) -> dict[str, Answer]:
    """Count, mean, population variance, skewness and kurtosis of what each key gets from rows `t >= s + nearest` of R.

    The slack of the last two is infinite where the errors of A are not small beside its deviation.
    """
    names = ("count", "mean", "variance", "skewness", "kurtosis")
    found = {name: _empty(p, heads) for name in names}
    for at in p.stretches:
        if at.end <= at.start:
            continue
        m = maps(p, at, heads, lse)
        chosen = counted(at, m.distance, nearest, None)
        count = np.broadcast_to(chosen.sum(0), m.lse.shape).astype(float)
        number = np.maximum(count, 1)

        def mean(x: np.ndarray, chosen: np.ndarray = chosen, number: np.ndarray = number) -> np.ndarray:
            return np.where(chosen, x, 0.0).sum(1) / number

        first = mean(m.weights)
        from_mean = m.weights - first[:, None]
        many = count >= 2
        second = np.where(many, mean(from_mean**2), 0.0)
        deviation = np.where(second < 1e-60, 0.0, np.sqrt(second))  # float32's powers end before
        varied = deviation > 0
        unit = np.where(varied, deviation, 1.0)
        error = np.sqrt(mean(m.error**2))
        ratio = np.where(error > 0, error / np.where(varied, deviation, 1e-300), 0.0)
        skewness, kurtosis = (np.where(varied, mean((from_mean / unit[:, None]) ** power), 0.0) for power in (3, 4))
        lost = np.where(ratio > 0.01, np.inf, 0.0)
        ratio = np.minimum(ratio, 1.0)
        _write(found["count"], at, count, 0 * count)
        _write(found["mean"], at, first, mean(m.error))
        _write(found["variance"], at, second, np.where(many, 4 * deviation * error + 4 * error**2, 0.0))
        # Powers of a deviation: the largest has the longest lever, at most the square root of the count.
        lever = ratio * np.sqrt(number)
        _write(found["skewness"], at, skewness, 8 * lever * np.maximum(1, kurtosis) + lost)
        _write(found["kurtosis"], at, kurtosis, 16 * lever * np.maximum(1, kurtosis) + lost)
    return found


class Attention(NamedTuple):
    """`out (B, T, H, D_v)` and the gradients of `(out * upstream).sum()`, laid out as q, k and v.

    `size` of each is the sum of its terms' sizes, of which bounds are shares; `slack` what comes on top; `floor` what
    the terms come to where each is 1, for the smallest numbers of float16.
    """

    out: Answer
    out_size: np.ndarray
    gradients: dict[str, Answer]
    sizes: dict[str, np.ndarray]
    floors: dict[str, np.ndarray]


def attention(p: Inputs) -> Attention:
    heads = list(range(p.q.shape[2]))
    kv_group = len(heads) // p.k.shape[2]
    shape = (*p.q.shape[:3], p.v.shape[3])
    out, out_size = Answer(np.zeros(shape), np.zeros(shape)), np.zeros(shape)
    like = {"q": p.q, "k": p.k, "v": p.v}
    gradients = {name: Answer(np.zeros(x.shape), np.zeros(x.shape)) for name, x in like.items()}
    sizes, floors = ({name: np.zeros(x.shape) for name, x in like.items()} for _ in range(2))
    for at in p.stretches:
        if at.end <= at.start:
            continue
        m = maps(p, at, heads)
        for h in heads:
            mine, shared = (at.batch_row, at.live, h), (at.batch_row, at.live, h // kv_group)
            a, error, above = m.weights[h], m.error[h], p.upstream[mine]
            q, k, v = p.q[mine], p.k[shared], p.v[shared]
            out.value[mine], out.slack[mine], out_size[mine] = a @ v, error @ abs(v), a @ abs(v)
            product, terms = above @ v.T, abs(above) @ abs(v).T
            inner = (a * product).sum(-1, keepdims=True)
            slope = m.slope[h] * p.scale
            mean_terms = (a * terms).sum(-1, keepdims=True)
            of_size = a * (terms + mean_terms) * abs(p.scale)
            moved = error * (terms + mean_terms) + a * (error * terms).sum(-1, keepdims=True)
            moved = moved * abs(p.scale) + of_size * m.slope_error[h]
            ones = (m.distance >= 0).astype(float)
            layers = [
                (gradients["q"].value, gradients["k"].value, gradients["v"].value, a * (product - inner) * slope, a),
                (gradients["q"].slack, gradients["k"].slack, gradients["v"].slack, moved, error),
                (sizes["q"], sizes["k"], sizes["v"], of_size, a),
                (floors["q"], floors["k"], floors["v"], ones, ones),
            ]
            for i, (dq, dk, dv, of_logits, of_values) in enumerate(layers):
                sign = np.abs if i else np.asarray
                dq[mine] += of_logits @ sign(k)
                dk[shared] += of_logits.T @ sign(q)
                dv[shared] += of_values.T @ sign(above)
    return Attention(out, out_size, gradients, sizes, floors)

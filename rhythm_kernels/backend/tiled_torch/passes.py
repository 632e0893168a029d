"""The four passes without values in torch, tile by tile, on any device, in O(T) memory.

Nothing of size tokens x tokens is made: the largest temporary is one tile of logits, `(B, Hs, rows, keys)`, with
Hs selected heads. All arithmetic is float32, its products to the precision of float32 whatever torch's settings allow
(:func:`.tiles.product`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rule import RowStats, Rule
from ...sequences import token_table
from .score import known, logits, sink_mass, sink_peak, visible
from .tiles import KEY_TILE, add_to, host_max, host_min, ranges, row_tile, softmax_step

MOMENT_SCALE = 2.0**24


def _finish(per_head_result: Tensor, scored: Tensor, per_head: bool) -> Tensor:
    """`(..., B, Hs, T)`, made 0 outside R; with `per_head` as it is, else its mean over heads, `(..., B, T)`."""
    result = torch.where(scored[:, None], per_head_result, 0.0)
    return result if per_head else result.mean(dim=-2)


def band_rows(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, window: int, per_head: bool) -> Tensor:
    """WAAD (eq. 9) given `lse`, by the identity `W rowsum - sum over the last W keys of A (W - (t - s))`."""
    batch, length = q.shape[:2]
    tokens = token_table(rule.seqs, batch, length)
    heads = rule.heads[:, 0].long()
    out = q.new_empty((batch, len(heads), length), dtype=torch.float32)
    row_lse = known(lse, rule)  # (B, Hs, T)
    rowsum = torch.ones_like(row_lse)  # (B, Hs, T)
    if rule.sinks is not None:
        rowsum = 1 - torch.exp(rule.sinks[heads, None] - row_lse)
    reach = min(window - 1, rule.window_left) if rule.window_left >= 0 else window - 1
    # A tile of rows reads as many keys and `reach` more. For a narrow band few rows a tile are best, however few heads.
    step = min(row_tile(q, len(heads), KEY_TILE), max(128, reach))
    for rows in ranges(0, length, step):
        near = lost = torch.zeros((), device=q.device)  # (B, Hs, rows) from the first addition on
        for keys in ranges(max(0, rows[0] - reach), rows[1], KEY_TILE):
            mask, distance = visible(tokens, rows, keys, rule)
            x = logits(q, k, rows, keys, heads, tokens, distance, rule)  # (B, Hs, rows, keys)
            # Masked after the exponential: hidden keys stay 0 in rows whose lse is not finite.
            maps = torch.where(mask & (distance < window), torch.exp(x - row_lse[:, :, slice(*rows), None]), 0.0)
            near, lost = add_to(near, lost, (maps * (window - distance)).sum(dim=-1))
        out[:, :, slice(*rows)] = (window * rowsum[:, :, slice(*rows)] - near).clamp(0, window)
    return _finish(out, tokens.scored, per_head)


def band_columns(q: Tensor, k: Tensor, lse: Tensor, rule: Rule, lo: int, hi: int, per_head: bool) -> Tensor:
    """FAI (eq. 10) given `lse`: mean of `A[t, s]` over the rows `s + lo <= t <= min(end - 1, s + hi)`."""
    batch, length = q.shape[:2]
    tokens = token_table(rule.seqs, batch, length)
    heads = rule.heads[:, 0].long()
    row_lse = known(lse, rule)  # (B, Hs, T)
    position = torch.arange(length, device=q.device)  # (T,)
    last = torch.minimum(tokens.end - 1, position + hi)  # (B, T)
    count = (last - (position + lo) + 1).clamp(min=0)  # (B, T)
    reach = min(hi, rule.window_left) if rule.window_left >= 0 else hi  # rows farther away count, with A = 0
    out = q.new_zeros((batch, len(heads), length), dtype=torch.float32)
    for keys in ranges(0, length, KEY_TILE):
        received = lost = torch.zeros((), device=q.device)  # (B, Hs, keys) from the first addition on
        stop = min(keys[1] + reach, host_max(tokens.end[:, slice(*keys)], length))
        for rows in ranges(keys[0] + lo, stop, row_tile(q, len(heads), KEY_TILE)):
            mask, distance = visible(tokens, rows, keys, rule)
            mask = mask & (distance >= lo) & (distance <= hi)  # (B, 1, rows, keys)
            x = logits(q, k, rows, keys, heads, tokens, distance, rule)  # (B, Hs, rows, keys)
            maps = torch.where(mask, torch.exp(x - row_lse[:, :, slice(*rows), None]), 0.0)
            received, lost = add_to(received, lost, maps.sum(dim=2))
        out[:, :, slice(*keys)] = received
    return _finish(out / count.clamp(min=1)[:, None], tokens.scored, per_head)


def row_stats(q: Tensor, k: Tensor, rule: Rule, window: int, per_head: bool) -> RowStats:
    """Log-sum-exp, WAAD (eq. 9) and span (the summand of eq. 7) by an online softmax over tiles of keys."""
    batch, length = q.shape[:2]
    tokens = token_table(rule.seqs, batch, length)
    heads = rule.heads[:, 0].long()
    shape = (batch, len(heads), length)
    lse, waad, span = (q.new_empty(shape, dtype=torch.float32) for _ in range(3))
    for rows in ranges(0, length, row_tile(q, len(heads), KEY_TILE)):
        size = (batch, len(heads), rows[1] - rows[0])
        sink = None if rule.sinks is None else sink_peak(rule.sinks[heads, None]).expand(size)
        peak = lse.new_full(size, float("-inf")) if sink is None else sink
        # The mass, and the sums that WAAD and span are before they are divided by it; relative to the peak, of the keys
        # alone: a sink's mass, beside which they may vanish, joins last.
        sums = lost = lse.new_zeros((3, *size))  # (3, B, Hs, rows)
        start = host_min(tokens.start[:, slice(*rows)], 0)
        if rule.window_left >= 0:
            start = max(start, rows[0] - rule.window_left)
        for keys in ranges(max(start, 0), rows[1], KEY_TILE):
            mask, distance = visible(tokens, rows, keys, rule)
            x = logits(q, k, rows, keys, heads, tokens, distance, rule).masked_fill(~mask, float("-inf"))
            peak, decay, weights = softmax_step(peak, x, mask)
            away = distance.clamp(min=0).float()  # (rows, keys)
            tile_sums = [x.sum(dim=-1) for x in (weights, weights * away.clamp(max=window), weights * away)]
            sums, lost = add_to(sums * decay, lost * decay, torch.stack(tile_sums))
        total, near, far = sums
        if sink is not None:
            total = total + sink_mass(sink, peak)
        tile = (slice(None), slice(None), slice(*rows))
        # A live row sees itself, so total is 0 only if all its logits are -inf: then A is undefined, and NaN is right.
        # Rows outside the responses are overwritten below.
        lse[tile] = peak + torch.log(total)
        waad[tile] = (near / total).clamp(0, window)
        span[tile] = far / total
    lse = torch.where(tokens.scored[:, None], lse, float("-inf"))
    return RowStats(lse, _finish(waad, tokens.scored, per_head), _finish(span, tokens.scored, per_head))


def column_stats(
    q: Tensor, k: Tensor, lse: Tensor, rule: Rule, min_distance: int, moments: bool, per_head: bool
) -> Tensor:  # fmt: skip
    """Moments of `A[t, s]` over the rows `t >= s + min_distance` of R, `(1 or 5, B, [Hs,] T)`.

    Central moments are merged tile by tile (Chan, Golub and LeVeque; Pébay for the third and fourth): power sums
    would cancel. They are taken of `A 2^24`: the fourth power of a deviation of 1e-10 leaves float32's range.
    """
    batch, length = q.shape[:2]
    tokens = token_table(rule.seqs, batch, length)
    heads = rule.heads[:, 0].long()
    row_lse = known(lse, rule)  # (B, Hs, T)
    results = q.new_zeros((5 if moments else 1, batch, len(heads), length), dtype=torch.float32)
    for keys in ranges(0, length, KEY_TILE):
        state = results.new_zeros((6, batch, len(heads), keys[1] - keys[0]))  # what :func:`_merge` keeps
        # Rows from `seen_to` on see no key of the tile: their A is 0 whatever their lse, and they are only counted.
        seen_to = keys[1] + rule.window_left if rule.window_left >= 0 else length
        stop = min(host_max(tokens.end[:, slice(*keys)], length), seen_to)
        for rows in ranges(keys[0] + min_distance, stop, row_tile(q, len(heads), KEY_TILE)):
            mask, distance = visible(tokens, rows, keys, rule)
            counted, _ = visible(tokens, rows, keys, rule, sliding=False)
            counted = counted & (distance >= min_distance) & tokens.scored[:, None, slice(*rows), None]
            x = logits(q, k, rows, keys, heads, tokens, distance, rule)  # (B, Hs, rows, keys)
            maps = torch.where(mask & counted, torch.exp(x - row_lse[:, :, slice(*rows), None]), 0.0)
            maps = maps * MOMENT_SCALE
            state = _merge(state, _tile_moments(maps, counted, moments), moments)
        if rule.window_left >= 0:
            first = torch.arange(*keys, device=q.device) + min_distance  # (keys,), the first row that counts
            hidden = (tokens.end[:, slice(*keys)] - first.clamp(min=stop)).clamp(min=0).float()  # (B, keys)
            zeros = torch.zeros_like(state[:5])
            zeros[0] = hidden[:, None]
            seen, mean, lost = state[0], state[1], state[5]
            state = _merge(state, zeros, moments)
            # Zeros only shrink the mean, to seen / all of it. `_merge` subtracts nearly all of it, which would cancel.
            share = seen / state[0].clamp(min=1)
            state[1], state[5] = mean * share, lost * share
        results[..., slice(*keys)] = _standardise(state) if moments else state[1:2] / MOMENT_SCALE
    return _finish(results, tokens.scored, per_head)


def _tile_moments(maps: Tensor, counted: Tensor, moments: bool) -> Tensor:
    """Count, mean and the sums of second to fourth powers of the deviations of one tile, `(5, B, Hs, keys)`.

    maps: `(B, Hs, rows, keys)`, 0 where `counted`, `(B, 1, rows, keys)`, is not.
    """
    count = counted.sum(dim=2).float().expand(maps.shape[0], maps.shape[1], -1)
    mean = maps.sum(dim=2) / count.clamp(min=1)
    if not moments:
        zero = torch.zeros_like(mean)
        return torch.stack([count, mean, zero, zero, zero])
    central = torch.where(counted, maps - mean[:, :, None], 0.0)
    square = central * central
    return torch.stack([count, mean, square.sum(dim=2), (square * central).sum(dim=2), (square * square).sum(dim=2)])


def _merge(a: Tensor, b: Tensor, moments: bool) -> Tensor:
    """Moments of the union of two disjoint sets of rows, `(6, B, Hs, keys)`.

    `a (6, ..)` is the union so far: count, mean, the sums of second to fourth powers, and by how much
    roundings have made the mean too large. `b (5, ..)` has no such sixth.
    """
    n_a, mean_a, m2_a, m3_a, m4_a, lost = a
    n_b, mean_b, m2_b, m3_b, m4_b = b
    n = n_a + n_b
    safe = n.clamp(min=1)
    delta = mean_b - mean_a + lost
    share_a, share_b = n_a / safe, n_b / safe
    mean, lost = add_to(mean_a, lost, delta * share_b)
    if not moments:
        return torch.stack([n, mean, m2_a, m3_a, m4_a, lost])
    between = n_a * share_b
    m2 = m2_a + m2_b + delta**2 * between
    m3 = m3_a + m3_b + delta**3 * between * (share_a - share_b) + 3 * delta * (share_a * m2_b - share_b * m2_a)
    m4 = (
        m4_a
        + m4_b
        + delta**4 * between * (share_a**2 - share_a * share_b + share_b**2)
        + 6 * delta**2 * (share_a**2 * m2_b + share_b**2 * m2_a)
        + 4 * delta * (share_a * m3_b - share_b * m3_a)
    )
    return torch.stack([n, mean, m2, m3, m4, lost])


def _standardise(state: Tensor) -> Tensor:
    """Count, mean, population variance, skewness and kurtosis, `(5, B, Hs, keys)`; 0 where they are not defined."""
    count, mean, m2, m3, m4, _ = state
    safe = count.clamp(min=1)
    variance = m2 / safe
    spread = (variance != 0) & (count >= 2)
    unit = torch.where(spread, variance, 1.0)
    skewness = torch.where(spread, m3 / safe / unit / unit.sqrt(), 0.0)
    kurtosis = torch.where(spread, m4 / safe / unit / unit, 0.0)
    mean = mean / MOMENT_SCALE
    variance = torch.where(count >= 2, variance / MOMENT_SCALE / MOMENT_SCALE, 0.0)
    return torch.stack([count, mean, variance, skewness, kurtosis])

"""Causal attention and its gradient in torch, tile by tile, for every score rule; O(T) memory.

Where torch's own CPU flash attention has the rule, its forward is used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...rule import Rule
from ...sequences import token_table
from .score import logit_and_slope, logits, of_flash, sink_mass, sink_peak, visible
from .tiles import (
    KEY_TILE,
    add_to,
    exactly,
    host_min,
    product,
    product_of_seen,
    products,
    ranges,
    row_tile,
    softmax_step,
)


def forward(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """`out (B, T, H, D_v)` in v's dtype and `lse (B, H, T)` float32; rows outside every sequence are 0 and -inf."""
    if q.device.type == "cpu" and of_flash(rule) and v.shape[3] == q.shape[3]:
        return _flash_cpu(q, k, v, rule)
    return _tiled(q, k, v, rule)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    batch, length, n_heads, _ = q.shape
    table = rule.seqs.tolist()
    if length > 0 and [x[:3] for x in table] == [[b, 0, length] for b in range(batch)]:
        return _flash_whole(q, k, v, rule)  # in one call, and without a copy
    out = q.new_zeros((batch, length, n_heads, v.shape[3]))
    lse = q.new_full((batch, n_heads, length), float("-inf"), dtype=torch.float32)
    for b, start, end, _ in table:
        if end > start:
            live = slice(start, end)
            part = (slice(b, b + 1), live)
            part_out, part_lse = _flash_whole(q[part], k[part], v[part], rule)
            out[b, live], lse[b, :, live] = part_out[0], part_lse[0]
    return out, lse


def _flash_whole(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """`forward` of batch rows that are one sequence each, from end to end, by torch's operator."""
    kv_group_size = q.shape[2] // k.shape[2]
    # The operator gives its output the strides of q, and writes it wrongly where parts of q overlap.
    if any(n > 1 and stride <= 1 for n, stride in zip(q.shape[:3], q.stride()[:3])):
        q = q.contiguous()
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or H_kv, T, D)
    if kv_group_size > 1:
        key, value = (x.repeat_interleave(kv_group_size, dim=1) for x in (key, value))
    if q.dtype == torch.float32:
        query, key, value = exactly(query, key, value)
    # It takes the head dimension to be contiguous (pytorch#187506): `ops.dispatch.run` has seen to that.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(query, key, value, 0.0, True, scale=rule.scale)  # (B, H, T, D), (B, H, T)
    out, lse = out.transpose(1, 2).to(q.dtype).contiguous(), lse.float().contiguous()
    # Where all logits of a row are NaN or -inf, it gives an output and an lse of 0: such rows are computed again.
    doubt = (lse == 0) | ~lse.isfinite()  # (B, H, T)
    for b in doubt.any(dim=2).any(dim=1).nonzero()[:, 0].tolist() if bool(doubt.any()) else ():
        until = slice(0, 1 + int(doubt[b].any(dim=0).nonzero()[-1]))
        whole = rule._replace(seqs=torch.tensor([[0, 0, until.stop, 0]]))
        part = (slice(b, b + 1), until)
        again, lse_again = _tiled(q[part], k[part], v[part], whole)
        again_at = doubt[b, :, until]  # (H, T up to there)
        out[b, until] = torch.where(again_at.T[..., None], again[0], out[b, until])
        lse[b, :, until] = torch.where(again_at, lse_again[0], lse[b, :, until])
    return out, lse


def _tiled(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    batch, length, n_heads, _ = q.shape
    tokens = token_table(rule.seqs, batch, length)
    heads = torch.arange(n_heads, device=q.device)  # (H,)
    value_heads = heads // (n_heads // v.shape[2])  # (H,), the kv head of each
    out = q.new_zeros((batch, length, n_heads, v.shape[3]))
    lse = q.new_full((batch, n_heads, length), float("-inf"), dtype=torch.float32)
    for rows in ranges(0, length, row_tile(q, n_heads, KEY_TILE)):
        size = (batch, n_heads, rows[1] - rows[0])  # of peak, total and their like: (B, H, rows)
        sink = None if rule.sinks is None else sink_peak(rule.sinks)[:, None].expand(size)
        peak = lse.new_full(size, float("-inf")) if sink is None else sink
        total = lost = lse.new_zeros(size)  # of the keys alone: a sink's mass, beside which they may vanish, joins last
        mixed = mixed_lost = lse.new_zeros((*size, v.shape[3]))  # (B, H, rows, D_v)
        for keys in ranges(_first_key(tokens.start, rows, rule), rows[1], KEY_TILE):
            mask, distance = visible(tokens, rows, keys, rule)
            x = logits(q, k, rows, keys, heads, tokens, distance, rule).masked_fill(~mask, float("-inf"))
            peak, decay, weights = softmax_step(peak, x, mask)  # (B, H, rows), the same, (B, H, rows, keys)
            values = v[:, slice(*keys)].index_select(2, value_heads).float().transpose(1, 2)  # (B, H, keys, D_v)
            total, lost = add_to(total * decay, lost * decay, weights.sum(dim=-1))
            decay = decay[..., None]
            mixed, mixed_lost = add_to(mixed * decay, mixed_lost * decay, product_of_seen(weights, values, mask))
        if sink is not None:
            total = total + sink_mass(sink, peak)
        live = (tokens.end[:, slice(*rows)] > tokens.start[:, slice(*rows)])[:, None]  # (B, 1, rows)
        result = torch.where(live[..., None], mixed / total[..., None], 0.0)
        out[:, slice(*rows)] = result.transpose(1, 2).to(out.dtype)
        lse[:, :, slice(*rows)] = torch.where(live, peak + torch.log(total), float("-inf"))
    return out, lse


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `out` with respect to q, k, v: A is computed again from `lse`, a tile at a time.

    With `P = exp(x - lse)`: `dV = P^T dO`, `dx = P (dO V^T - rowsum(dO out))`; the softcap contributes its slope
    `1 - (x / softcap)^2`. A sink is a column without a value: it changes `lse` and nothing else here.
    """
    batch, length, n_heads, dim = q.shape
    tokens = token_table(rule.seqs, batch, length)
    heads = torch.arange(n_heads, device=q.device)
    kv_heads = heads // (n_heads // k.shape[2])
    dq = q.new_zeros(q.shape, dtype=torch.float32)
    dk = k.new_zeros((batch, length, n_heads, dim), dtype=torch.float32)
    dv = v.new_zeros((batch, length, n_heads, v.shape[3]), dtype=torch.float32)
    for rows in ranges(0, length, row_tile(q, n_heads, KEY_TILE)):
        queries = q[:, slice(*rows)].float().transpose(1, 2)  # (B, H, rows, D)
        upstream = grad_out[:, slice(*rows)].float().transpose(1, 2)  # (B, H, rows, D_v)
        inner = (upstream * out[:, slice(*rows)].float().transpose(1, 2)).sum(dim=-1, keepdim=True)  # (B, H, rows, 1)
        for keys in ranges(_first_key(tokens.start, rows, rule), rows[1], KEY_TILE):
            mask, distance = visible(tokens, rows, keys, rule)
            sequence = tokens.sequence[:, slice(*rows)]  # (B, rows)
            # x, slope, weights and dx: (B, H, rows, keys)
            x, slope = logit_and_slope(products(q, k, rows, keys, heads), distance, heads, sequence, rule)
            weights = torch.where(mask, torch.exp(x - lse[:, :, slice(*rows), None]), 0.0)
            values = v[:, slice(*keys)].index_select(2, kv_heads).float().transpose(1, 2)  # (B, H, keys, D_v)
            dx = weights * (product(upstream, values.transpose(-1, -2)) - inner)
            dx = dx if slope is None else dx * slope
            dx = torch.where(mask, dx, 0.0) * rule.scale
            keys_of_heads = k[:, slice(*keys)].index_select(2, kv_heads).float().transpose(1, 2)  # (B, H, keys, D)
            dq[:, slice(*rows)] += product_of_seen(dx, keys_of_heads, mask).transpose(1, 2)
            seen_by = mask.transpose(-1, -2)  # (B, 1, keys, rows)
            dk[:, slice(*keys)] += product_of_seen(dx.transpose(-1, -2), queries, seen_by).transpose(1, 2)
            dv[:, slice(*keys)] += product_of_seen(weights.transpose(-1, -2), upstream, seen_by).transpose(1, 2)
    dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(dim=3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _first_key(start: Tensor, rows: tuple[int, int], rule: Rule) -> int:
    """No row of the tile sees a key before this one."""
    first = host_min(start[:, slice(*rows)], 0)
    return max(first, rows[0] - rule.window_left, 0) if rule.window_left >= 0 else first

"""From what a forward pass was given (mask, positions, packing) to the live ranges of its sequences.

The ranges come from the two-dimensional inputs of the model's forward, never from a `(T, T)` mask. What a layer was
then given as its mask is checked at a few rows against them, because transformers decides there whether a packing or a
sliding window really takes effect: O(T) work that turns silent misunderstandings into errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_CHECKED_SEQUENCES = 16


@dataclass
class ForwardInputs:
    """What the model's forward was given, as far as it decides which token sees which.

    `attention_mask` is `(B, T)` bool or None; `position_ids` `(B, T)` or None; `cu_seqlens` int `(S + 1,)` or None.
    `packs_positions`: whether the model may have told packed sequences by `position_ids` alone.
    """

    batch: int
    length: int
    device: torch.device
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    packs_positions: bool = True


@dataclass
class Sequences:
    """The sequences of one forward and the arguments by which the measures are told of them.

    Attributes:
        bounds: `(S, 3)` int64 `(row, start, end)` of the live sequences, in the `(B, T)` layout.
        packed: whether q and k are handed over flattened to `(B * T, H, D)`, with `cu_seqlens`.
        padded: whether some token is in no sequence.
        arguments: keyword arguments of `waad`, `fai`, `span`, `attention_lse`, `column_moments`.
        response: `(B, T)` bool, the tokens of R.
    """

    batch: int
    length: int
    bounds: Tensor
    packed: bool
    padded: bool
    arguments: dict[str, Any]
    response: Tensor
    live: Tensor | None = None
    checked: dict[tuple[int, int], tuple[Any, bool]] = field(default_factory=dict)


def ends(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`(B, T)` bool -> first True and last True + 1 of each row; (0, 0) where there is none."""
    position = torch.arange(mask.shape[1], device=mask.device)
    first = torch.where(mask, position, mask.shape[1]).amin(1)
    end = torch.where(mask, position + 1, 0).amax(1)
    return torch.minimum(first, end), end


def sequences_of(inputs: ForwardInputs, response_mask: Tensor | None, flash: bool) -> Sequences:
    """The sequences of a forward pass.

    Args:
        response_mask: `(B, T)` bool: R of each sequence runs from its first to its last True token; None: all of it.
        flash: whether the implementation is one of the flash-attention package, which alone reads `cu_seqlens`, and
            packs by positions even beside an attention mask that is all True.
    """
    mask = inputs.attention_mask
    if mask is not None and bool(mask.all()):
        mask = None
    starts = None
    if mask is None:
        if inputs.cu_seqlens is not None and flash:
            starts = inputs.cu_seqlens[:-1].to(inputs.device, torch.int64)
        elif inputs.packs_positions and (inputs.attention_mask is None or (flash and inputs.batch == 1)):
            starts = _packed_starts(inputs)
    if starts is not None:
        return _packed(inputs, starts, response_mask)
    if inputs.cu_seqlens is not None and not flash and inputs.cu_seqlens.numel() > 2:
        raise ValueError(
            "cu_seq_lens_q: only flash attention reads it; with other implementations pass packed position_ids, "
            "attention_mask=None and use_cache=False"
        )
    _refuse_unseen_packing(inputs, mask)
    return _padded(inputs, mask, response_mask)


def _refuse_unseen_packing(inputs: ForwardInputs, mask: Tensor | None) -> None:
    """Raise where positions start again within a row that the model attended to as one sequence."""
    position = _row_positions(inputs)
    if position is None:
        return
    again = position.diff(dim=1) <= 0
    if mask is not None:  # whatever the positions of padding are
        again &= mask[:, 1:] & mask[:, :-1]
    if bool(again.any()):
        raise ValueError(
            "position_ids: they start again within a row, but the model does not keep such sequences apart here and "
            "lets every token see the others: pass attention_mask=None and use_cache=False, and to flash attention "
            "one row"
        )


def _row_positions(inputs: ForwardInputs) -> Tensor | None:
    """`(B, T)`, or None where there are no positions of this form."""
    position = inputs.position_ids
    if position is None or position.dim() != 2 or position.shape[1] != inputs.length:
        return None
    return position.to(inputs.device).expand(inputs.batch, -1)


def _packed_starts(inputs: ForwardInputs) -> Tensor | None:
    """Starts of the packed sequences, counted in the flattened batch; None where every row is one sequence."""
    position = _row_positions(inputs)
    if position is None:
        return None
    fresh = torch.ones_like(position, dtype=torch.bool)
    fresh[:, 1:] = position.diff(dim=1) != 1
    starts = fresh.flatten().nonzero().squeeze(1)
    return None if starts.numel() == inputs.batch else starts


def _padded(inputs: ForwardInputs, mask: Tensor | None, response_mask: Tensor | None) -> Sequences:
    shape = (inputs.batch, inputs.length)
    live = torch.ones(shape, dtype=torch.bool, device=inputs.device) if mask is None else mask
    start, end = ends(live)
    if mask is not None and not bool((live.sum(1) == end - start).all()):
        raise ValueError(
            "attention_mask: masked tokens between live ones; a row's live tokens must be one range "
            "(left or right padding), because the measures are over ranges"
        )
    arguments: dict[str, Any] = {}
    response_start, response_end = start, end
    if response_mask is not None:
        response_start, response_end = ends(response_mask & live)
        none = response_end == 0
        response_end = torch.where(none, end, response_end)
        response_start = torch.where(none, end, response_start)
        arguments["response_start"] = response_start.to(torch.int32)
    if mask is not None or response_mask is not None:
        arguments["seq_start"] = start.to(torch.int32)
        arguments["seq_end"] = response_end.to(torch.int32)
    rows = torch.arange(inputs.batch, device=inputs.device)
    position = torch.arange(inputs.length, device=inputs.device)
    response = (position >= response_start[:, None]) & (position < response_end[:, None])
    bounds = torch.stack([rows, start, end], dim=1)
    return Sequences(*shape, bounds, False, mask is not None, arguments, response, mask)


def _packed(inputs: ForwardInputs, starts: Tensor, response_mask: Tensor | None) -> Sequences:
    total = inputs.batch * inputs.length
    ends = torch.cat([starts[1:], starts.new_tensor([total])])
    if inputs.cu_seqlens is not None:
        ends = torch.minimum(ends, inputs.cu_seqlens[1:].to(ends))
    position = torch.arange(total, device=inputs.device)
    which = torch.bucketize(position, starts, right=True) - 1
    inside = position < ends[which]
    live = inside & (response_mask.flatten() if response_mask is not None else True)
    # R of each sequence: [first, last + 1) of its live response tokens; empty at its end where there is none.
    first = torch.full_like(starts, total).scatter_reduce(0, which[live], position[live], "amin")
    last = torch.full_like(starts, -1).scatter_reduce(0, which[live], position[live], "amax")
    response_end = torch.where(last < 0, ends, last + 1)
    response_start = torch.where(last < 0, ends, first)
    # What follows R in its sequence is no row, so it becomes a sequence of its own in which nothing is measured.
    bounds = torch.stack([starts, response_end], dim=1).flatten()
    counted = torch.stack([response_start - starts, torch.full_like(starts, total)], dim=1).flatten()
    bounds = torch.cat([bounds, bounds.new_tensor([total])])
    arguments = {
        "cu_seqlens": bounds.to(torch.int32),
        "response_start": counted.to(torch.int32),
        "max_seqlen": int(bounds.diff().max()),
    }
    response = (position >= response_start[which]) & (position < response_end[which])
    row = starts // inputs.length
    in_row = torch.stack([row, starts - row * inputs.length, ends - row * inputs.length], dim=1)[ends > starts]
    shape = (inputs.batch, inputs.length)
    return Sequences(*shape, in_row, True, not bool(inside.all()), arguments, response.view(shape))


def window_of_layer(sequences: Sequences, mask: Any, hints: list[int | None], name: str) -> int:
    """The left window that a layer's own mask shows (-1: none), by trying `hints` at a few rows of it.

    Args:
        mask: what the layer was given: None, a bool or additive float `(B, 1, T, T)` tensor, or a `BlockMask`.
        hints: sliding windows (number of visible keys) that the layer or its configuration names; None: no window.

    Raises:
        ValueError: where the mask is not causal within the sequences, with one of these windows.
    """
    if mask is None:
        if sequences.packed:
            raise ValueError(
                f"the batch looks packed, but {name!r} attention was given no mask and let every token see the other "
                "sequences: with 'sdpa' or 'eager', pass packed position_ids, attention_mask=None and use_cache=False "
                "(cu_seq_lens are read by flash attention alone); where the model ignores these, pad the batch instead"
            )
        if sequences.padded:
            raise ValueError(
                f"the batch is padded, but {name!r} attention was given no mask: register a mask function for this "
                "name in transformers.AttentionMaskInterface, or choose another attn_implementation"
            )
        return -1
    tried = list(dict.fromkeys([*hints, None]))
    for hint in tried:
        left = -1 if hint is None or hint >= sequences.length else hint - 1
        key = (id(mask), left)
        if key not in sequences.checked:  # the mask is kept with its verdict, so that its id stays its own
            agreed = agrees(_visible_rows(mask, sequences), sequences.bounds, sequences.length, left)
            sequences.checked[key] = mask, agreed
        if sequences.checked[key][1]:
            return left
    if sequences.packed:
        raise ValueError(
            f"the batch looks packed, but the mask of {name!r} attention does not keep its sequences apart: this model "
            "ignores packed position_ids (gpt-oss does), so pad the batch instead"
        )
    raise ValueError(
        f"the mask of {name!r} attention is not plain causal attention within each sequence, nor with a sliding window "
        f"of {[h for h in tried if h is not None]} keys: custom, chunked, prefix and bidirectional masks are not "
        "supported by the probe"
    )


def rows_to_check(bounds: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, start, t) of the first, middle and last query of the first few sequences, `(n,)` each.

    `bounds` is `(S, 3)` (row, start, end), `length` the tokens of a row.
    """
    row, start, end = bounds[:_CHECKED_SEQUENCES].unbind(1)
    last = (end - 1).clamp(min=0)
    t = torch.stack([start.clamp(max=length - 1), (start + last) // 2, last])
    alive = (end > start).expand(3, -1)
    return row.expand(3, -1)[alive], start.expand(3, -1)[alive], t[alive]


def _visible_rows(mask: Any, sequences: Sequences) -> Tensor:
    """`(n, T)` bool: the keys that the checked queries see according to `mask`."""
    row, _, t = rows_to_check(sequences.bounds, sequences.length)
    mask_mod: Callable[..., Tensor] | None = getattr(mask, "mask_mod", None)
    if mask_mod is not None:
        keys = torch.arange(sequences.length, device=t.device)
        zero = torch.zeros((), dtype=torch.int64, device=t.device)
        return mask_mod(row[:, None], zero, t[:, None], keys[None, :]).expand(t.numel(), sequences.length)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != sequences.length:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention mask of a layer: {found}; a (B, 1, T, T) mask or a BlockMask made by transformers from a "
            "two-dimensional attention_mask is needed"
        )
    first = torch.zeros_like(row)
    rows = mask[row if mask.shape[0] > 1 else first, first, t]
    if rows.dtype == torch.bool:
        return rows
    visible = rows > torch.finfo(rows.dtype).min / 2
    if bool((visible & (rows != 0)).any()):
        raise ValueError(
            "attention mask of a layer: it adds a bias to the scores (ALiBi or the like), which is unsupported"
        )
    return visible


def agrees(rows: Tensor, bounds: Tensor, length: int, left: int) -> bool:
    """Whether `rows` `(n, T)` bool, the keys that the checked queries see, are ranges with this left window."""
    _, start, t = rows_to_check(bounds, length)
    key = torch.arange(length, device=t.device)
    expected = (key >= start[:, None]) & (key <= t[:, None])
    if left >= 0:
        expected &= t[:, None] - key <= left
    return bool((rows == expected).all())

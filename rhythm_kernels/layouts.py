"""Between the layouts in which trainers keep one number a token: masks on their way in, gamma on its way out.

`RhythmCredit` takes masks and gives gamma by token: column t of `(B, T)` belongs to token t of the batch row, `(B, C)`
to its last C tokens, and place t of `(1, total)` to token t of a packed batch. Loss functions often keep something
else, because logits at position j score token j + 1. What they keep, and what leads there from numbers by token:

=============================== ============================== =====================================================
a trainer keeps                 there                          and back
=============================== ============================== =====================================================
`(B, T - 1)`, j scores j + 1    `shift(x)`                     `unshift(x, fill=...)`
`(B, T)` or `(total,)` rolled   `roll(x, fill=...)`            `unroll(x, fill=...)`; with `cu_seqlens` where packed
`(B, C)`, left-padded prompts   `x[:, -C:]`                    not needed: `RhythmCredit` takes it as it is
`(B, C)`, each after its prompt `take_responses`               `place_responses`
`(total,)` with `cu_seqlens`    `pack(x, attention_mask)`      `unpack(x, attention_mask, fill=...)`
a jagged nested tensor          `to_jagged(x, cu_seqlens)`     `from_jagged(x)`
a list, one tensor a response   `split_responses`              `join_responses`
=============================== ============================== =====================================================

`fill` is the number of the places that no token has: 1 for gamma, 0 (False) for masks. It has no default, since the
wrong one is not noticed: 0 in a gamma removes tokens from the loss, 1 in a mask adds some.

Every function keeps dtype and device, takes batches without a row or without a response, and makes no gradient. On a
GPU the host waits in `pack` alone, whose result is as long as the mask has tokens; values are checked on the CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import as_int, check_int, check_tensor, readable, same_shape

__all__ = [
    "cu_seqlens_of",
    "from_jagged",
    "join_responses",
    "pack",
    "place_responses",
    "roll",
    "shift",
    "split_responses",
    "take_responses",
    "to_jagged",
    "unpack",
    "unroll",
    "unshift",
]


def shift(x: Tensor) -> Tensor:
    """From tokens to predictions: `(B, T)` by token to `(B, T - 1)`, whose column j is of token j + 1. A view.

    The first token, which nothing predicts, is left out.
    """
    if check_tensor("x", x).dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, T) with T >= 1, got shape {tuple(x.shape)}")
    return x.detach()[:, 1:]


def unshift(x: Tensor, *, fill: float) -> Tensor:
    """The way back from :func:`shift`: `(B, T - 1)` to `(B, T)`, with `fill` for the first token."""
    return F.pad(_by_rows("x", x, "(B, T - 1)"), (1, 0), value=fill)


def roll(x: Tensor, *, fill: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """From tokens to predictions without a change of shape: place j is of token j + 1.

    The last place of each sequence predicts no token of it and becomes `fill`. (`torch.roll` puts there what belongs
    to the first token, of another sequence where the batch is packed.)

    Args:
        x: `(B, T)`, each batch row a sequence; with `cu_seqlens` `(total,)` or `(1, total)`.
        fill: of the places that score nothing: 1 for gamma, 0 for masks.
        cu_seqlens: `(S + 1,)` int, where the packed sequences begin, and `total`.

    Returns:
        A new tensor of the shape of `x`.
    """
    starts = _starts(x, cu_seqlens)
    after = F.pad(x.detach()[..., 1:], (0, 1), value=fill) if x.shape[-1] else x.detach().clone()
    return after if starts is None else after.masked_fill(starts[1:], fill)


def unroll(x: Tensor, *, fill: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """The way back from :func:`roll`: place t takes what stands one before it; `fill` at the start of each sequence.

    Args:
        x, fill, cu_seqlens: as for :func:`roll`.
    """
    starts = _starts(x, cu_seqlens)
    before = F.pad(x.detach()[..., :-1], (1, 0), value=fill) if x.shape[-1] else x.detach().clone()
    return before if starts is None else before.masked_fill(starts[:-1], fill)


def take_responses(x: Tensor, prompt_lengths: Tensor, length: int, *, fill: float) -> Tensor:
    """`(B, T)` by token to `(B, C)`, responses alone: column c of a batch row is of its token `prompt_lengths + c`.

    For batch rows that are padded on the right only, in which each response begins where its prompt ends. (Where
    prompts are padded on the left, all responses are the last C columns.)

    Args:
        x: `(B, T)`.
        prompt_lengths: `(B,)` int, on any device: the column at which each response begins.
        length: C, the length of the longest response.
        fill: where a batch row has no such token.
    """
    starts = _prompt_lengths(x, prompt_lengths)
    return _columns(x, starts, check_int("length", length, 0), fill)


def place_responses(x: Tensor, prompt_lengths: Tensor, length: int, *, fill: float) -> Tensor:
    """The way back from :func:`take_responses`: `(B, C)` to `(B, T)`, `fill` at prompts and behind the C tokens.

    Args:
        x: `(B, C)`, padded on the right.
        prompt_lengths: `(B,)` int.
        length: T, of the whole batch rows. Columns of `x` that would stand behind T are padding and are left out.
        fill: of the other tokens.

    Raises:
        ValueError: a mask whose tokens would stand behind T (on the CPU).
    """
    starts, length = _prompt_lengths(x, prompt_lengths), check_int("length", length, 0)
    if not x.is_floating_point() and readable(x) and readable(starts):
        ends = (starts + torch.arange(1, x.shape[1] + 1)) * (x != 0)
        if x.numel() and (needed := int(ends.max())) > length:
            raise ValueError(f"length must hold the tokens of every response, {needed}, got {length}")
    return _columns(x, -starts, length, fill)


def cu_seqlens_of(attention_mask: Tensor) -> Tensor:
    """`(B + 1,)` int32: where each batch row begins among the live tokens of a padded batch, and their number."""
    live = _by_rows("attention_mask", attention_mask, "(B, T)") != 0
    return F.pad(live.sum(1).cumsum(0), (1, 0)).int()


def pack(x: Tensor, attention_mask: Tensor) -> Tensor:
    """`(B, T)` to `(total,)`: the numbers of all live tokens, batch row by batch row. On a GPU the host waits.

    Args:
        x: `(B, T)`.
        attention_mask: `(B, T)`, bool or 0/1; padding may be on either side. :func:`cu_seqlens_of` has its sequences.
    """
    _by_rows("x", x, "(B, T)")
    return x.detach()[_live(x, attention_mask)]


def unpack(x: Tensor, attention_mask: Tensor, *, fill: float) -> Tensor:
    """The way back from :func:`pack`: `(total,)` or `(1, total)` to `(B, T)`, with `fill` at padding.

    Raises:
        ValueError: another number of values than `attention_mask` has tokens (on the CPU).
    """
    live = _live(None, attention_mask)
    values = _packed("x", x).detach().flatten()
    if readable(live) and (tokens := int(live.sum())) != len(values):
        raise ValueError(f"x must hold one value for each of the {tokens} live tokens, got {len(values)}")
    return values.new_full(live.shape, fill).masked_scatter(live, values)


def to_jagged(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """`(total,)` or `(1, total)` to a nested tensor of layout `torch.jagged`, one row a sequence. No copy."""
    _starts(x, cu_seqlens)
    return torch.nested.nested_tensor_from_jagged(x.detach().flatten(), cu_seqlens.to(x.device))


def from_jagged(x: Tensor) -> tuple[Tensor, Tensor]:
    """The way back from :func:`to_jagged`: `(total,)` and `cu_seqlens`, `(S + 1,)`.

    Raises:
        TypeError: no nested tensor of layout `torch.jagged`, or one with holes.
        ValueError: one of more than a number a token.
    """
    if not isinstance(x, Tensor) or not x.is_nested or x.layout != torch.jagged:
        kind = "a nested one of another layout" if isinstance(x, Tensor) and x.is_nested else type(x).__name__
        raise TypeError(f"x must be a nested tensor of layout torch.jagged, got {kind}")
    if x.dim() != 2:
        raise ValueError(f"x must be (S, tokens), got {x.dim()} dimensions")
    nested: Any = x  # whose own methods torch does not declare
    if nested.lengths() is not None:
        raise TypeError("x must be a nested tensor without holes, got one with lengths: x.contiguous() is one")
    return nested.detach().values(), nested.offsets()


def split_responses(x: Tensor, total_lengths: Sequence[int], response_lengths: Sequence[int]) -> list[Tensor]:
    """`(total,)` or `(1, total)` by token to a list of `(response_lengths[i],)`: the end of each sequence. Views.

    Args:
        x: packed sequences, one behind the other.
        total_lengths: of each sequence, prompt and response; ints of the host, as trainers keep them in lists.
        response_lengths: how many of them, at its end, are the response.
    """
    values = _packed("x", x).detach().flatten()
    totals, responses = _lengths(total_lengths, response_lengths)
    if sum(totals) != len(values):
        raise ValueError(f"total_lengths must add up to the {len(values)} tokens of x, got {sum(totals)}")
    return [one[total - count :] for one, total, count in zip(values.split(totals), totals, responses)]


def join_responses(responses: Sequence[Tensor], total_lengths: Sequence[int], *, fill: float) -> Tensor:
    """The way back from :func:`split_responses`: a list of responses to `(total,)`, with `fill` at their prompts.

    An empty list, which has no dtype, gives an empty float32 tensor.
    """
    for response in responses:
        if check_tensor("responses", response).dim() != 1:
            raise ValueError(f"responses must be of one dimension each, got shape {tuple(response.shape)}")
    totals, counts = _lengths(total_lengths, [len(response) for response in responses])
    padded = [F.pad(x.detach(), (total - n, 0), value=fill) for x, total, n in zip(responses, totals, counts)]
    return torch.cat(padded) if padded else torch.zeros(0)


def _by_rows(name: str, x: Tensor, want: str) -> Tensor:
    """A tensor of two dimensions, detached."""
    if check_tensor(name, x).dim() != 2:
        raise ValueError(f"{name} must be {want}, got shape {tuple(x.shape)}")
    return x.detach()


def _packed(name: str, x: Tensor) -> Tensor:
    if check_tensor(name, x).dim() != 1 and not (x.dim() == 2 and x.shape[0] == 1):
        raise ValueError(f"{name} must be (total,) or (1, total), got shape {tuple(x.shape)}")
    return x


def _live(x: Tensor | None, attention_mask: Tensor) -> Tensor:
    """An attention mask as bool, of the shape and device of `x`."""
    live = _by_rows("attention_mask", attention_mask, "(B, T)") != 0
    if x is not None and not same_shape(live.shape, x.shape):
        raise ValueError(f"attention_mask must have the shape of x, {tuple(x.shape)}, got {tuple(live.shape)}")
    return live


def _starts(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """`(total + 1,)` bool: where a packed sequence begins, or the batch ends; None where batch rows are sequences."""
    if cu_seqlens is None:
        _by_rows("x", x, "(B, T), or (total,) with cu_seqlens")
        return None
    total = _packed("x", x).shape[-1]
    if check_tensor("cu_seqlens", cu_seqlens).dim() != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (S + 1,), got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must hold integers, got {cu_seqlens.dtype}")
    if readable(cu_seqlens):
        if (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
        if (first := int(cu_seqlens[0])) != 0 or int(cu_seqlens[-1]) != total:
            ends = f"{first} and {int(cu_seqlens[-1])}"
            raise ValueError(f"cu_seqlens must begin with 0 and end with the {total} tokens of x, got {ends}")
    starts = torch.zeros(total + 1, dtype=torch.bool, device=x.device)
    return starts.index_fill_(0, cu_seqlens.to(x.device, torch.long), True)


def _prompt_lengths(x: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Checked, int64, on the device of `x`."""
    _by_rows("x", x, "(B, T)")
    if not same_shape(check_tensor("prompt_lengths", prompt_lengths).shape, x.shape[:1]):
        raise ValueError(f"prompt_lengths must be ({x.shape[0]},), got shape {tuple(prompt_lengths.shape)}")
    if prompt_lengths.is_floating_point() or prompt_lengths.dtype == torch.bool:
        raise TypeError(f"prompt_lengths must hold integers, got {prompt_lengths.dtype}")
    if readable(prompt_lengths) and (prompt_lengths < 0).any():
        raise ValueError(f"prompt_lengths must be at least 0, got {int(prompt_lengths.min())}")
    return prompt_lengths.to(x.device, torch.long)[:, None]


def _columns(x: Tensor, first: Tensor, length: int, fill: float) -> Tensor:
    """`(B, length)`: the columns of `x` from `first`, `(B, 1)`, on; `fill` where it has none."""
    width = x.shape[1]
    column = first + torch.arange(length, device=x.device)
    column = column.where((column >= 0) & (column < width), width)  # the one that is put there
    return F.pad(x.detach(), (0, 1), value=fill).gather(1, column)


def _lengths(total_lengths: Sequence[int], response_lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    totals = [as_int("total_lengths", n) for n in total_lengths]
    responses = [as_int("response_lengths", n) for n in response_lengths]
    if len(totals) != len(responses):
        raise ValueError(f"total_lengths must have one for each of {len(responses)} responses, got {len(totals)}")
    for total, response in zip(totals, responses):
        if not 0 <= response <= total:
            raise ValueError(f"total_lengths must be at least those of the responses, got {total} for {response}")
    return totals, responses

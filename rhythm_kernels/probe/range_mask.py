"""The mask that "rhythm" attention is given: which range of keys each token sees, in O(B T) memory.

transformers describes a mask by a function of (batch row, head, query, key), of which each attention implementation
makes what it needs. In causal attention over padded or packed sequences, with sliding windows and chunks, each token
sees one range of keys, and O(B T) evaluations of that function find it. Masks of other forms, and those of every call
with a KV cache, become the boolean `(B, 1, Tq, Tk)` mask that `sdpa` would get.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checked_queries import queries_to_check, see_ranges
from .forward_sequences import true_range

_NO_TENSOR = (
    "this model computes with its attention mask, which attn_implementation='rhythm' does not give as a tensor: use "
    "'sdpa' or 'eager'"
)
MaskFunction = Callable[[Any, Any, Tensor, Tensor], Any]


@dataclass(frozen=True)
class RangeMask:
    """Token t of batch row b sees the keys `first[b, t] <= s <= t`, of these the last `left + 1` (-1: all).

    Attributes:
        first: `(B, T)` int64, the first token of t's sequence; T for tokens that are in none (padding).
        left: keys to the left of its own that a token sees, as in `window_size=(left, 0)`.
        packed: whether some batch row holds several sequences; q, k and v are then flattened to `(B * T, H, D)`.
        arguments: what tells the public functions of these sequences (`cu_seqlens` or `seq_start`, `seq_end`).
        no_response: `response_start` at which no token is measured, one entry a sequence.
    """

    first: Tensor
    left: int
    packed: bool
    arguments: dict[str, Any]
    no_response: Tensor

    def mask_mod(self, batch_row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` of `batch_row` sees `key`; the tensors are broadcast."""
        first = self.first.to(query.device)
        seen = (key >= first[batch_row, query]) & (key <= query)
        return seen & (query - key <= self.left) if self.left >= 0 else seen

    def dense(self, queries: slice = slice(None)) -> Tensor:
        """The same as a `(B, 1, T, T)` bool mask, or what of it is for some queries."""
        batch, length = self.first.shape
        token = torch.arange(length, device=self.first.device)
        batch_row = torch.arange(batch, device=self.first.device)[:, None, None, None]
        return self.mask_mod(batch_row, batch_row, token[queries, None], token)

    def __getitem__(self, index: Any) -> RangeMask | Tensor:
        """`mask[:, :, queries, :]`, a slice of queries: itself where these are all, else their part of `dense`.

        So Gemma 4 reads its mask, which computes layers that share keys and values for `logits_to_keep` tokens alone.
        """
        whole = slice(None)
        if not (isinstance(index, tuple) and len(index) == 4 and isinstance(index[2], slice)):
            return self._refuse()
        if any(other != whole for other in (index[0], index[1], index[3])):
            return self._refuse()
        length = self.first.shape[1]
        return self if index[2].indices(length) == (0, length, 1) else self.dense(index[2])

    def to(self, device: Any, *_: Any, **__: Any) -> RangeMask:
        """The same on another device, where a model's layers are spread over several."""
        arguments = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.arguments.items()}
        return RangeMask(self.first.to(device), self.left, self.packed, arguments, self.no_response.to(device))

    # `generate` makes masks ahead for static caches: it asks them to be contiguous, and the model sees them again.
    ndim = 4

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the `dense` mask."""
        batch, length = self.first.shape
        return batch, 1, length, length

    def contiguous(self) -> RangeMask:
        return self

    # Models that calculate with their mask, as sparse attention does, would otherwise fail in ways that say nothing.
    def _refuse(self, *_: Any) -> Tensor:
        raise NotImplementedError(_NO_TENSOR)

    __add__ = __radd__ = __and__ = __rand__ = _refuse

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name}: {_NO_TENSOR}")


def rhythm_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | RangeMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RangeMask | Tensor | None:
    """transformers' mask function for "rhythm": None for plain causal attention, a `RangeMask`, or sdpa's mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if isinstance(attention_mask, RangeMask):
        return attention_mask
    # No mask says that token t sees the first t + 1 keys, which is false of queries that are cut from the others.
    cuts = _cuts_queries(kwargs.get("config"))
    mask_function = mask_function or causal_mask_function
    # User-made functions (use_vmap) need not be made of tensor operations; a cache has keys without queries.
    if q_length == kv_length and not use_vmap and _is_zero(q_offset) and _is_zero(kv_offset):
        causal_if_whole = allow_is_causal_skip and (local_size is None or local_size >= kv_length)
        if causal_if_whole and attention_mask is None:
            return _plain(batch_size, q_length, device) if cuts else None
        if attention_mask is None or attention_mask.shape[1] == q_length:
            whole, ranges = ranges_of(mask_function, batch_size, q_length, attention_mask, device)
            if causal_if_whole and whole:
                return _plain(batch_size, q_length, device) if cuts else None
            if ranges is not None:
                return ranges
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip and not cuts,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )


def _cuts_queries(config: Any) -> bool:
    """Whether layers that share keys and values may be given the queries of `logits_to_keep` tokens alone (Gemma 4)."""
    return config is not None and bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def _plain(batch: int, length: int, device: torch.device | str) -> RangeMask:
    """Causal attention over whole batch rows."""
    first = torch.zeros(batch, length, dtype=torch.int64, device=device)
    return RangeMask(first, -1, False, {}, torch.full((batch,), length, dtype=torch.int32, device=device))


def _is_zero(offset: Any) -> bool:
    return isinstance(offset, int) and offset == 0  # static caches give a tensor


def ranges_of(
    mask_function: MaskFunction, batch: int, length: int, attention_mask: Tensor | None, device: torch.device | str
) -> tuple[bool, RangeMask | None]:
    """Whether there is no padding, and the ranges that a mask function describes; None: it describes something else.

    The host must know which of these it is, to choose the attention that is run: on CUDA it waits for the device once a
    mask (as transformers does to choose sdpa's mask), and twice more where batch rows hold several sequences.

    Args:
        mask_function: as transformers composes it, without padding.
        attention_mask: `(B, T)` bool, False for padding; None: no padding.
    """
    token = torch.arange(length, device=device)
    batch_row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        return torch.as_tensor(mask_function(batch_row, head, query, key), device=device).expand(batch, query.numel())

    def window_of(bounds: Tensor) -> tuple[Tensor, Tensor]:
        """`left` as the longest sequence shows it, and whether the checked queries see ranges with it."""
        left = _left_window(mask_function, bounds, length)
        queries = queries_to_check(bounds, length)
        at, query = queries.batch_row, queries.token
        shown = torch.as_tensor(mask_function(at[:, None], head, query[:, None], token)).expand(-1, length)
        return left, see_ranges(shown & live[at], queries, left)  # the function knows nothing of padding

    live = torch.ones(batch, length, dtype=torch.bool, device=device) if attention_mask is None else attention_mask
    begins = live.clone()
    begins[:, 1:] &= ~sees(token[1:], token[:-1]) | ~live[:, :-1]
    looks_ahead = (sees(token[:-1], token[1:]) & live[:, 1:] & live[:, :-1]).any()
    start, end = true_range(live)
    holes = (live.sum(1) != end - start).any()  # what follows a hole sees what is before it
    one_each = (begins.sum(1) == live.any(1)).all()
    left, agreed = window_of(torch.stack([batch_row[:, 0], start, end], dim=1))
    known = torch.stack([live.all(), looks_ahead, holes, one_each, agreed, left]).tolist()
    whole, looks_ahead, holes, one_each, agreed, left = known
    if looks_ahead or holes:
        return bool(whole), None
    first = torch.where(live, torch.where(begins, token, -1).cummax(dim=1).values, length)
    if one_each:
        arguments: dict[str, Any] = {"seq_start": start, "seq_end": end}
        no_response = end
    else:
        bounds, cu_seqlens = _packed_bounds(begins, live)
        no_response = cu_seqlens.diff()
        left, agreed, longest = torch.stack([*window_of(bounds), no_response.max()]).tolist()
        arguments = {"cu_seqlens": cu_seqlens, "max_seqlen": longest}
    return bool(whole), RangeMask(first, left, not one_each, arguments, no_response) if agreed else None


def _packed_bounds(begins: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """`(S, 3)` (batch row, start, end) of the live sequences, and `cu_seqlens` over the flattened batch.

    Runs of padding are entries of `cu_seqlens` too: they attend among themselves, unseen by the live tokens.
    """
    length = begins.shape[1]
    edges = begins.clone()
    edges[:, 0] = True
    edges[:, 1:] |= live[:, 1:] != live[:, :-1]
    starts = edges.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.cat([starts, starts.new_full((1,), begins.numel())])
    batch_row = starts // length
    bounds = torch.stack([batch_row, starts - batch_row * length, cu_seqlens[1:] - batch_row * length], dim=1)
    return bounds[live.flatten()[starts]], cu_seqlens.to(torch.int32)


def _left_window(mask_function: MaskFunction, bounds: Tensor, length: int) -> Tensor:
    """`left` of the window: how many keys the last token of the longest sequence sees before its own; -1: all. 0-d."""
    batch_row, start, end = bounds.index_select(0, (bounds[:, 2] - bounds[:, 1]).argmax().view(1))[0].unbind()
    key = torch.arange(length, device=bounds.device)
    query = (end - 1).clamp(min=0)
    seen = (
        torch.as_tensor(mask_function(batch_row, torch.zeros_like(batch_row), query, key))
        & (key >= start)
        & (key < end)
    )
    count = seen.expand(length).sum()
    return torch.where(count >= end - start, -1, count - 1)

"""The sliding window of a layer, and whether the mask that the layer was given is what the measures take it for.

transformers decides in its masks whether a packing or a window really takes effect. So the mask of each measured layer
is looked at, at a few queries, and compared with the ranges that the forward's own inputs describe: that turns silent
misunderstandings into errors. Where the host may not read from the device (see `checks`), the window that the layer
names is taken, and the comparison is made on the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .alibi import WAY_OUT
from .attention_call import AttentionCall
from .checked_queries import see_ranges
from .checks import Checks, reads_now
from .forward_sequences import Sequences, given_no_mask


class NamedWindow(NamedTuple):
    """A layer's sliding window, in visible keys, or None, and whether the layer itself says so."""

    keys: int | None
    sure: bool = True


# What the masks of layers showed that name no window while their configuration has one.
_windows_read: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def left_window(sequences: Sequences, call: AttentionCall, checks: Checks) -> int:
    """How many keys to the left of its own a query sees; -1: all.

    Raises:
        ValueError: where the layer's mask is not causal within the sequences, with or without a window it may have.
    """
    window = call.kwargs.get("sliding_window")
    if call.reader.takes_window:  # such a layer is given no mask but the padding
        return -1 if window is None or window >= sequences.length else window - 1
    module = call.module
    hints = [window, getattr(module, "sliding_window", None), getattr(module.config, "sliding_window", None)]
    known = [h for h in hints if isinstance(h, int) and h > 0]
    named = _named_window(call, sequences.length)
    left = window_of_mask(sequences, call.mask, known, call.name, checks, named)
    if not named.sure and call.mask is not None:
        _windows_read[module] = left + 1 if left >= 0 else None
    return left


def _named_window(call: AttentionCall, length: int) -> NamedWindow:
    """The sliding window that a layer names to its attention function, or as its own attribute.

    The configuration's alone says nothing: some models keep one and do not use it, and a few use it without naming it
    (phimoe). Their mask is read once, in the first forward that is longer than that window.
    """
    module = call.module
    if "sliding_window" in call.kwargs or hasattr(module, "sliding_window"):
        named = call.kwargs.get("sliding_window", getattr(module, "sliding_window", None))
        return NamedWindow(named if isinstance(named, int) and named > 0 else None)
    configured = getattr(module.config, "sliding_window", None)
    if not isinstance(configured, int) or not 0 < configured < length:
        return NamedWindow(None)
    return NamedWindow(_windows_read.get(module), sure=module in _windows_read)


def window_of_mask(
    sequences: Sequences, mask: Any, hints: Sequence[int], name: str, checks: Checks, named: NamedWindow
) -> int:
    """The left window that a layer's own mask shows (-1: none).

    Where the host may read, and where the layer is not `sure`, `hints` are tried one after the other. Elsewhere the
    window that the layer names is taken, and compared with the mask on the device.

    Args:
        mask: what the layer was given: None, a bool or additive float `(B, 1, T, T)` tensor, or a `BlockMask`.
        hints: sliding windows (number of visible keys) that the layer or its configuration names.
        name: of the attention implementation, for errors.
    """
    if mask is None:
        if sequences.packed:
            raise ValueError(
                f"the batch looks packed, but {name!r} attention was given no mask and let every token see the other "
                "sequences: with 'sdpa' or 'eager', pass packed position_ids, attention_mask=None and use_cache=False "
                "(cu_seq_lens are read by flash attention alone); where the model ignores these, pad the batch instead"
            )
        if sequences.whole_table is not None:
            raise ValueError(f"the layer attends in chunks, but {name!r} attention was given no mask that says so")
        if sequences.live is not None:
            checks.require(sequences.live.all(), given_no_mask(name))
        return -1
    tried = list(dict.fromkeys([*hints, None]))
    if sequences.packed:
        error = ValueError(
            f"the batch looks packed, but the mask of {name!r} attention does not keep its sequences apart: this model "
            "ignores packed position_ids (gpt-oss does), so pad the batch instead"
        )
    else:
        chunks = f"in chunks of {sequences.table.max_seqlen}"
        within = "within each sequence" if sequences.whole_table is None else chunks
        error = ValueError(
            f"the mask of {name!r} attention is not plain causal attention {within}, nor with a sliding "
            f"window of {[h for h in tried if h is not None]} keys: custom, prefix and bidirectional masks "
            "are not supported by the probe"
        )
    at_once = reads_now(sequences.start.device) or not named.sure
    for hint in tried if at_once else [named.keys]:
        left = -1 if hint is None or hint >= sequences.length else hint - 1
        key = (id(mask), left)
        if key not in sequences.verdicts:  # the mask is kept with its verdict, so that its id stays its own
            holds = see_ranges(_visible_keys(mask, sequences, checks), sequences.checked_queries, left)
            if not at_once:
                checks.require(holds, error)
            sequences.verdicts[key] = mask, not at_once or bool(holds)
        if sequences.verdicts[key][1]:
            return left
    raise error


def _visible_keys(mask: Any, sequences: Sequences, checks: Checks) -> Tensor:
    """`(n, T)` bool: the keys that the checked queries see according to `mask`."""
    batch_row, _, token, exists = sequences.checked_queries
    mask_mod: Callable[..., Tensor] | None = getattr(mask, "mask_mod", None)
    if mask_mod is not None:
        keys = torch.arange(sequences.length, device=token.device)
        head = torch.zeros((), dtype=torch.int64, device=token.device)
        seen = mask_mod(batch_row[:, None], head, token[:, None], keys[None, :])
        return seen.expand(token.numel(), sequences.length)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != sequences.length:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "a layer's attention mask must be a (B, 1, T, T) tensor or a BlockMask, made by transformers from a "
            f"two-dimensional attention_mask, got {found}"
        )
    at = mask[batch_row if mask.shape[0] > 1 else torch.zeros_like(batch_row), :, token]  # (n, 1 or H, T)
    ignored = ~exists[:, None, None]
    visible = at
    if at.dtype != torch.bool:
        visible = at > torch.finfo(at.dtype).min / 2
        checks.require(
            (~visible | (at == 0) | ignored).all(),
            ValueError(
                "the attention mask of a layer adds a bias to the scores (ALiBi or the like), which the probe cannot "
                f"measure; where it is ALiBi, {WAY_OUT}"
            ),
        )
    if visible.shape[1] > 1:
        checks.require(
            ((visible == visible[:, :1]) | ignored).all(),
            ValueError(
                "the attention mask of a layer is not one for all heads: its heads see different keys, which the probe "
                "does not support"
            ),
        )
    return visible[:, 0]

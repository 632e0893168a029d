"""The measures as compositions of passes over a canonical form: what is left to do once the arguments are checked.

The public functions of :mod:`rhythm_kernels.functional` end here; the probe, which meets many layers of one batch,
comes here with the sequence table that it made once. Results leave in the caller's layout, float32 and detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .canonical import Canonical
from .reference import ColumnMoments

__all__ = ["attention_lse", "column_moments", "fai", "span", "waad"]


def waad(form: Canonical, window: int, per_head: bool = False, backend: str | None = None) -> Tensor:
    """Eq. 9, `(B, T)` or `(B, H_selected, T)`: a band of keys where `form` has the log-sum-exp, else all keys."""
    head = (form.seqs, form.heads, form.max_seqlen, *form.score)
    if form.lse is None:
        return form.leave(ops.row_stats(form.q, form.k, *head, window, per_head, backend)[1])
    return form.leave(ops.band_rows(form.q, form.k, form.lse, *head, window, per_head, backend))


def fai(form: Canonical, horizon: tuple[int, int | None], per_head: bool = False, backend: str | None = None) -> Tensor:
    """Eq. 10, `(B, T)` or `(B, H_selected, T)`: a band of rows, or all later rows where the horizon is open."""
    form = _with_lse(form, backend)
    lo, hi = horizon
    head = (form.q, form.k, form.lse, form.seqs, form.heads, form.max_seqlen, *form.score)
    if hi is None:
        return form.leave(ops.column_stats(*head, lo, False, per_head, backend)[0])
    return form.leave(ops.band_columns(*head, lo, hi, per_head, backend))


def span(form: Canonical, per_head: bool = False, backend: str | None = None) -> Tensor:
    """The summand of eq. 7, `(B, T)` or `(B, H_selected, T)`, in tokens."""
    head = (form.q, form.k, form.seqs, form.heads, form.max_seqlen, *form.score)
    return form.leave(ops.row_stats(*head, 1, per_head, backend)[2])


def column_moments(
    form: Canonical, min_distance: int = 4, per_head: bool = False, backend: str | None = None
) -> ColumnMoments:
    """Count and moments of the attention that each token receives, each `(B, T)` or `(B, H_selected, T)`."""
    form = _with_lse(form, backend)
    head = (form.q, form.k, form.lse, form.seqs, form.heads, form.max_seqlen, *form.score)
    moments = ops.column_stats(*head, min_distance, True, per_head, backend)
    return ColumnMoments(*(form.leave(moment) for moment in moments.unbind(0)))


def attention_lse(form: Canonical, backend: str | None = None) -> Tensor:
    """Natural log-sum-exp of each row, `(B, H_selected, T)`."""
    head = (form.q, form.k, form.seqs, form.heads, form.max_seqlen, *form.score)
    return form.leave(ops.row_stats(*head, 1, False, backend)[0])


def _with_lse(form: Canonical, backend: str | None) -> Canonical:
    """The same form with a log-sum-exp of the selected heads, from the streaming pass where the caller had none."""
    if form.lse is not None:
        return form
    lse, _, _ = ops.row_stats(form.q, form.k, form.seqs, form.heads, form.max_seqlen, *form.score, 1, True, backend)
    index = torch.arange(form.heads.shape[0], dtype=torch.int32, device=form.heads.device)
    return form._replace(lse=lse, heads=torch.stack([form.heads[:, 0], index], dim=1))

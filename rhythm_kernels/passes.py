"""The measures as passes over a canonical form: which pass gives which measure.

The public functions of :mod:`rhythm_kernels.functional` check their arguments and then call these. The probe calls
them itself, with one sequence table for all layers of a batch. Results are float32, detached, in the caller's layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .canonical import Canonical
from .reference import ColumnMoments
from .rule import RowStats

__all__ = ["attention_lse", "column_moments", "fai", "span", "waad"]


def waad(form: Canonical, window: int, per_head: bool = False, backend: str | None = None) -> Tensor:
    """Eq. 9, `(B, T)` or `(B, H_selected, T)`. Reads the last W keys of a row where `form` has lse, else all keys."""
    if form.lse is None:
        return form.leave(_row_stats(form, window, per_head, backend).waad)
    return form.leave(ops.band_rows(form.q, form.k, form.lse, *form.rule, window, per_head, backend))


def fai(form: Canonical, horizon: tuple[int, int | None], per_head: bool = False, backend: str | None = None) -> Tensor:
    """Eq. 10, `(B, T)` or `(B, H_selected, T)`. Reads the rows in the horizon, or all later ones where it is open."""
    form = _with_lse(form, backend)
    lo, hi = horizon
    if hi is None:
        return form.leave(ops.column_stats(form.q, form.k, form.lse, *form.rule, lo, False, per_head, backend)[0])
    return form.leave(ops.band_columns(form.q, form.k, form.lse, *form.rule, lo, hi, per_head, backend))


def span(form: Canonical, per_head: bool = False, backend: str | None = None) -> Tensor:
    """The summand of eq. 7, `(B, T)` or `(B, H_selected, T)`, in tokens."""
    return form.leave(_row_stats(form, 1, per_head, backend).span)


def column_moments(
    form: Canonical, min_distance: int = 4, per_head: bool = False, backend: str | None = None
) -> ColumnMoments:
    """Count and moments of the attention that each token receives, each `(B, T)` or `(B, H_selected, T)`."""
    form = _with_lse(form, backend)
    moments = ops.column_stats(form.q, form.k, form.lse, *form.rule, min_distance, True, per_head, backend)
    return ColumnMoments(*(form.leave(moment) for moment in moments.unbind(0)))


def attention_lse(form: Canonical, backend: str | None = None) -> Tensor:
    """The natural log-sum-exp of each row, `(B, H_selected, T)`."""
    return form.leave(_row_stats(form, 1, False, backend).lse)


def _row_stats(form: Canonical, window: int, per_head: bool, backend: str | None) -> RowStats:
    return RowStats(*ops.row_stats(form.q, form.k, *form.rule, window, per_head, backend))


def _with_lse(form: Canonical, backend: str | None) -> Canonical:
    """The same form with an lse. Where the caller gave none it is computed for the selected heads, in their order."""
    if form.lse is not None:
        return form
    heads = form.rule.heads
    index = torch.arange(heads.shape[0], dtype=torch.int32, device=heads.device)
    rule = form.rule._replace(heads=torch.stack([heads[:, 0], index], dim=1))
    return form._replace(lse=_row_stats(form, 1, True, backend).lse, rule=rule)

"""The documented API: arguments are checked and brought to canonical form, on which `passes` works. No kernel code.

Conventions of every function here (those of flash-attn):

- `q (B, T, H, D)`, `k (B, T, H_kv, D)` float32, bfloat16 or float16, any strides (a head dimension that is not
  contiguous is copied); `H` a multiple of `H_kv`, `1 <= D <= 256`. Packed: `q (total, H, D)` with `cu_seqlens`.
- `lse (B, H, T)` float32, packed `(H, total)`: natural log-sum-exp of each query row over all query heads, with the
  scale, softcap, window and sink that the model used; any strides. Without it a streaming pass computes it. Where it
  is infinite or NaN at a live row, A of that row is NaN at the keys it sees: WAAD there, FAI and moments of the keys
  that it counts for, and gamma is 1 for the whole response. Rows that are not live stay 0 whatever it holds there.
- `heads`: indices of query heads (list, or int tensor), default all. Results are the plain mean over them (eq. 8), or
  per head with `per_head=True`.
- `softmax_scale`: default `D ** -0.5`. `window_size = (left, right)`: a query sees itself and `left` keys before it
  (-1: all); the measures are of causal attention, so `right` is -1 or 0. `softcap`: `x -> softcap tanh(x / softcap)`
  where positive. `sinks (H,)`: logits that join each row's denominator only, read as float32; one of `-inf` is no
  sink, one of `+inf` or NaN leaves the keys nothing: all of its head is NaN, `out` and `lse` too.
- `alibi_slopes (H,)`, or a row a sequence: `(B, H)`, packed `(sequences, H)`; read as float32, without a gradient. Of
  the logit, after its softcap, `slope (t - s)` is taken (ALiBi, arXiv 2108.12409), as in flash-attn. It is computed
  in float32: a slope that takes it beyond, or is not finite, gives NaN in its head.
- Padded batches: `seq_start`, `seq_end` int32 `(B,)`, the live range of each row. Packed: `cu_seqlens` int32
  `(sequences + 1,)`, from 0 to the total or less: tokens behind the last sequence are padding. `max_seqlen` bounds the
  longest (read from `cu_seqlens` on the CPU, else the total: give it on a GPU, where every sequence has programs for
  so many tokens); one in a tensor on a GPU, which the host would have to wait for, counts as not given. One that is
  too small is an error where values are read: not on a GPU nor while tracing, where sequences may be cut to it.
- Integers are ints, anything with `__index__`, or a tensor that holds one on the CPU; numbers are Python's or NumPy's.
- `response_start` int32 `(B,)` or `(sequences,)`: first response token R, counted in the padded row, or from the packed
  sequence's first token. Rows of R are measured, keys may lie before it. A value before the start means the whole row.
- Results are float32, detached, `(B, T)` or `(B, H_selected, T)` (packed `(total,)`, `(H_selected, total)`), and 0
  outside `[response_start, seq_end)`.
- `backend`: None picks the best for the device; `"triton"`, `"cuda"`, `"cpu"`, `"torch"`, `"reference"` force one.

Errors: `TypeError` for a wrong type or dtype, `ValueError` for a wrong shape, device, index or range, for a backend
that cannot serve; raised before any kernel runs. Values in CUDA tensors are not read by the host but clamped.
Equation numbers are those of arXiv 2510.13554v2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Unpack  # comes with torch; of typing since Python 3.11

from . import ops, passes, reference
from .arguments import check_horizon, check_int, check_tensor, check_window, holds, same_shape
from .canonical import MAX_HEAD_SIZE, Canonical, canonical
from .options import Options, check_names, spelled_out
from .reference import AttentionStats, ColumnMoments

__all__ = ["attention_lse", "attention_with_rhythm", "column_moments", "fai", "span", "waad"]


def _canonical(
    function: str, pass_name: str, backend: str | None, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
) -> Canonical:
    """Canonical form of the arguments of `function`, once it is sure that `backend` can run `pass_name`."""
    check_names(function, options)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    form = canonical(q, k, lse, double=backend == "reference", **options)
    if not torch.compiler.is_compiling():
        ops.choose(pass_name, backend, form.q.device)
    return form


def _checked(form: Canonical, options: Options) -> dict[str, Any]:
    """For the dense definition: what checking made of arguments, such as numbers beyond every length, or sinks."""
    rule = form.rule
    return {
        **options,
        "heads": rule.heads[:, 0],
        "softmax_scale": rule.scale,
        "window_size": (rule.window_left, -1),
        "softcap": rule.softcap,
        "sinks": rule.sinks,
        "alibi_slopes": rule.alibi_slopes if rule.alibi_slopes is None else rule.alibi_slopes.squeeze(0),
    }


def _dense(name: str, form: Canonical, q: Tensor, k: Tensor, lse: Tensor | None, options: Options, **own: Any) -> Any:
    """The dense definition in float64, for `backend="reference"`; a float32 result like every backend's."""
    wide = [x.double() for x in (q, k, lse) if x is not None]
    with torch.no_grad(), torch.autocast(form.q.device.type, enabled=False):
        result = getattr(reference, name)(*wide, **own, **_checked(form, options))
    return ColumnMoments(*(x.float() for x in result)) if isinstance(result, tuple) else result.float()


def _dense_attention(
    form: Canonical, q: Tensor, k: Tensor, v: Tensor, options: Options, **own: Any
) -> tuple[Tensor, Tensor, AttentionStats]:
    """The same of attention, through which gradients run: `out` is of v's dtype."""
    with torch.autocast(form.q.device.type, enabled=False):
        out, lse, stats = reference.attention_with_rhythm(
            q.double(), k.double(), v.double(), **own, **_checked(form, options)
        )
    return out.to(v.dtype), lse.detach().float(), AttentionStats(*(x.float() for x in stats))


def _check_per_head(per_head: bool) -> bool:
    if not isinstance(per_head, bool):
        raise TypeError(f"per_head must be a bool, got {type(per_head).__name__} {per_head!r}")
    return per_head


@spelled_out(Options)
def waad(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    window: int = 10,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Windowed average attention distance of each token, eq. 9: `sum over s of A[t, s] min(t - s, window)`.

    With `lse` only the last `window` keys of each row are read: O(T window D). Without, one streaming pass: O(T^2 D).

    Returns float32 `(B, T)` in tokens, within `[0, window]`, NaN at a live row whose `lse`, given or computed, is not
    finite, or with a sink of `+inf` or NaN; see the module for layouts, arguments and errors.
    """
    window = check_window(window)
    _check_per_head(per_head)
    form = _canonical("waad", "row_stats" if lse is None else "band_rows", backend, q, k, lse, options)
    if backend == "reference":
        return _dense("waad", form, q, k, lse, options, window=window, per_head=per_head)
    return passes.waad(form, window, per_head, backend)


@spelled_out(Options)
def fai(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    horizon: tuple[int, int | None] = (10, 100),
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Future attention influence of each token, eq. 10: mean over `t in T(s)` of `A[t, s]`.

    T(s) holds the response rows at distance `horizon[0]` to `horizon[1]`, by position: O(T horizon D) with `lse`.
    `horizon=(lo, None)` runs to the sequence's end: one O(T^2 D) pass. 0 where T(s) is empty.

    Returns float32 `(B, T)`, attention per row, within `[0, 1]`; NaN where a row of T(s) that sees the token has an
    `lse`, given or computed, that is not finite, or a sink of `+inf` or NaN; see the module for layouts, arguments and
    errors.
    """
    lo, hi = check_horizon(horizon)
    _check_per_head(per_head)
    form = _canonical("fai", "column_stats" if hi is None else "band_columns", backend, q, k, lse, options)
    if backend == "reference":
        return _dense("fai", form, q, k, lse, options, horizon=(lo, hi), per_head=per_head)
    return passes.fai(form, (lo, hi), per_head, backend)


@spelled_out(Options)
def span(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Average attention distance of each token, `sum over s of A[t, s] (t - s)`; its mean over R is eq. 7.

    One streaming pass, O(T^2 D), whether or not `lse` is given: every key counts. Accumulated as distances, so that
    a million tokens lose nothing to cancellation.

    Returns float32 `(B, T)` in tokens, within `[0, T)`, NaN as :func:`waad`; see the module for layouts, arguments and
    errors.
    """
    _check_per_head(per_head)
    form = _canonical("span", "row_stats", backend, q, k, lse, options)
    if backend == "reference":
        return _dense("span", form, q, k, lse, options, per_head=per_head)
    return passes.span(form, per_head, backend)


@spelled_out(Options)
def column_moments(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    min_distance: int = 4,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> ColumnMoments:
    """Moments of the attention each token receives over the response rows `t >= s + min_distance`, in O(T) memory.

    What receiver heads are found by (Thought Anchors, arXiv 2506.19143): a head's score is the kurtosis over tokens
    of the `mean` it gives with `per_head=True`. Central moments are merged tile by tile.

    Returns a named tuple `(count, mean, variance, skewness, kurtosis)` of float32 `(B, T)`: population variance,
    kurtosis `m4 / m2^2` (3 for a normal distribution); 0 where there are fewer than two rows or no variance. All but
    the count are NaN where :func:`fai` would be. See the module for layouts, arguments and errors.
    """
    min_distance = check_int("min_distance", min_distance, 0)
    _check_per_head(per_head)
    form = _canonical("column_moments", "column_stats", backend, q, k, lse, options)
    if backend == "reference":
        return _dense("column_moments", form, q, k, lse, options, min_distance=min_distance, per_head=per_head)
    return passes.column_moments(form, min_distance, per_head, backend)


@spelled_out(Options)
def attention_lse(q: Tensor, k: Tensor, *, backend: str | None = None, **options: Unpack[Options]) -> Tensor:
    """Natural log-sum-exp of each response row, sinks included, where no FlashAttention returned one.

    Returns float32 `(B, H_selected, T)`, packed `(H_selected, total)`; `-inf` on rows without keys (padding) and
    before `response_start`; never `+inf`: NaN where a logit or the sink is `+inf` or NaN. To hand it to another
    function as `lse`, leave `heads` at None. See the module for arguments and errors.
    """
    form = _canonical("attention_lse", "row_stats", backend, q, k, None, options)
    if backend == "reference":
        return _dense("attention_lse", form, q, k, None, options)
    return passes.attention_lse(form, backend)


@spelled_out(Options)
def attention_with_rhythm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int = 10,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, AttentionStats]:
    """Causal attention and its rhythm together: `out, lse, stats`, with `stats` a named tuple `(waad, span)`.

    `v (B, T, H_kv, D_v)`, `D_v` up to 256 and not necessarily D. `out (B, T, H, D_v)` has v's dtype and is
    differentiable in q, k, v (the backward pass recomputes from `lse`; sinks get no gradient); it covers every live
    row and is 0 elsewhere. `lse (B, H, T)` float32 is detached and covers all heads; `heads`, `response_start` and
    `per_head` concern the statistics alone. On a CPU this is torch's own attention and the row pass. `out`, `lse` and
    statistics are NaN where a logit or the sink is `+inf` or NaN; a sink of `-inf` is none.

    See the module for layouts, arguments and errors.
    """
    window = check_window(window)
    _check_per_head(per_head)
    form = _canonical("attention_with_rhythm", "attention", backend, q, k, None, options)
    _check_v(v, q, k)
    if backend == "reference":
        return _dense_attention(form, q, k, v, options, window=window, per_head=per_head)
    _refuse_other_derivatives(q, k, v)
    # The tensors that carry gradients; `form` holds their detached copies.
    q, k, v = (x[None] if form.packed else x for x in (q, k, v))
    results = ops.attention(q, k, v, *form.rule, window, per_head, backend)
    out, lse, waad_, span_ = (form.leave(x) for x in results)
    return out, lse, AttentionStats(waad_, span_)


def _refuse_other_derivatives(*tensors: Tensor) -> None:
    """What torch's custom operators have no rule for: forward mode would be dropped in silence."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attention_with_rhythm has no forward-mode derivative: use reverse mode, or backend='reference'"
        )
    if not torch.compiler.is_compiling() and any(_is_tracked(x) for x in tensors):
        raise NotImplementedError(
            "attention_with_rhythm has no derivative under torch.func: use backward() or torch.autograd.grad, or "
            "backend='reference'"
        )


def _is_tracked(x: Tensor) -> bool:
    """Whether torch.func derives by this tensor, also inside of a vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def _check_v(v: Tensor, q: Tensor, k: Tensor) -> None:
    check_tensor("v", v)
    if not same_shape(v.shape[:-1], k.shape[:-1]):
        raise ValueError(
            f"v must be of the layout of k but for the head size, {tuple(k.shape[:-1])}, got {tuple(v.shape)}"
        )
    if not (holds(v.shape[-1] >= 1) and holds(v.shape[-1] <= MAX_HEAD_SIZE)):
        raise ValueError(f"v must be of a head size from 1 to {MAX_HEAD_SIZE}, got {v.shape[-1]}")
    if v.dtype != q.dtype:
        raise TypeError(f"v must be of the dtype of q, {q.dtype}, got {v.dtype}")
    if v.device != q.device:
        raise ValueError(f"v must be on the device of q, {q.device}, got {v.device}")

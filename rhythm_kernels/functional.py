"""The documented functions: they check their arguments, bring them to canonical form and call the passes.

A is the attention map: row t is what query token t pays to its keys, column s what key s receives from later tokens.
Equation numbers are those of arXiv 2510.13554v2. All functions share these conventions, which are those of flash-attn:

- `q (B, T, H, D)` and `k (B, T, H_kv, D)` are float32, bfloat16 or float16, `H` is a multiple of `H_kv`, and
  `1 <= D <= 256`. Packed: `q (total, H, D)`, with `cu_seqlens`. Strides are free, but a copy is made where the last
  dimension is not contiguous.
- `lse (B, H, T)` float32, packed `(H, total)`, with any strides: the natural log-sum-exp of each row, for all query
  heads, with the scale, softcap, sliding window, sinks and slopes that the model used. If it is None, a streaming pass
  computes it. If it is infinite or NaN at a live token, that row of A is NaN at the keys it sees: so are the row's WAAD
  and the FAI and moments of keys that the row counts for, and gamma is 1 in the whole response. Results of tokens that
  are not live are 0, whatever lse holds there.
- `heads`: a list or int tensor of query-head indices; None: all. Results are the mean over these heads (eq. 8), or per
  head with `per_head=True`.
- `softmax_scale`: None means `D ** -0.5`. `softcap`: a logit x becomes `softcap tanh(x / softcap)`; 0 is off.
- `window_size = (left, right)`, the sliding window: a query sees itself and `left` keys before it (-1: all). `right` is
  -1 or 0, as the measures are of causal attention.
- `sinks (H,)`: logits that join each row's denominator alone, read as float32. A sink of `-inf` changes nothing; one of
  `+inf` or NaN makes everything of its head NaN, `out` and `lse` too.
- `alibi_slopes (H,)`, or one entry for each sequence: `(B, H)`, packed `(sequences, H)`; read as float32, without a
  gradient. `slope (t - s)` is subtracted from the softcapped logit (ALiBi, arXiv 2108.12409), in float32: where the
  slope is not finite, or the product overflows, the head is NaN.
- Padded batches: `seq_start`, `seq_end` int32 `(B,)` are the live range of each batch row.
- Packed batches: `cu_seqlens` int32 `(sequences + 1,)` starts at 0 and ends at the total or before it; tokens after the
  last sequence are padding. `max_seqlen` is at least the longest sequence's length. If it is None, it is read from
  `cu_seqlens` on the CPU; on a GPU the total stands for it, so that launch grids are larger than need be: give it
  there. A `max_seqlen` in a GPU tensor counts as None, since reading it would make the host wait. One that is too small
  is an error where values are read, which they are not on a GPU nor while tracing: sequences may be cut there.
- `response_start` int32 `(B,)` or `(sequences,)`: the first token of the response R, counted from the start of the
  padded batch row, or of the packed sequence. The rows of R are measured, over all keys that they see. A value before
  the sequence's start means the whole sequence.
- Integers are ints, anything with `__index__`, or CPU tensors that hold one; numbers are Python's or NumPy's.
- Results are float32, detached, `(B, T)` or `(B, H_selected, T)`, packed `(total,)` or `(H_selected, total)`, and 0
  outside the response, `[response_start, seq_end)`.
- `backend`: None picks the best for the device; `"triton"`, `"cuda"`, `"cpu"`, `"torch"` or `"reference"` forces one.

Errors read `NAME must be WHAT, got VALUE` and are raised before any kernel runs: `TypeError` for a wrong type or dtype;
`ValueError` for a wrong shape, device, index or range, or a backend that cannot run here. Values in CUDA tensors are
not read by the host: they are clamped into range.
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
from .settings import RhythmSettings

__all__ = ["attention_lse", "attention_with_rhythm", "column_moments", "fai", "span", "waad"]


def _canonical(
    function: str, pass_name: str, backend: str | None, q: Tensor, k: Tensor, lse: Tensor | None, options: Options
) -> Canonical:
    """The canonical form of the arguments of `function`, or an error, also where `backend` cannot run `pass_name`."""
    check_names(function, options)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    form = canonical(q, k, lse, double=backend == "reference", **options)
    if not torch.compiler.is_compiling():
        ops.choose(pass_name, backend, form.q.device)
    return form


def _checked(form: Canonical, options: Options) -> dict[str, Any]:
    """The options for the dense definition, with the values that checking has brought into range or to float32."""
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
    """`backend="reference"`: the dense definition in float64, its result in float32 like every backend's."""
    wide = [x.double() for x in (q, k, lse) if x is not None]
    with torch.no_grad(), torch.autocast(form.q.device.type, enabled=False):
        result = getattr(reference, name)(*wide, **own, **_checked(form, options))
    return ColumnMoments(*(x.float() for x in result)) if isinstance(result, tuple) else result.float()


def _dense_attention(
    form: Canonical, q: Tensor, k: Tensor, v: Tensor, options: Options, **own: Any
) -> tuple[Tensor, Tensor, AttentionStats]:
    """The same for attention, which has gradients; `out` has v's dtype."""
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
    window: int = RhythmSettings.window,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Windowed average attention distance of each token, eq. 9: `sum over s of A[t, s] min(t - s, window)`.

    With `lse` only the last `window` keys of each row are read, O(T window D); without it all keys, O(T^2 D).

    Returns float32 `(B, T)` in tokens, within `[0, window]`. NaN where the row's `lse`, given or computed, is not
    finite, or the head's sink is `+inf` or NaN. See the module for layouts, arguments and errors.
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
    horizon: tuple[int, int | None] = RhythmSettings.horizon,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Future attention influence of each token, eq. 10: mean over `t in T(s)` of `A[t, s]`.

    T(s) holds the response rows t with `horizon[0] <= t - s <= horizon[1]`, whether or not they see s; it costs
    O(T horizon D) with `lse`. `horizon=(lo, None)` has no upper limit and costs O(T^2 D).

    Returns float32 `(B, T)`, the attention of an average row, within `[0, 1]`; 0 where T(s) is empty. NaN where a row
    of T(s) that sees s has an `lse`, given or computed, that is not finite, or the head's sink is `+inf` or NaN. See
    the module for layouts, arguments and errors.
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

    One streaming pass, O(T^2 D), whether or not `lse` is given, since every key counts. Distances are summed, not
    positions, so that nothing cancels even among a million tokens.

    Returns float32 `(B, T)` in tokens, within `[0, T)`; NaN where :func:`waad` is. See the module for layouts,
    arguments and errors.
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

    They find receiver heads (Thought Anchors, arXiv 2506.19143): a head's score is the kurtosis, over tokens, of its
    `mean`, which `per_head=True` gives. Central moments are merged tile by tile.

    Returns a named tuple `(count, mean, variance, skewness, kurtosis)` of float32 `(B, T)`: the variance is that of the
    population, the kurtosis `m4 / m2^2` (3 for a normal distribution); with fewer than two rows or no variance they are
    0. All but the count are NaN where :func:`fai` would be. See the module for layouts, arguments and errors.
    """
    min_distance = check_int("min_distance", min_distance, 0)
    _check_per_head(per_head)
    form = _canonical("column_moments", "column_stats", backend, q, k, lse, options)
    if backend == "reference":
        return _dense("column_moments", form, q, k, lse, options, min_distance=min_distance, per_head=per_head)
    return passes.column_moments(form, min_distance, per_head, backend)


@spelled_out(Options)
def attention_lse(q: Tensor, k: Tensor, *, backend: str | None = None, **options: Unpack[Options]) -> Tensor:
    """The natural log-sum-exp of each response row, sinks included, for models whose attention does not return it.

    Returns float32 `(B, H_selected, T)`, packed `(H_selected, total)`: `-inf` at padding and before `response_start`,
    NaN where a logit or the sink is `+inf` or NaN, never `+inf`. To pass it to another function as `lse`, leave `heads`
    at None. See the module for arguments and errors.
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
    window: int = RhythmSettings.window,
    per_head: bool = False,
    backend: str | None = None,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor, AttentionStats]:
    """Causal attention, and WAAD and span of the same maps: `out, lse, stats`, `stats` a named tuple `(waad, span)`.

    `v (B, T, H_kv, D_v)`, where `D_v`, up to 256, may differ from D. `out (B, T, H, D_v)` has v's dtype, is 0 at tokens
    that are not live, and is differentiable in q, k and v (the backward pass recomputes A from `lse`; sinks get no
    gradient). `lse (B, H, T)` float32 is detached. Both are of all heads and live tokens: `heads`, `response_start` and
    `per_head` apply to `stats` alone. All three are NaN where a logit or the sink is `+inf` or NaN. On a CPU this is
    torch's own attention followed by the row pass.

    See the module for layouts, arguments and errors.
    """
    window = check_window(window)
    _check_per_head(per_head)
    form = _canonical("attention_with_rhythm", "attention", backend, q, k, None, options)
    _check_v(v, q, k)
    if backend == "reference":
        return _dense_attention(form, q, k, v, options, window=window, per_head=per_head)
    _refuse_other_derivatives(q, k, v)
    # These carry gradients; `form` holds detached ones.
    q, k, v = (x[None] if form.packed else x for x in (q, k, v))
    results = ops.attention(q, k, v, *form.rule, window, per_head, backend)
    out, lse, waad_, span_ = (form.leave(x) for x in results)
    return out, lse, AttentionStats(waad_, span_)


def _refuse_other_derivatives(*tensors: Tensor) -> None:
    """Custom operators of torch have no forward mode, and would drop its tangents in silence; nor torch.func's grad."""
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
    """Whether torch.func differentiates with respect to this tensor, also inside of a vmap."""
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

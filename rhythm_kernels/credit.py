"""Credit: from WAAD and FAI to one factor a token, and from that to shaped advantages.

Pure torch, on any device, without a loop over tokens and without reading a value back to the host (values in CPU
tensors are checked, as everywhere). Equation numbers are those of arXiv 2510.13554; what the paper leaves open is
marked "ours". The same rules as plain Python loops are in :func:`rhythm_kernels.reference.rhythm_credit`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["CREDIT_MODES", "CreditMode", "rhythm_credit", "shape_advantages"]

CreditMode = Literal["local", "global", "coupled", "random", "entropy", "uniform"]
CREDIT_MODES: tuple[str, ...] = get_args(CreditMode)


def rhythm_credit(
    waad: Tensor,
    fai: Tensor,
    response_mask: Tensor,
    mode: CreditMode = "coupled",
    gamma_amp: float = 1.5,
    top: float = 0.4,
    alpha: float = 0.5,
    neighbors: int = 3,
    *,
    bottom: bool = False,
    entropy: Tensor | None = None,
    generator: torch.Generator | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
) -> Tensor:
    """The factor `gamma` by which each token's non-negative advantage is to be multiplied (eqs. 13 to 18).

    A row of the batch is one response: its masked tokens in order, as one sequence, also where the mask has holes
    (tool calls). `n` is their number and `m = ceil(top * n)` the size of a set; ties go to the earlier token (ours).

    ========== =========================================================================================== ======
    mode       tokens that get `gamma_amp`                                                                     eq.
    ========== =========================================================================================== ======
    local      `T_loc`: the `m` largest `delta[t] = |WAAD[t] - WAAD[t+1]|`, 0 at the last token (ours)      13, 14
    global     `T_glob`: the `m` largest FAI, without tokens whose FAI is 0 (ours)                          15, 16
    coupled    `T_glob`, where a dominated token hands the share `alpha` to the token that introduced it    17, 18
    random     `m` tokens drawn by `generator`                                                                   -
    entropy    the `m` largest `entropy`                                                                         -
    uniform    none: gamma is 1                                                                                  -
    ========== =========================================================================================== ======

    A token `t` of `T_glob` is dominated where `WAAD[t] <= tau_waad` and `max(delta[t-k..t-1]) >= tau_delta` with
    `k = neighbors`; its intro token is the `u` of these with the largest `delta[u]`, ties to the later one (ours).

    Args:
        waad, fai: `(B, T)` floating point, of the same device; see :func:`rhythm_kernels.waad` and `.fai`.
        response_mask: `(B, T)`, bool or 0/1 numbers: the tokens of each response.
        mode: one of the table.
        gamma_amp: above 0; the factor of a chosen token.
        top: the share `q` of tokens a set holds, `0 < top <= 1`.
        alpha: the share of a dominated token's bonus that goes to its intro token, `0 <= alpha <= 1`.
        neighbors: how far before a dominated token its intro token is looked for, at least 1.
        bottom: the lowest `m` instead of the highest (of FAI: among tokens with FAI > 0); with `coupled` this
            changes `T_glob` alone. An ablation that must hurt.
        entropy: `(B, T)`, for `mode="entropy"`.
        generator: for `mode="random"`; without one, torch's default generator of the device.
        tau_waad, tau_delta: thresholds; by default (ours) the lower median of the response's WAAD and the smallest
            `delta` in `T_loc`.

    Returns:
        `gamma`, `(B, T)` float32, detached: 1 outside the response, and 1 everywhere for a response that is empty
        or has non-finite measures.

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, type or device.
    """
    _check_measures(waad, fai, response_mask, entropy)
    _check_options(mode, gamma_amp, top, alpha, neighbors, generator, tau_waad, tau_delta)
    if mode == "entropy" and entropy is None:
        raise ValueError('entropy is None: mode="entropy" needs it as a (B, T) tensor')

    with torch.no_grad():
        mask = response_mask.detach() != 0
        response = _Response.of(mask)
        measures = [waad, fai] if entropy is None or mode != "entropy" else [waad, fai, entropy]
        finite = torch.stack([(x.detach().isfinite() | ~mask).all(dim=1) for x in measures]).all(dim=0)
        live = response.live & finite[:, None]
        size = torch.ceil(top * response.length.double() - 1e-9)

        def compact(x: Tensor) -> Tensor:
            x = x.detach()
            x = x if x.dtype == torch.float64 else x.float()
            return torch.where(live, x.gather(1, response.order), 0)

        def chosen(x: Tensor, among: Tensor) -> Tensor:
            return _extreme(x, among, size, lowest=bottom)

        if mode == "uniform":
            bonus = torch.zeros_like(live, dtype=torch.float32)
        elif mode == "random":
            device = mask.device if generator is None else generator.device
            draw = torch.rand(mask.shape, generator=generator, device=device).to(mask.device)
            bonus = _extreme(draw, live, size, lowest=False).float()
        elif mode == "entropy":
            assert entropy is not None
            bonus = chosen(compact(entropy), live).float()
        elif mode == "local":
            bonus = chosen(_delta(compact(waad), live), live).float()
        elif mode == "global":
            influence = compact(fai)
            bonus = chosen(influence, live & (influence > 0)).float()
        else:
            influence = compact(fai)
            anchors = chosen(influence, live & (influence > 0))
            bonus = _coupled(compact(waad), anchors, live, size, alpha, neighbors, tau_waad, tau_delta)

        gamma = torch.where(live, 1 + (gamma_amp - 1) * bonus, 1.0)
        return torch.where(mask, gamma.gather(1, response.place), 1.0)


def shape_advantages(advantages: Tensor, gamma: Tensor) -> Tensor:
    """Multiply advantages by `gamma` where they are not negative; `gamma = 1` changes no bit.

    Args:
        advantages: `(B,)`, one a response, or `(B, T)`; floating point.
        gamma: `(B, T)` of :func:`rhythm_credit`.

    Returns:
        `(B, T)`, detached.

    Raises:
        ValueError, TypeError: wrong shape, type or device.
    """
    for name, x in (("advantages", advantages), ("gamma", gamma)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor")
        if not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: it must be floating point")
    if gamma.dim() != 2:
        raise ValueError(f"gamma has shape {tuple(gamma.shape)}: it must be (B, T)")
    if tuple(advantages.shape) not in (tuple(gamma.shape[:1]), tuple(gamma.shape)):
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: it must be (B,) or (B, T) "
            f"where gamma has {tuple(gamma.shape)}"
        )
    if advantages.device != gamma.device:
        raise ValueError(f"advantages is on {advantages.device}: it must be where gamma is, on {gamma.device}")
    advantages, gamma = advantages.detach(), gamma.detach()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    return torch.where(advantages >= 0, advantages * gamma, advantages)


class _Response(NamedTuple):
    """The masked tokens of each row moved to its front, and the way back."""

    order: Tensor  #  (B, T) int64: which token of the row stands at each place; masked tokens first, in order
    place: Tensor  #  (B, T) int64: the place of each token of the row
    live: Tensor  #   (B, T) bool: places that hold a masked token
    length: Tensor  # (B, 1) int64: n

    @classmethod
    def of(cls, mask: Tensor) -> _Response:
        order = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices
        length = mask.sum(dim=1, keepdim=True)
        live = torch.arange(mask.shape[1], device=mask.device) < length
        return cls(order, order.argsort(dim=1), live, length)


def _extreme(x: Tensor, among: Tensor, size: Tensor, *, lowest: bool) -> Tensor:
    """`TopQ` (or its mirror): the `size (B, 1)` highest of `x (B, T)` where `among`, ties to the earlier token."""
    last = math.inf if lowest else -math.inf
    order = torch.where(among, x, last).sort(dim=1, descending=not lowest, stable=True).indices
    return (order.argsort(dim=1) < size) & among


def _delta(waad: Tensor, live: Tensor) -> Tensor:
    """Eq. 13: how far WAAD moves from each token to the next one; 0 at the last."""
    step = (waad[:, :-1] - waad[:, 1:]).abs()
    delta = torch.zeros_like(waad)
    delta[:, :-1] = torch.where(live[:, 1:], step, 0)
    return delta


def _coupled(
    waad: Tensor,
    anchors: Tensor,
    live: Tensor,
    size: Tensor,
    alpha: float,
    neighbors: int,
    tau_waad: float | None,
    tau_delta: float | None,
) -> Tensor:
    """Eqs. 17 and 18 on compact rows: `1{T_glob without D} + (1 - alpha) 1{D} + alpha 1{I(D)}`, `(B, T)` float32."""
    delta = _delta(waad, live)
    low: Tensor | float
    high: Tensor | float
    if tau_waad is None:
        middle = ((live.sum(dim=1, keepdim=True) - 1) // 2).clamp(min=0)
        low = torch.where(live, waad, math.inf).sort(dim=1).values.gather(1, middle)
    else:
        low = tau_waad
    if tau_delta is None:
        local = _extreme(delta, live, size, lowest=False)
        high = torch.where(local, delta, math.inf).amin(dim=1, keepdim=True)
    else:
        high = tau_delta

    # The largest delta among the k tokens before each, from the nearest to the farthest, so that ties stay later.
    steps = range(1, min(neighbors, waad.shape[1] - 1) + 1)
    peak = torch.full_like(delta, -math.inf)
    back = torch.zeros_like(delta, dtype=torch.int64)
    for step in steps:
        before = delta[:, :-step]
        nearer = peak[:, step:]
        back[:, step:] = torch.where(before > nearer, step, back[:, step:])
        peak[:, step:] = torch.maximum(before, nearer)
    dominated = anchors & (waad <= low) & (peak >= high) & (back > 0)

    intro = torch.zeros_like(dominated)
    for step in steps:
        intro[:, :-step] |= (dominated & (back == step))[:, step:]
    return (anchors & ~dominated).float() + (1 - alpha) * dominated.float() + alpha * intro.float()


def _check_measures(waad: Tensor, fai: Tensor, response_mask: Tensor, entropy: Tensor | None) -> None:
    named = {"waad": waad, "fai": fai, "response_mask": response_mask}
    if entropy is not None:
        named["entropy"] = entropy
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor")
        if name != "response_mask" and not x.is_floating_point():
            raise TypeError(f"{name} is {x.dtype}: it must be floating point")
        if name == "waad" and (x.dim() != 2 or x.numel() == 0):
            raise ValueError(f"waad has shape {tuple(x.shape)}: it must be (B, T) with B >= 1 and T >= 1")
        if x.shape != waad.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be that of waad, {tuple(waad.shape)}")
        if x.device != waad.device:
            raise ValueError(f"{name} is on {x.device}: it must be where waad is, on {waad.device}")
    if response_mask.is_complex():
        raise TypeError(f"response_mask is {response_mask.dtype}: it must be bool, or 0 and 1")
    if response_mask.device.type == "cpu" and response_mask.dtype != torch.bool and not torch.compiler.is_compiling():
        strange = response_mask[(response_mask != 0) & (response_mask != 1)]
        if strange.numel():
            raise ValueError(f"response_mask holds {strange[0].item()}: it must hold 0 and 1 only")


def _check_options(
    mode: str,
    gamma_amp: float,
    top: float,
    alpha: float,
    neighbors: int,
    generator: torch.Generator | None,
    tau_waad: float | None,
    tau_delta: float | None,
) -> None:
    if mode not in CREDIT_MODES:
        raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(CREDIT_MODES)}")
    for name, value in (
        ("gamma_amp", gamma_amp),
        ("top", top),
        ("alpha", alpha),
        ("tau_waad", tau_waad),
        ("tau_delta", tau_delta),
    ):
        optional = name.startswith("tau_")
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = "a number or None" if optional else "a number"
            raise TypeError(f"{name} is {value!r}: it must be {what}")
        if value != value:  # not math.isnan, which a compiler cannot trace for a changing float
            raise ValueError(f"{name} is nan: it must be a number")
    if not 0 < gamma_amp < math.inf:
        raise ValueError(f"gamma_amp is {gamma_amp}: it must be above 0 and finite")
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}: it must be above 0 and at most 1")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}: it must be from 0 to 1")
    if isinstance(neighbors, bool) or not isinstance(neighbors, int):
        raise TypeError(f"neighbors is {neighbors!r}: it must be an int")
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}: it must be at least 1")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}: it must be a torch.Generator or None")

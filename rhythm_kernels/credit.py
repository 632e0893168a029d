"""Credit: from WAAD and FAI to one factor a token, and from that to shaped advantages.

Arguments are checked here; gamma comes from the op `torch.ops.rhythm_kernels.credit`, on any device, without reading a
value back to the host (values in CPU tensors are checked, as everywhere). Equation numbers are those of
arXiv 2510.13554v2; what the paper leaves open is marked "ours". The definition, as plain Python loops, is
:func:`rhythm_kernels.reference.rhythm_credit`: every backend gives its bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference
from .arguments import check_int, check_number, check_tensor, holds, readable, same_shape
from .settings import CreditMode, RhythmSettings, Sign, check_amounts, check_mode, check_sign

__all__ = ["rhythm_credit", "shape_advantages"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_FLOATING)


def rhythm_credit(
    waad: Tensor,
    fai: Tensor,
    response_mask: Tensor,
    mode: CreditMode = RhythmSettings.mode,
    gamma_amp: float = RhythmSettings.gamma_amp,
    top: float = RhythmSettings.top,
    alpha: float = RhythmSettings.alpha,
    neighbors: int = RhythmSettings.neighbors,
    *,
    bottom: bool = False,
    entropy: Tensor | None = None,
    generator: torch.Generator | None = None,
    tau_waad: float | None = None,
    tau_delta: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The factor `gamma` by which each token's advantage is to be multiplied (eq. 13), from eqs. 14 to 19.

    A batch row is one response: its masked tokens in order, as one sequence, also where the mask has holes (tool
    calls). `n` is their number and `m = ceil(top * n)` the size of a set. "Ours" marks what the paper leaves open: ties
    go to the earlier token (ours).

    ========== =========================================================================================== ======
    mode       tokens that get the bonus, `gamma_amp - 1`                                                      eq.
    ========== =========================================================================================== ======
    local      `T_loc`: the `m` largest `delta[t] = |WAAD[t] - WAAD[t+1]|`, 0 at the last token (ours)      14, 15
    global     `T_glob`: the `m` largest FAI, without tokens whose FAI is 0 (ours)                          16, 17
    coupled    `T_glob`, where a dominated token gives the share `alpha` of its bonus to its intro token    18, 19
    random     `m` tokens drawn by `generator`                                                                   -
    entropy    the `m` largest `entropy`                                                                         -
    uniform    none: gamma is 1                                                                                  -
    ========== =========================================================================================== ======

    A token `t` of `T_glob` is dominated where `WAAD[t] <= tau_waad` and `max(delta[t-k..t-1]) >= tau_delta` with
    `k = neighbors`; its intro token is the `u` of these with the largest `delta[u]`, ties to the later one (ours).

    Args:
        waad, fai: `(B, T)` floating point, of the same device; see :func:`rhythm_kernels.waad` and `.fai`. Compared
            in float32, or in float64 where one of the measures is (ours).
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
            `delta` in `T_loc`. Compared in the precision of the measures.
        backend: None picks the best for the device; `"cuda"`, `"cpu"`, `"torch"`, `"reference"` force one. They give
            the same bits, but for the draws of `mode="random"`, which belong to the generator's device.

    Returns:
        `gamma`, `(B, T)` float32, detached: 1 outside the response, and 1 everywhere for a response that is empty
        or has non-finite measures (WAAD or FAI of a row whose log-sum-exp is not finite are NaN).

    Raises:
        ValueError, TypeError: an argument out of range, or of the wrong shape, type or device; a backend that cannot
            serve.
    """
    _check_measures(waad, fai, response_mask, entropy)
    neighbors = check_int("neighbors", neighbors, 1)
    gamma_amp, top, alpha = (
        check_number(name, x) for name, x in (("gamma_amp", gamma_amp), ("top", top), ("alpha", alpha))
    )
    tau_waad, tau_delta = (
        None if x is None else check_number(name, x) for name, x in (("tau_waad", tau_waad), ("tau_delta", tau_delta))
    )
    check_mode(mode)
    check_amounts(gamma_amp, top, alpha)
    _check_options(bottom, generator, tau_waad, tau_delta, backend)
    if mode == "entropy" and entropy is None:
        raise ValueError('entropy must be a (B, T) tensor for mode="entropy", got None')
    if not torch.compiler.is_compiling():
        ops.choose("credit", backend, waad.device)
    if backend == "reference":
        return reference.rhythm_credit(
            waad.detach(),
            fai.detach(),
            response_mask.detach(),
            mode,
            gamma_amp,
            top,
            alpha,
            neighbors,
            bottom=bottom,
            entropy=entropy if entropy is None else entropy.detach(),
            generator=generator,
            tau_waad=tau_waad,
            tau_delta=tau_delta,
        )

    with torch.no_grad():
        mask = (response_mask.detach() != 0).contiguous()
        if mode == "uniform":
            return torch.ones_like(mask, dtype=torch.float32)
        score = None
        if mode == "entropy":
            score = entropy
        elif mode == "random":
            device = mask.device if generator is None else generator.device
            draws = mask.new_empty(mask.shape, dtype=torch.float32, device=device)  # torch.rand knows no symbolic size
            score = draws.uniform_(generator=generator).to(mask.device)
        double = any(x is not None and x.dtype == torch.float64 for x in (waad, fai, score))

        def measure(x: Tensor) -> Tensor:
            return x.detach().to(torch.float64 if double else torch.float32).contiguous()

        return ops.credit(
            measure(waad),
            measure(fai),
            None if score is None else measure(score),
            mask,
            mode,
            gamma_amp,
            top,
            alpha,
            neighbors,
            bottom and mode != "random",
            tau_waad,
            tau_delta,
            backend,
        )


def shape_advantages(advantages: Tensor, gamma: Tensor, sign: Sign = RhythmSettings.sign) -> Tensor:
    """The shaped advantage of eq. 13: `advantages * gamma`; `gamma = 1` changes no bit.

    Args:
        advantages: `(B,)`, one a response, or `(B, T)`; floating point.
        gamma: `(B, T)` of :func:`rhythm_credit`.
        sign: which advantages gamma scales: `"both"`; `"positive"`, those that are at least 0, as the paper's first
            version had it; `"negative"`, those below 0. The last two are ablations (Table 7a).

    Returns:
        `(B, T)`, detached, of the dtype that the two promote to.

    Raises:
        ValueError, TypeError: wrong shape, type or device, or no such sign.
    """
    for name, x in (("advantages", advantages), ("gamma", gamma)):
        check_tensor(name, x)
        _check_floating(name, x)
    if gamma.dim() != 2:
        raise ValueError(f"gamma must be (B, T), got shape {tuple(gamma.shape)}")
    if not same_shape(advantages.shape, gamma.shape[: 2 if advantages.dim() == 2 else 1]):
        raise ValueError(
            f"advantages must be (B,) or (B, T) where gamma has shape {tuple(gamma.shape)}, got shape "
            f"{tuple(advantages.shape)}"
        )
    check_sign(sign)
    if advantages.device != gamma.device:
        raise ValueError(f"advantages must be where gamma is, on {gamma.device}, got one on {advantages.device}")
    advantages, gamma = advantages.detach(), gamma.detach()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    shaped = advantages * gamma
    if sign == "both":
        return shaped
    return torch.where((advantages >= 0) == (sign == "positive"), shaped, advantages)


def _check_measures(waad: Tensor, fai: Tensor, response_mask: Tensor, entropy: Tensor | None) -> None:
    named = {"waad": waad, "fai": fai, "response_mask": response_mask}
    if entropy is not None:
        named["entropy"] = entropy
    for name, x in named.items():
        check_tensor(name, x)
        if name != "response_mask":
            _check_floating(name, x)
        if name == "waad" and (x.dim() != 2 or not all(holds(size > 0) for size in x.shape)):
            raise ValueError(f"waad must be (B, T) with B >= 1 and T >= 1, got shape {tuple(x.shape)}")
        if not same_shape(x.shape, waad.shape):
            raise ValueError(f"{name} must have the shape of waad, {tuple(waad.shape)}, got shape {tuple(x.shape)}")
        if x.device != waad.device:
            raise ValueError(f"{name} must be where waad is, on {waad.device}, got one on {x.device}")
    if response_mask.dtype not in _MASKS:
        raise TypeError(f"response_mask must be bool, or 0 and 1, got {response_mask.dtype}")
    if response_mask.dtype != torch.bool and readable(response_mask):
        strange = response_mask[(response_mask != 0) & (response_mask != 1)]
        if strange.numel():
            raise ValueError(f"response_mask must hold 0 and 1 only, got {strange[0].item()}")


def _check_floating(name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATING:
        raise TypeError(f"{name} must be floating point of 16, 32 or 64 bits, got {x.dtype}")


def _check_options(
    bottom: bool,
    generator: torch.Generator | None,
    tau_waad: float | None,
    tau_delta: float | None,
    backend: str | None,
) -> None:
    for name, value in (("tau_waad", tau_waad), ("tau_delta", tau_delta)):
        if value is not None and value != value:  # not math.isnan, which a compiler cannot trace for a changing float
            raise ValueError(f"{name} must be a number, got nan")
    if not isinstance(bottom, bool):
        raise TypeError(f"bottom must be a bool, got {bottom!r}")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend must be a str or None, got {type(backend).__name__}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")

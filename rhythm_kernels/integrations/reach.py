"""Whether credit reaches a loss: the check that finds a trainer which takes shaped advantages and ignores the shape.

Some losses see one number a response: they read a scalar advantage, or weigh a whole response by one ratio, in whose
gradient the advantages of its tokens count by their sum alone. Trained on those, credit changes nothing that it should,
and no log would tell. The gradient by the tokens' log-probabilities tells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..arguments import check_tensor, same_shape

__all__ = ["credit_is_seen"]

# Within a response, a token's gradient grows with its advantage: by how much, in logarithms, is a slope of 1 for a loss
# that sees tokens, and of 0 for one that does not. Ratios and other weights of tokens add noise around either.
_BETWEEN = 0.5
# The variance of the logarithm of the advantages below which they are all alike (factors apart by less than 0.3%).
_ALIKE = 1e-5
# Of how many tokens, beyond one a row, an error can be told; and how many standard errors it is. A training asks until
# it knows, so that an error which is rare in one batch would come in some.
_SPARE, _ERRORS = 6, 4
# The share of its squares by which what is the same all over a row varies around its mean.
_ROUNDING = 1e-10


def credit_is_seen(
    loss: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
) -> bool:
    """Whether the gradient of a loss tells apart the tokens that the advantages tell apart.

    Ask in the first steps of a training, until it is True once: it costs a gradient through the loss's elementwise
    operations alone, and waits for the device. The loss is left as it is, and can be differentiated after.

    Args:
        loss: the scalar that will be differentiated.
        log_probs: the tokens' log-probabilities of which the loss was made, part of its graph; `(B, T)`, each batch row
            a response, or `(total,)` or `(1, total)` of packed responses, with `cu_seqlens`.
        advantages: of the same shape, as shaped by credit.
        response_mask: of the same shape, bool or 0/1: the tokens that are trained.
        cu_seqlens: `(S + 1,)` int, where packed sequences begin, and `total`. Without it they count as one response,
            and a loss that tells responses apart passes for one that tells tokens apart.

    Returns:
        True where it does; False where this batch cannot say: within each response the advantages are all alike, or
        zero, or their tokens are clipped, or too few beside the other weights that the loss gives them. False in every
        step: the advantages given here are not the shaped ones, or the mode is 'uniform'.

    Raises:
        RuntimeError: the loss does not see which tokens credit chose, is not made of `log_probs`, or had its backward.
        ValueError: tensors of other shapes, or a mask of other values.
    """
    shape = check_tensor("log_probs", log_probs).shape
    for name, value in (("advantages", advantages), ("response_mask", response_mask)):
        if not same_shape(check_tensor(name, value).shape, shape):
            raise ValueError(f"{name} must have the shape of log_probs, {tuple(shape)}, got {tuple(value.shape)}")
    if check_tensor("loss", loss).numel() != 1:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    if not ((response_mask == 0) | (response_mask == 1)).all():
        raise ValueError("response_mask must be bool or 0/1, got other values: advantages come before it")
    if not loss.requires_grad:
        return False
    gradient = _gradient(loss, log_probs) if log_probs.requires_grad else None
    if gradient is None:
        raise RuntimeError(
            "the loss is not made of log_probs, so credit does not reach it: give the tensor that it was made of, not "
            "a detached or a later one"
        )
    rows: tuple[Tensor, ...] = (advantages.detach(), gradient, response_mask.bool())
    if cu_seqlens is not None:
        lengths = check_tensor("cu_seqlens", cu_seqlens).diff().tolist()
        if sum(lengths) != log_probs.numel():
            total = log_probs.numel()
            raise ValueError(f"cu_seqlens must end with the {total} tokens of log_probs, got {sum(lengths)}")
        rows = tuple(pad_sequence(x.flatten().split(lengths), batch_first=True) for x in rows) if lengths else rows
    shaped, pulls, mask = rows
    slope, error = _line(shaped.double().abs().log(), pulls.double().abs().log(), mask & ~_is_rounded(pulls))
    if slope - _ERRORS * error > _BETWEEN:
        return True
    if slope + _ERRORS * error >= _BETWEEN:  # also where it is nowhere near certain
        return False
    slope, error = _line(-shaped.double() / shaped.abs().max(), pulls.double(), mask)
    if slope > 2 * _ERRORS * error:  # other terms pull harder at the same tokens, but credit shows beside them
        return True
    raise RuntimeError(
        "the loss does not see which tokens credit chose: within a response its gradient is no larger for tokens of "
        "larger advantage. It reads one advantage a response, or weighs a response by one ratio (GSPO, GMPO); credit "
        "needs a loss of token advantages and token ratios, or mode 'uniform' to train without"
    )


def _gradient(loss: Tensor, log_probs: Tensor) -> Tensor | None:
    try:
        return torch.autograd.grad(loss, log_probs, retain_graph=True, allow_unused=True)[0]
    except RuntimeError as error:
        if "a second time" not in str(error):
            raise
        raise RuntimeError("credit_is_seen must come before loss.backward(), which frees the loss's graph") from error


def _is_rounded(gradient: Tensor) -> Tensor:
    """To zero, or too coarsely to tell."""
    return gradient.abs() < torch.finfo(gradient.dtype).tiny


def _line(x: Tensor, y: Tensor, mask: Tensor) -> tuple[float, float]:
    """The slope of `y` over `x` within rows by least squares, and its standard error.

    Of the tokens where both are finite, each row around its own mean. An infinite error: nothing can be said. A slope
    of 0 without error: `y` is the same all over each row, but for rounding.
    """
    x, y, mask = torch.atleast_2d(x, y, mask & x.isfinite() & y.isfinite())
    count = mask.sum(dim=1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.where(mask, 0.0)
        return (values - values.sum(dim=1, keepdim=True) / count.clamp(min=1)).where(mask, 0.0)

    dx, dy = centred(x), centred(y)
    size = y.where(mask, 0.0).square().sum()
    xx, xy, yy, yy_before, tokens, rows = torch.stack(
        [dx.square().sum(), (dx * dy).sum(), dy.square().sum(), size, count.sum(), (count > 0).sum()]
    ).tolist()
    spare = tokens - rows - 1
    if xx <= _ALIKE * tokens or spare < _SPARE:
        return 0.0, torch.inf
    if yy <= _ROUNDING * yy_before:
        return 0.0, 0.0
    slope = xy / xx
    return slope, (max(yy - slope * xy, 0.0) / spare / xx) ** 0.5

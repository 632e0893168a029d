"""Shaped advantages, as a loss is given them that was not yet seen to heed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["OneValueAToken"]


class OneValueAToken(torch.Tensor):
    """Shaped advantages, `(B, T)`, as a loss is given them until it was seen to heed them.

    A loss that was written for one advantage a response adds a dimension to them, `(B, 1, T)`, by which those of one
    response would multiply the ratios of another: silently, as the shapes fit.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            given = next((x for x in args if isinstance(x, cls)), None)
            rows, tokens = (0, 0) if given is None else given.shape
            spread = rows > 1 and isinstance(result, Tensor) and result.shape == (rows, 1, tokens)
        if spread:
            raise RuntimeError(
                'under rhythm credit inputs["advantages"] are of tokens, (B, T), but the loss makes '
                f"{tuple(result.shape)} of them: let it unsqueeze them only where advantages.dim() == 1, as TRL's does"
            )
        return result

"""The log-sum-exp of the flash-attention packages, by the return flags of their own functions.

transformers keeps the functions of the package that is loaded (flash-attn 2, 3, 4, or a build from the kernels hub) in
module variables. During one attention call `FlashReturns` puts functions of ours in their place, which add the flag by
which the package returns its log-sum-exp, and give transformers the output alone. In versions 2 and 3, which compute
the log-sum-exp at every call, the flag changes no argument of the kernel. Version 4 computes it wherever gradients are
wanted; without gradients the flag picks the variant of its kernel that also stores it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

_FUNCTIONS = ("_flash_fn", "_flash_varlen_fn")
_FLAGS = ("return_lse", "return_softmax_lse", "return_attn_probs")
_SINKS = ("s_aux", "learnable_sink")


class FlashReturns:
    """Context manager around one attention call; afterwards it tells what the flash-attention function returned.

    Attributes:
        lse: float32 `(B, H, T)`, `(H, total)` for variable lengths; None where the function returned none.
        source: the function in words, or None.
        dtype: the dtype in which the function was given q; None where no function was called.
        has_sinks: whether the function was given attention sinks, so that `lse` holds them.
        has_softcap: whether it was given a softcap.
        called: whether a function of the package was called at all.
        cu_seqlens: int `(S + 1,)`, the bounds of the sequences as the function was given them; None: one a batch row.
        max_seqlen: at most how many tokens each of these has; None where the host was not told.
    """

    def __init__(self, implementation: str) -> None:
        self._implementation = implementation
        self._replaced: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        self.lse: Tensor | None = None
        self.source: str | None = None
        self.dtype: torch.dtype | None = None
        self.has_sinks = False
        self.has_softcap = False
        self.called = False
        self.cu_seqlens: Tensor | None = None
        self.max_seqlen: int | None = None

    def __enter__(self) -> FlashReturns:
        from transformers import modeling_flash_attention_utils as utils

        # Load the package now: in the call, that would put its own functions in the place of ours. Where it cannot be
        # loaded, the call raises the error itself, if it needs the package.
        with contextlib.suppress(Exception):
            utils.lazy_import_flash_attention(self._implementation)
        for name in _FUNCTIONS:
            function = getattr(utils, name)
            if function is not None:
                ours = self._returning(function, "varlen" in name)
                self._replaced[name] = function, ours
                setattr(utils, name, ours)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from transformers import modeling_flash_attention_utils as utils

        for name, (function, ours) in self._replaced.items():
            if getattr(utils, name) is ours:
                setattr(utils, name, function)

    def _returning(self, function: Callable[..., Any], varlen: bool) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters
        flags = {name: True for name in _FLAGS if name in parameters}

        @functools.wraps(function)
        def call(q: Tensor, *args: Any, **kwargs: Any) -> Any:
            # With dropout, version 2 would return a (T, T) mask as well.
            result = function(q, *args, **kwargs, **({} if kwargs.get("dropout_p") else flags))
            self.called, self.dtype, self.cu_seqlens = True, q.dtype, kwargs.get("cu_seqlens_q")
            longest = kwargs.get("max_seqlen_q")
            self.max_seqlen = longest if isinstance(longest, int) else None  # a tensor may be on the device
            self.has_softcap = bool(kwargs.get("softcap"))
            self.has_sinks = any(kwargs.get(name) is not None for name in _SINKS)
            if not isinstance(result, tuple):
                return result
            if len(result) > 1 and isinstance(result[1], Tensor) and result[1].dtype == torch.float32:
                self.lse, self.source = result[1], "flash-attn (varlen)" if varlen else "flash-attn"
            return result[0]

        return call

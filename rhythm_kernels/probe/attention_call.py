"""One call of a model's attention function: what it was given, and what was seen of its log-sum-exp while it ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import rhythm_attention
from .flash import FlashReturns
from .lse import LseObserver
from .readers import LseFrom, Reader


@dataclass(frozen=True)
class AttentionCall:
    """What transformers gives an attention function, beside the values.

    Attributes:
        layer: the layer of `module`, the attention module that makes the call.
        name, reader: the attention implementation, and what the probe knows of it.
        query, key: `(B, H, T, D)` and `(B, H_kv, T, D)`.
        mask: None, a `(B, 1, T, T)` tensor, or what else the implementation's mask function made.
        kwargs: the further arguments of the call.
    """

    layer: int
    name: str
    reader: Reader
    module: nn.Module
    query: Tensor
    key: Tensor
    mask: Any
    kwargs: dict[str, Any]

    @property
    def sinks(self) -> Tensor | None:
        return self.kwargs.get("s_aux")

    @property
    def softcap(self) -> float:
        return float(self.kwargs.get("softcap") or 0.0)

    @property
    def has(self) -> set[str]:
        """Which of "sinks" and "softcap" the layer's scores have."""
        given = {"sinks": self.sinks is not None, "softcap": bool(self.softcap)}
        return {name for name, there in given.items() if there}


@dataclass(frozen=True)
class Observed:
    """What looks on while an attention call runs; each tells afterwards what it saw.

    Attributes:
        operators, package: None where the implementation has none that returns a log-sum-exp.
        request: the statistics that our own attention function was asked for.
    """

    operators: LseObserver | None
    package: FlashReturns | None
    request: rhythm_attention.Request | None

    @property
    def lse_seen(self) -> LseObserver | FlashReturns | None:
        """Who saw a log-sum-exp; None: nobody did. The package's function comes before the operators under it."""
        seen = (self.package, self.operators)
        return next((observer for observer in seen if observer is not None and observer.lse is not None), None)


@contextmanager
def observing(name: str, reader: Reader, request: rhythm_attention.Request | None) -> Iterator[Observed]:
    """Around one call of the attention function: have looking on what its reader says."""
    package = FlashReturns(name) if reader.lse is LseFrom.PACKAGE else None
    operators = None if reader.lse is LseFrom.NOTHING else LseObserver()
    with ExitStack() as stack:
        if reader.lse is LseFrom.OURS:
            stack.enter_context(rhythm_attention.asking(request))
        for observer in (package, operators):
            if observer is not None:
                stack.enter_context(observer)
        yield Observed(operators, package, request)

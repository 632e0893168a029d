"""Meeting q, k and the log-sum-exp of chosen layers inside a model's own forward pass.

`Capture` is a context manager. Between the start and the end of each forward of the model's decoder it stands in the
attention registry, lets every attention call run as it would, and hands a consumer one `LayerCall` per chosen layer,
under `no_grad` and without autocast. Nothing of it outlives the call: the consumer reduces q and k and returns.

Outside of a forward nothing is installed, so the recomputation of gradient checkpointing, in the backward pass, is not
measured a second time. Forwards that are given a KV cache (`generate`, decoding) are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import rhythm_attention, taps
from .attention_call import AttentionCall, Observed, observing
from .checks import Checks, Pending
from .chunks import chunk_of, in_chunks
from .forward_sequences import ForwardInputs, Sequences, sequences_of
from .inputs import as_attended, forward_inputs, refuse_cut, refuse_dropped, refuse_unsupported
from .layer_call import LayerCall, layer_call, present
from .layer_window import left_window
from .readers import LseFrom, reader_of
from .structure import Decoder, bind_forward

_CACHES = ("cache", "past_key_values")  # what models call a KV cache since transformers 5.24, and before

_watching: dict[int, list[Capture]] = {}  # id of a decoder -> who watches it; the last one is told of its forwards


@dataclass(frozen=True)
class Wanted:
    """WAAD and span of certain query heads of a layer, as for `attention_with_rhythm`."""

    heads: Sequence[int]
    window: int
    per_head: bool


class Consumer(Protocol):
    """What a `Capture` tells of each forward: `begin`, `layer` for each chosen layer, then `end` or `abandon`."""

    def wants(self, layer: int) -> Wanted | None:
        """What the attention call of a layer should give along, if it can; its output may then be rounded otherwise."""

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        """Called before the forward; returns the `(B, T)` bool response mask or None."""

    def layer(self, call: LayerCall) -> None: ...

    def end(self) -> None: ...

    def abandon(self, reason: str) -> None:
        """The forward was not measured, and why."""


class Capture:
    """Watch `layers` of a decoder for `consumer`, inside a `with` block.

    With `aside=True` it may be entered inside of another capture's block, between two forwards: the other then sees no
    forwards until this one's block is left.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[int], consumer: Consumer, aside: bool = False) -> None:
        rhythm_attention.register()
        self._decoder = decoder
        self._consumer = consumer
        self._aside = aside
        self._layer_of = decoder.layer_of
        self._layers: list[int] = []
        self._modules: list[nn.Module] = []
        self._taps: dict[int, taps.Tap] = {}
        self._undo: list[Callable[[], None]] = []
        self._used: list[tuple[Any, str]] | None = None  # what is installed, while a forward is being measured
        self._depth = 0
        self._inputs: ForwardInputs | None = None
        self._response_mask: Tensor | None = None
        self._sequences: Sequences | None = None
        self._checks = Checks()
        self._pending: list[Pending] = []  # what the host does not know yet of earlier forwards
        self._met: set[int] = set()
        self.watch(layers)

    def watch(self, layers: Sequence[int]) -> None:
        """Choose other layers, from the next forward on."""
        if self._used is not None:
            raise RuntimeError("the layers to measure cannot be changed in the middle of a measured forward")
        self._layers = sorted(set(layers))
        self._modules = [self._decoder.attentions[layer] for layer in self._layers]
        self._taps = {id(module): self._tap for module in self._modules}

    def __enter__(self) -> Capture:
        others = _watching.setdefault(id(self._decoder.module), [])
        if others and not (self._aside and others[-1]._depth == 0):
            raise RuntimeError(
                "this model is already being measured: two probes cannot be nested on one model; leave the first "
                "block, or build one probe with the groups of both"
            )
        others.append(self)
        self._undo = self._decoder.on_forward(self._before, self._after)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        self._uninstall()
        self._depth = 0
        watchers = _watching[id(self._decoder.module)]
        watchers.remove(self)
        if not watchers:
            del _watching[id(self._decoder.module)]
        if error is None:
            self.examine()

    def examine(self, wait: bool = False) -> None:
        """Raise what the checks of earlier forwards found, as far as the answers have arrived; `wait`: wait for all."""
        while self._pending and self._pending[0].known(wait):
            self._pending.pop(0).raise_first()

    def require(self, answer: Tensor, error: Exception) -> None:
        """A check of the forward that is being measured, as of :class:`Checks`."""
        self._checks.require(answer, error)

    def valid(self, *results: Tensor) -> tuple[Tensor, ...]:
        """The results of this forward; all NaN if one of its checks failed whose answer the host cannot read yet."""
        answers = self._checks.answers(results[0].device)
        if answers is None:
            return results
        all_hold = answers.all()
        return tuple(torch.where(all_hold, x, float("nan")) for x in results)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1 or _watching[id(self._decoder.module)][-1] is not self:
            return
        self.examine()
        given = bind_forward(module, args, kwargs)
        if any(given.get(name) is not None for name in _CACHES):
            self._consumer.abandon("it was given a KV cache, as generate does; only forwards without one are measured")
            return
        self._inputs = forward_inputs(given)
        self._response_mask = self._consumer.begin(self._inputs)
        self._sequences = None
        self._checks = Checks()
        self._met = set()
        self._used = taps.install(self._taps, self._modules)

    def _after(self, failed: bool) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth or self._used is None:
            return
        inputs = self._inputs
        self._uninstall()
        if failed:
            self._consumer.abandon("it raised an exception")
            return
        missing = [layer for layer in self._layers if layer not in self._met]
        if missing:
            self._consumer.abandon("a layer of the groups did not call transformers' attention function")
            name = type(self._decoder.attentions[missing[0]]).__name__
            raise RuntimeError(
                f"layers {missing} ({name}) did not call the attention function of transformers' registry in this "
                "forward, so they cannot be measured: leave them out of the groups, or set another attn_implementation"
            )
        self._consumer.end()
        assert inputs is not None
        pending = self._checks.pending(inputs.device)
        if pending is not None:
            self._pending.append(pending)

    def _uninstall(self) -> None:
        if self._used is not None:
            taps.uninstall(self._taps, self._used)
        self._used = self._inputs = self._sequences = self._response_mask = None

    def _tap(
        self,
        function: taps.AttentionFunction,
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
    ) -> Any:
        call = AttentionCall(self._layer_of[id(module)], name, reader_of(name), module, query, key, mask, kwargs)
        refuse_unsupported(self._decoder, call)
        with observing(name, call.reader, self._request(call)) as seen:
            out = function(module, query, key, value, mask, **kwargs)
        refuse_dropped(call, seen.package)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            self._measure(call, seen)
        return out

    def _measure(self, call: AttentionCall, seen: Observed) -> None:
        """All that is done around one attention call once attention itself is through: ranges, checks, passes, sums.

        Benchmarks wrap this method to time it. No gradients, no autocast, and on CUDA no wait for the device.
        """
        layer, query = call.layer, call.query
        if layer in self._met:
            raise RuntimeError(
                f"layer {layer} attended twice in one forward; such models are not supported by the probe"
            )
        self._met.add(layer)
        assert self._inputs is not None
        if (query.shape[0], query.shape[2]) != (self._inputs.batch, self._inputs.length):
            refuse_cut(layer, query, self._inputs)
            raise ValueError(
                f"layer {layer} attends over {(query.shape[0], query.shape[2])} (batch, tokens), the model was "
                f"given {(self._inputs.batch, self._inputs.length)}: sequence-parallel layouts (Ulysses, ring "
                "attention) and prompts prepended inside the model are not supported by the probe"
            )
        if self._sequences is None:
            inputs = as_attended(self._inputs, call, seen.package)
            self._sequences = sequences_of(inputs, self._response_mask, call.reader.takes_lengths, self._checks)
        sequences = self._sequences
        # Without a (T, T) mask attention cannot end at a chunk; transformers refuses more than one chunk there.
        chunk = None if call.reader.takes_lengths else chunk_of(call.module, sequences.length)
        if chunk is not None:
            sequences = in_chunks(sequences, chunk)
        left = left_window(sequences, call, self._checks)
        self._consumer.layer(layer_call(call, seen, sequences, left, self._first_head(call), self._checks))

    def _first_head(self, call: AttentionCall) -> int:
        heads = call.query.shape[1]
        if self._decoder.shards is None or heads == self._decoder.heads[call.layer]:
            return 0
        return self._decoder.shards.rank * heads

    def _request(self, call: AttentionCall) -> rhythm_attention.Request | None:
        """What to ask of our own attention function, where it gives statistics at no cost; else None."""
        if call.reader.lse is not LseFrom.OURS:
            return None
        wanted = self._consumer.wants(call.layer)
        if wanted is None or not rhythm_attention.is_one_pass(call.query.device):
            return None
        heads = present(wanted.heads, self._first_head(call), call.query.shape[1])
        return rhythm_attention.Request(heads, wanted.window, wanted.per_head) if heads else None

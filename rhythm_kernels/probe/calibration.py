"""Calibration: which heads of a model look near and which far, by their span (eq. 7).

It streams: each layer of each batch is reduced inside its attention call, and what is kept is one number and one count
per head, for any number of sequences.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Head, HeadGroups, architecture
from ..passes import column_moments, span
from ..settings import RhythmSettings, check_quantile
from .capture import Capture, Wanted
from .checks import on_device
from .chunks import rows_after
from .forward_sequences import ForwardInputs
from .layer_call import LayerCall
from .structure import attention_layers, find_decoder

_DISTANCE = 4  # of the nearest later token whose attention counts as received


class NoResponseError(ValueError):
    """There were batches, and no response token in them: without one no head has a span."""


def head_groups(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: str | Sequence[int] = RhythmSettings.layers,
    quantile: float = RhythmSettings.head_quantile,
    *,
    by: str = "span",
) -> HeadGroups:
    """Calibrate: rank all heads of the sampled layers by their span (eq. 7) over `batches`.

    Args:
        model: a transformers causal language model; run without gradients, in eval mode (restored afterwards).
        batches: dicts of its inputs (`input_ids`, `attention_mask`, ...). R is `response_mask` `(B, T)` where
            given, else `labels != -100` where given, else all live tokens; from first to last True, holes included.
        layers: `"middle5"` (rounded five linspace points from `floor(L/3)` to `floor(2L/3)`), `"all"`, or a list.
        quantile: share of the heads in each group; a group has `max(1, round(quantile * n))` heads.
        by: how global heads are chosen: `"span"`, the largest spans; `"receiver"`, the largest kurtosis over tokens
            of the attention they get from later tokens (arXiv 2506.19143), mean over the responses. Local heads go
            by span.

    The mean of eq. 7 pools all response tokens of all batches; ties go by (layer, head). Batches are taken one at a
    time and not kept; what is kept is one number a head, so an iterator may be of any length. It may be called inside
    of a probe's block, between two forwards, unseen by the probe: `probe.groups = head_groups(model, batches)`.

    Raises:
        ValueError: no batch, no response token, a quantile outside (0, 1], or whatever a probe refuses.
    """
    calibration = Calibration(model, layers, quantile, by=by)
    one_logit = _one_logit(model, find_decoder(model).module)
    with evaluating(model), calibration:
        for batch in inputs_of(batches):
            inputs = dict(batch)
            calibration.response_mask = _response_mask(inputs)
            model(**{**one_logit, **inputs, "use_cache": False})
            calibration.examine()
    return calibration.groups()


def inputs_of(batches: Any) -> Iterator[Mapping[str, Any]]:
    """The batches, one at a time, once each is seen to be one."""
    wanted = "batches must be a list of dicts of model inputs, as in [{'input_ids': ids}], got"
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(f"{wanted} {type(batches).__name__}")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(f"{wanted} {type(batch).__name__} among them")
        yield batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block without gradients and without dropout; afterwards every module is in the mode that it was in."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def _one_logit(model: nn.Module, decoder: nn.Module) -> dict[str, int]:
    """The argument by which the model computes only the last token's logits, where it and its wrapper take it by name.

    Not where the decoder takes it too: Gemma 4's then computes its last layers, those that share keys and values, for
    the last token alone, and a calibration needs all tokens.
    """
    from transformers import PreTrainedModel

    name, outer = "logits_to_keep", next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    taken = inspect.signature(model.forward).parameters.values()
    passed = any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in taken)
    passed = passed and name in inspect.signature(outer.forward).parameters
    return {name: 1} if passed and name not in inspect.signature(decoder.forward).parameters else {}


def _response_mask(inputs: dict[str, Any]) -> Tensor | None:
    """Take what marks R out of the model's inputs."""
    mask, labels = inputs.pop("response_mask", None), inputs.pop("labels", None)
    if mask is None and labels is not None:
        mask = labels != -100
    return mask


class Calibration:
    """Context manager that adds up the spans of all forwards of `model` inside its block, whoever makes them.

        with evaluating(model), Calibration(model) as calibration:
            for batch in batches:
                calibration.response_mask = batch.pop("response_mask")
                model(**batch, use_cache=False)
        groups = calibration.groups()

    It may be entered inside of a probe's block, between two forwards, which the probe then does not see. It changes no
    mode of the model: what dropout does to a forward is in its spans.

    Args:
        model, layers, quantile, by: as for :func:`head_groups`.

    Attributes:
        response_mask: `(B, T)` bool, R of the next forward, as for `RhythmProbe`; None: all live tokens.

    Raises:
        TypeError, ValueError: as :func:`head_groups`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[int] = RhythmSettings.layers,
        quantile: float = RhythmSettings.head_quantile,
        *,
        by: str = "span",
    ) -> None:
        check_quantile("quantile", quantile)
        if by not in ("span", "receiver"):
            raise ValueError(f"by must be 'span' or 'receiver', got {by!r}")
        self.response_mask: Tensor | None = None
        self._quantile, self._by = quantile, by
        self._decoder = find_decoder(model)
        sampled = attention_layers(self._decoder, layers)
        self._heads_of = {layer: self._decoder.heads[layer] for layer in sampled}
        self._span = {layer: torch.zeros(n, dtype=torch.float64) for layer, n in self._heads_of.items()}
        self._kurtosis = {layer: torch.zeros(n, dtype=torch.float64) for layer, n in self._heads_of.items()}
        self._tokens = self._sequences = self._responses = 0
        self._device = torch.device("cpu")
        self._capture = Capture(self._decoder, sampled, self, aside=True)

    def __enter__(self) -> Calibration:
        self._capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.__exit__(kind, error, trace)
        if error is None:
            self.examine()

    def examine(self) -> None:
        """Wait for the forwards made so far, and raise what of them could not be measured."""
        self._capture.examine(wait=True)

    def add_up(self, reduce: Callable[[Tensor], Tensor | None]) -> None:
        """Let the tally be that of all processes, each of which met a part of the batch.

        Args:
            reduce: sums a float64 vector over the processes, and returns it or works in place.
        """
        counts = [self._tokens, self._sequences, self._responses]
        tallied = [*self._span.values(), *self._kurtosis.values()]
        local = torch.cat([*tallied, torch.tensor(counts, dtype=torch.float64)]).to(self._device)
        reduced = reduce(local)
        sums = (local if reduced is None else reduced).cpu().split([*map(len, tallied), len(counts)])
        for mine, of_all in zip(tallied, sums):
            mine.copy_(of_all)
        self._tokens, self._sequences, self._responses = map(int, sums[-1])

    def groups(self) -> HeadGroups:
        """The heads ranked by all that was tallied; on every tensor-parallel rank the same.

        Raises:
            ValueError: no response token was met.
        """
        spans, kurtosis = self.scores()
        count = max(1, round(self._quantile * len(spans)))
        by_span = sorted(spans, key=lambda head: (spans[head], head))
        # Local and global heads are the two ends of one order, in which equal spans are ordered by (layer, head).
        local, global_ = by_span[:count], by_span[-count:]
        if self._by == "receiver":
            global_ = sorted(spans, key=lambda head: (kurtosis[head], head))[-count:]
        config = self._decoder.config
        provenance = {
            "architecture": architecture(config),
            "config_hash": _config_hash(config),
            "model_name": getattr(config, "_name_or_path", "") or type(self._decoder.module).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "layers": list(self._heads_of),
            "quantile": self._quantile,
            "by": self._by,
            "calibration": {"sequences": self._sequences, "response_tokens": self._tokens},
            "span": {"local": [spans[head] for head in local], "global": [spans[head] for head in global_]},
        }
        return HeadGroups(local, global_, provenance)

    def scores(self) -> tuple[dict[Head, float], dict[Head, float]]:
        """Each head's span, in tokens, and its kurtosis, which is 0 unless heads are chosen by it.

        Raises:
            ValueError: no response token was met.
        """
        if not self._tokens:
            kind = NoResponseError if self._sequences else ValueError
            raise kind("batches must hold response tokens, got no response token: without one no head has a span")
        return self._means(self._span, self._tokens), self._means(self._kurtosis, max(self._responses, 1))

    def _means(self, sums: dict[int, Tensor], count: int) -> dict[Head, float]:
        """Per head, the sum over all tensor-parallel ranks by `count`: eq. 7, in tokens, for the spans."""
        if self._decoder.shards is not None:
            shards = self._decoder.shards
            sums = {layer: shards.sum(x.to(self._device, copy=True)) for layer, x in sums.items()}
        return {(layer, head): value / count for layer, x in sums.items() for head, value in enumerate(x.tolist())}

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self._device = inputs.device
        shape = (inputs.batch, inputs.length)
        if self.response_mask is None:
            return None
        if not isinstance(self.response_mask, Tensor) or tuple(self.response_mask.shape) != shape:
            found = getattr(self.response_mask, "shape", type(self.response_mask).__name__)
            raise ValueError(f"response_mask must be a tensor of the shape {shape} of input_ids, got {found}")
        return on_device(self.response_mask, inputs.device)

    def wants(self, layer: int) -> Wanted:
        """The span of every head: a calibration's own forward may be computed by any kernel."""
        return Wanted(range(self._heads_of[layer]), 1, per_head=True)

    def layer(self, call: LayerCall) -> None:
        heads = call.present(range(self._heads_of[call.layer]))
        here = slice(call.first_head, call.first_head + len(heads))
        # (B, H, T), 0 outside R
        spans = call.measure(span, heads, per_head=True) if call.stats is None else call.stats.span
        self._span[call.layer][here] += spans.double().sum(dim=(0, 2)).cpu()
        if self._by == "receiver":
            self._add_kurtosis(call, heads, here)
        if call.layer == min(self._heads_of):
            self._tokens += int(call.sequences.response.sum())
            self._sequences += _sequences(call).shape[0]

    def _add_kurtosis(self, call: LayerCall, heads: list[int], here: slice) -> None:
        moments = column_moments(call.form(heads), _DISTANCE, per_head=True)
        mean, count = call.of_all_rows(call.unpack(moments.mean), _DISTANCE, None), call.unpack(moments.count)
        rows = rows_after(call.sequences, _DISTANCE, None)
        if rows is not None:  # rows behind the chunk count too: a token at a chunk's end receives a mean of 0
            count = rows[1].to(count.device)[:, None].expand_as(count)
        for batch_row, start, end in _sequences(call).tolist():
            counted = count[batch_row, 0, start:end] > 0
            if int(counted.sum()) < 2:
                continue
            received = mean[batch_row, :, start:end][:, counted].double()
            centred = received - received.mean(dim=1, keepdim=True)
            variance = centred.square().mean(dim=1)
            kurtosis = torch.where(variance > 0, centred.pow(4).mean(dim=1) / variance.square(), 0.0)
            self._kurtosis[call.layer][here] += kurtosis.cpu()
            self._responses += call.layer == min(self._heads_of)

    def end(self) -> None:
        """Nothing is left to do: each layer was added in its call."""

    def abandon(self, reason: str) -> None:
        """Raise: a calibration must not silently lack a batch."""
        if "exception" not in reason:
            raise ValueError(f"a batch was not measured, because {reason}")


def _sequences(call: LayerCall) -> Tensor:
    """`(S, 3)` batch row, start, end: of a padded batch all sequences, of a packed one those that hold a token."""
    bounds = call.sequences.bounds
    return bounds[bounds[:, 2] > bounds[:, 1]] if call.sequences.packed else bounds


def _config_hash(config: Any) -> str:
    """SHA-256 of the configuration, without what may change while the model stays the same."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
    content = {k: v for k, v in config.to_dict().items() if k not in volatile and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

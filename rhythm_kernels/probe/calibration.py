"""Calibration: which heads of a model look near and which far, by their span (eq. 7).

It streams: each layer of each batch is reduced inside its attention call, and what is kept is one number and one count
per head, for any number of sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import Head, HeadGroups, architecture
from ..passes import column_moments, span
from .capture import Capture, LayerCall, Wanted
from .checks import on_device
from .masks import ForwardInputs
from .structure import HeadShards, attention_layers, find_decoder


def head_groups(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    layers: str | Sequence[int] = "middle5",
    quantile: float = 0.3,
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
    if not isinstance(quantile, int | float):
        raise TypeError(f"quantile: {quantile!r}, must be a number in (0, 1]")
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: {quantile!r}, must be in (0, 1]")
    if by not in ("span", "receiver"):
        raise ValueError(f"by: {by!r}, must be 'span' or 'receiver'")
    decoder = find_decoder(model)
    sampled = attention_layers(decoder, layers)
    tally = _Tally({layer: decoder.heads[layer] for layer in sampled}, by == "receiver", decoder.shards)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with Capture(decoder, sampled, tally, aside=True) as capture, torch.no_grad():
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise TypeError(
                        "batches must be a list of dicts of model inputs, as in [{'input_ids': ids}], "
                        f"got {type(batches).__name__} of {type(batch).__name__}"
                    )
                inputs = dict(batch)
                tally.response_mask = _response_mask(inputs)
                model(**{**inputs, "use_cache": False})
                capture.examine(wait=True)
    finally:
        for module in was_training:
            module.training = True
    if not tally.tokens:
        raise ValueError("batches: no response token in any of them, so no head has a span")
    tally.gather()
    count = max(1, round(quantile * len(tally.heads)))
    spans = tally.mean_span()
    by_span = sorted(tally.heads, key=lambda head: (spans[head], head))
    # Equal scores are ordered by (layer, head), so the ranks from the top are those of one ascending order.
    local, global_ = by_span[:count], by_span[-count:]
    if by == "receiver":
        kurtosis = tally.mean_kurtosis()
        global_ = sorted(tally.heads, key=lambda head: (kurtosis[head], head))[-count:]
    provenance = {
        "architecture": architecture(decoder.config),
        "config_hash": _config_hash(decoder.config),
        "model_name": getattr(decoder.config, "_name_or_path", "") or type(decoder.module).__name__,
        "revision": getattr(decoder.config, "_commit_hash", None),
        "layers": sampled,
        "quantile": quantile,
        "by": by,
        "calibration": {"sequences": tally.sequences, "response_tokens": tally.tokens},
        "span": {"local": [spans[head] for head in local], "global": [spans[head] for head in global_]},
    }
    return HeadGroups(local, global_, provenance)


def _response_mask(inputs: dict[str, Any]) -> Tensor | None:
    """Take what marks R out of the model's inputs."""
    mask, labels = inputs.pop("response_mask", None), inputs.pop("labels", None)
    if mask is None and labels is not None:
        mask = labels != -100
    return mask


class _Tally:
    """Sums over all response tokens of all batches, per head; a `Consumer` of the capture."""

    def __init__(self, heads_of: dict[int, int], receiver: bool, shards: HeadShards | None) -> None:
        self.heads: list[Head] = [(layer, head) for layer, n in heads_of.items() for head in range(n)]
        self.response_mask: Tensor | None = None
        self.tokens = 0
        self.sequences = 0
        self._first = min(heads_of)
        self._heads_of = heads_of
        self._span = {layer: torch.zeros(n, dtype=torch.float64) for layer, n in heads_of.items()}
        self._kurtosis = {layer: torch.zeros(n, dtype=torch.float64) for layer, n in heads_of.items()}
        self._responses = 0
        self._receiver = receiver
        self._shards = shards
        self._device = torch.device("cpu")

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        self._device = inputs.device
        shape = (inputs.batch, inputs.length)
        if self.response_mask is None:
            return None
        if not isinstance(self.response_mask, Tensor) or tuple(self.response_mask.shape) != shape:
            found = getattr(self.response_mask, "shape", type(self.response_mask).__name__)
            raise ValueError(f"response_mask: {found}, must be a tensor of shape {shape} like input_ids")
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
        if self._receiver:
            self._add_kurtosis(call, heads, here)
        if call.layer == self._first:
            self.tokens += int(call.sequences.response.sum())
            self.sequences += _sequences(call).shape[0]

    def _add_kurtosis(self, call: LayerCall, heads: list[int], here: slice) -> None:
        moments = column_moments(call.form(heads), per_head=True)
        mean, count = call.unpack(moments.mean), call.unpack(moments.count)
        for row, start, end in _sequences(call).tolist():
            counted = count[row, 0, start:end] > 0
            if int(counted.sum()) < 2:
                continue
            received = mean[row, :, start:end][:, counted].double()
            centred = received - received.mean(dim=1, keepdim=True)
            variance = centred.square().mean(dim=1)
            kurtosis = torch.where(variance > 0, centred.pow(4).mean(dim=1) / variance.square(), 0.0)
            self._kurtosis[call.layer][here] += kurtosis.cpu()
            self._responses += call.layer == self._first

    def end(self) -> None:
        """Nothing is left to do: every layer was added when it was met."""

    def abandon(self, reason: str) -> None:
        """A batch that was not measured must not silently miss from the calibration."""
        if "exception" not in reason:
            raise ValueError(f"batches: a batch was not measured, because {reason}")

    def gather(self) -> None:
        """Bring the heads of all tensor-parallel ranks together, on every rank."""
        if self._shards is not None:
            for sums in (*self._span.values(), *self._kurtosis.values()):
                sums.copy_(self._shards.sum(sums.to(self._device)))

    def mean_span(self) -> dict[Head, float]:
        """Eq. 7, in tokens."""
        return {(layer, head): float(self._span[layer][head]) / self.tokens for layer, head in self.heads}

    def mean_kurtosis(self) -> dict[Head, float]:
        """The receiver score."""
        responses = max(self._responses, 1)
        return {(layer, head): float(self._kurtosis[layer][head]) / responses for layer, head in self.heads}


def _sequences(call: LayerCall) -> Tensor:
    """`(S, 3)` row, start, end: the rows of a padded batch, the sequences of a packed one that hold a token."""
    bounds = call.sequences.bounds
    return bounds[bounds[:, 2] > bounds[:, 1]] if call.sequences.packed else bounds


def _config_hash(config: Any) -> str:
    """SHA-256 of the configuration, without what may change while the model stays the same."""
    volatile = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
    content = {k: v for k, v in config.to_dict().items() if k not in volatile and not k.startswith("_attn")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

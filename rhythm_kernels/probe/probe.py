"""`RhythmProbe`: WAAD and FAI of a transformers model from inside its own forward pass."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from ..arguments import check_horizon, check_window
from ..heads import HeadGroups
from ..passes import fai, waad
from ..settings import RhythmSettings
from .capture import Capture
from .checks import on_device
from .forward_sequences import ForwardInputs
from .layer_call import LayerCall
from .structure import find_decoder


class RhythmProbe:
    """Context manager that measures every forward of `model` inside its block.

        with RhythmProbe(model, groups) as probe:
            logits = model(input_ids, attention_mask=mask).logits
        probe.waad, probe.fai  # (B, T) float32

    In each layer of the groups, q and k (after rotary embedding, as the attention function receives them) are reduced
    within the attention call to sums over the group's heads (eq. 8: the plain mean over all heads of a group) and never
    kept. The model's outputs and gradients are bit for bit those without the probe. Measured is a forward without a KV
    cache from outside; `generate` and its steps (all of which are given a cache) pass untouched, as do other
    models and the recomputation of gradient checkpointing. Not thread-safe.

    Args:
        model: a transformers causal language model, also wrapped (DDP, FSDP, PEFT, `torch.compile` without
            `fullgraph`) or tensor-parallel by its `tp_plan` (every rank gets the same results).
        groups: which heads are local (WAAD) and global (FAI). Groups that `head_groups` saved for another
            architecture are refused; groups built by hand are accepted where their indices fit. May be set anew
            between forwards, as in `probe.groups = head_groups(model, batches)` every few steps of training.
        window: W of eq. 9, in tokens.
        horizon: `(H_lo, H_hi)` of eq. 10, in tokens; `H_hi = None` runs to the end of the response.
        response_mask: `(B, T)` bool (or 0/1): R of a batch row runs from its first to its last True, holes included.
            May be set anew before each forward. Default: all live tokens. Packed batches: `(1, total)`, first to last
            True of each sequence.

    Attributes:
        waad, fai: `(B, T)` float32 in the layout of `input_ids`, of the latest forward, 0 outside R; readable after the
            block. `RuntimeError` where no forward was measured.
        lse_source: layer -> where the log-sum-exp of the latest forward came from: the model's own attention operator,
            or our streaming pass.

    Raises:
        TypeError, ValueError: at construction, for groups that do not fit the model, numbers out of range, and models
            without softmax attention that goes through transformers' registry; in the forward, for masks and layouts
            that cannot be measured (custom masks, sharded sequences, sinks under sdpa, ...).
        RuntimeError: for two probes on one model at the same time, and for entering one twice.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: HeadGroups,
        window: int = RhythmSettings.window,
        horizon: tuple[int, int | None] = RhythmSettings.horizon,
        response_mask: Tensor | None = None,
    ) -> None:
        _check_groups(groups)
        self.window = check_window(window)
        self.horizon = check_horizon(horizon)
        self._decoder = find_decoder(model)
        self._decoder.check(groups)
        self._groups = groups
        self.response_mask = response_mask
        self.lse_source: dict[int, str] = {}
        self._local = _by_layer(groups.local)
        self._global = _by_layer(groups.global_)
        self._capture = Capture(self._decoder, [*self._local, *self._global], self)
        self._entered = False
        self._sums: tuple[Tensor, Tensor] | None = None
        self._results: tuple[Tensor, Tensor] | None = None
        self._why_none = "no forward was made inside of its block"

    def __enter__(self) -> RhythmProbe:
        if self._entered:
            raise RuntimeError("this probe was entered before: its results stay with it, build a new RhythmProbe")
        self._capture.__enter__()
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.__exit__(kind, error, trace)

    @property
    def groups(self) -> HeadGroups:
        """Which heads are measured. Settable between forwards, also inside of the block: see `head_groups`."""
        return self._groups

    @groups.setter
    def groups(self, groups: HeadGroups) -> None:
        _check_groups(groups)
        self._decoder.check(groups)
        local, global_ = _by_layer(groups.local), _by_layer(groups.global_)
        self._capture.watch([*local, *global_])
        self._groups, self._local, self._global = groups, local, global_

    @property
    def waad(self) -> Tensor:
        """`(B, T)` float32: windowed average attention distance (eq. 9), mean over the local heads, in tokens."""
        return self._result(0)

    @property
    def fai(self) -> Tensor:
        """`(B, T)` float32: future attention influence (eq. 10), mean over the global heads."""
        return self._result(1)

    def _result(self, which: int) -> Tensor:
        if self._results is None:
            raise RuntimeError(f"the probe has nothing to read: {self._why_none}")
        self._capture.examine()
        return self._results[which]

    def begin(self, inputs: ForwardInputs) -> Tensor | None:
        """Start the sums of a forward."""
        shape = (inputs.batch, inputs.length)
        mask = self.response_mask
        if mask is not None:
            if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
                found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(
                    f"response_mask must have the shape {shape} of this forward's tokens, got {found}: set "
                    "probe.response_mask before each forward of another shape"
                )
            mask = on_device(mask, inputs.device)
        self._sums = (
            torch.zeros(shape, dtype=torch.float32, device=inputs.device),
            torch.zeros(shape, dtype=torch.float32, device=inputs.device),
        )
        self.lse_source = {}
        return mask

    def wants(self, layer: int) -> None:
        """Nothing: a kernel that also takes statistics may round its output otherwise, and the model's must not change.

        With the log-sum-exp, WAAD costs a band of keys.
        """

    def layer(self, call: LayerCall) -> None:
        """Add one layer's heads to the sums; the layer's device may differ from the tokens' (`device_map`)."""
        assert self._sums is not None
        self.lse_source[call.layer] = call.source
        waad_sum, fai_sum = self._sums
        local = call.present(self._local.get(call.layer, []))
        global_ = call.present(self._global.get(call.layer, []))
        if local:
            mean = call.measure(waad, local, window=self.window)
            waad_sum.add_(mean.to(waad_sum.device), alpha=len(local))
        if global_:
            mean = call.of_all_rows(call.measure(fai, global_, horizon=self.horizon), *self.horizon)
            fai_sum.add_(mean.to(fai_sum.device), alpha=len(global_))

    def end(self) -> None:
        """Turn the sums, over all ranks that share the heads, into means over each group's heads."""
        assert self._sums is not None
        waad_sum, fai_sum = self._sums
        if self._decoder.shards is not None:
            waad_sum, fai_sum = self._decoder.shards.sum(torch.stack(self._sums))
        heads = (sum(map(len, layers.values())) for layers in (self._local, self._global))
        waad_, fai_ = self._capture.valid(waad_sum / next(heads), fai_sum / next(heads))
        self._results = waad_, fai_
        self._sums = None

    def abandon(self, reason: str) -> None:
        """Keep no half results: the latest forward has none, and reading says why."""
        self._sums = self._results = None
        self._why_none = f"the latest forward was not measured, because {reason}"


def _check_groups(groups: object) -> None:
    if not isinstance(groups, HeadGroups):
        raise TypeError(
            f"groups must be HeadGroups, got {type(groups).__name__}: make them by head_groups, HeadGroups.load or hand"
        )


def _by_layer(heads: list[tuple[int, int]]) -> dict[int, list[int]]:
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).append(head)
    return layers

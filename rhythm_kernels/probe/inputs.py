"""What a forward and its attention calls were given, and the errors that name what of it cannot be measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .alibi import WAY_OUT
from .attention_call import AttentionCall
from .checks import on_device, reads_now
from .flash import FlashReturns
from .forward_sequences import ForwardInputs
from .range_mask import RangeMask
from .structure import Decoder


def forward_inputs(given: dict[str, Any]) -> ForwardInputs:
    """What of a forward's arguments, by name, decides which token sees which."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if not isinstance(tokens, Tensor):
        raise ValueError(f"input_ids or inputs_embeds must be a tensor, got {type(tokens).__name__}")
    mask = given.get("attention_mask")
    ready = isinstance(mask, dict) and all(one is None for one in mask.values())  # a layer type's mask each: none
    if ready:
        mask = None
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            "attention_mask must be the two-dimensional (B, T) mask from which transformers makes its own, got "
            f"{found}: models that make their masks outside of their language model are not supported by the probe"
        )
    if tokens.device.type == "meta":
        raise ValueError("input_ids must hold values, got a tensor on the meta device: there is nothing to measure")
    batch, length = tokens.shape[:2]
    if mask is not None and tuple(mask.shape) != (batch, length):
        raise ValueError(f"attention_mask must have the tokens' shape {(batch, length)}, got {tuple(mask.shape)}")
    return ForwardInputs(
        batch=batch,
        length=length,
        device=tokens.device,
        attention_mask=None if mask is None else on_device(mask, tokens.device),
        position_ids=given.get("position_ids"),
        cu_seqlens=given.get("cu_seq_lens_q"),
        packs_positions=not ready,  # transformers takes ready masks as they are, whatever the positions
        logits_to_keep=given.get("logits_to_keep"),
    )


def as_attended(inputs: ForwardInputs, call: AttentionCall, package: FlashReturns | None) -> ForwardInputs:
    """The forward's inputs, as the first measured attention call shows that transformers understood them.

    Where the host may not read from the device, the call's mask tells it what transformers found there.
    """
    if package is not None and package.called:  # the sequences that the kernel kept apart are those it was given
        inputs = replace(inputs, cu_seqlens=package.cu_seqlens, max_seqlen=package.max_seqlen, packs_positions=False)
    if reads_now(inputs.device):
        return inputs
    if call.reader.takes_lengths:
        return replace(inputs, unmasked_under=call.name if call.mask is None else None)
    if call.mask is None or (isinstance(call.mask, RangeMask) and not call.mask.packed):
        return replace(inputs, packs_positions=False)
    return inputs


def refuse_unsupported(decoder: Decoder, call: AttentionCall) -> None:
    """Raise for attention that is not the softmax this package measures, naming what it is."""
    layer, heads = call.layer, decoder.heads[call.layer]
    present = call.query.shape[1]
    sharded = decoder.shards is not None and present * decoder.shards.size == heads
    if present != heads and not sharded:
        raise ValueError(
            f"layer {layer} attends with {present} query heads of the model's {heads}: of heads sharded over "
            "ranks, only transformers' own tensor parallelism (tp_plan) is supported by the probe"
        )
    if any("alibi" in argument and value is not None for argument, value in call.kwargs.items()):
        raise ValueError(f"layer {layer} adds ALiBi to its scores, which the probe does not support: {WAY_OUT}")
    if call.kwargs.get("position_bias") is not None:
        raise ValueError(f"layer {layer} adds a position bias to its scores, which the probe does not support")
    if call.kwargs.get("is_causal") is False:
        raise ValueError(f"layer {layer} is not causal (is_causal=False); the measures are of causal attention")
    _refuse(call, call.has & call.reader.drops, f"{call.name!r} silently leaves")


def refuse_cut(layer: int, query: Tensor, inputs: ForwardInputs) -> None:
    """Raise where a layer computes only the tokens that logits are wanted of."""
    kept = inputs.logits_to_keep
    if isinstance(kept, int) and query.shape[2] == kept < inputs.length:
        raise ValueError(
            f"logits_to_keep must be left out of this model's measured forwards, got {kept}: it computes layer {layer} "
            f"for the last {kept} of {inputs.length} tokens alone, and the measures are of all; slice the logits"
        )


def refuse_dropped(call: AttentionCall, package: FlashReturns | None) -> None:
    """transformers leaves sinks and softcap out silently where the package's function has no parameter for them."""
    if package is not None and package.called:
        taken = {"sinks": package.has_sinks, "softcap": package.has_softcap}
        dropped = {name for name in call.has if not taken[name]}
        _refuse(call, dropped, f"the {call.name!r} package installed here leaves")


def _refuse(call: AttentionCall, dropped: set[str], who: str) -> None:
    for name, what in (("sinks", "attention sinks"), ("softcap", "a softcap")):
        if name in dropped:
            raise ValueError(
                f"layer {call.layer} has {what}, which {who} out: use attn_implementation='eager' or 'rhythm'"
            )

"""Every causal language model type of the installed transformers: measured right, or refused by name, never wrong.

The types come from transformers' own mapping, so a new release brings its new ones: they pass where they are measured
right or refused by name, and what was measured before must stay so.
"""

from __future__ import annotations

import re
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers

import rhythm_kernels
from rhythm_kernels import HeadGroups, RhythmProbe
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe.structure import find_decoder

from . import causal_types
from .causal_outcomes import EXCEPT, MEASURED, expected
from .probe_oracle import oracle, padded_bounds

IMPLEMENTATIONS = ("eager", "sdpa", "rhythm")
HORIZON = (3, 20)
LENGTH, PADDING = 40, 6
# Their eager attention scales its output by the sink's share and returns the maps without it.
MAPS_WITHOUT_SINKS = {"granite_swa", "granitemoe_swa"}
OURS = str(Path(rhythm_kernels.__file__).parent / "probe")
THEIRS = str(Path(transformers.__file__).parent)
# What transformers itself says where a type has no such implementation.
NOT_OFFERED = re.compile("does not support an attention implementation through torch.nn.functional")


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    mask[2, -PADDING:] = 0
    ids = torch.randint(3, causal_types.VOCABULARY - 7, (3, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": mask}


def in_words(error: Exception) -> str:
    """An error as an outcome: ours are refusals, with what they say; anything else is raw."""
    raised = traceback.extract_tb(error.__traceback__)[-1]
    named = raised.filename.startswith(OURS) and not isinstance(error, KeyError | IndexError | AssertionError)
    where = f"{Path(raised.filename).name}:{raised.lineno}"
    return f"refused: {error}" if named else f"raw error: {type(error).__name__} at {where}: {error}"


@contextmanager
def maps_with_sinks(model_type, model):
    """Of `MAPS_WITHOUT_SINKS`: the eager function's maps times the share that the sink leaves to the keys."""
    if model_type not in MAPS_WITHOUT_SINKS:
        yield
        return
    file = sys.modules[type(model).__module__]
    original = file.eager_attention_forward

    def with_sinks(module, query, key, value, mask, scaling, **kwargs):
        out, maps = original(module, query, key, value, mask, scaling, **kwargs)
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).double()
        logits = query.double() @ keys.transpose(2, 3) * scaling + (0 if mask is None else mask.double())
        share = torch.sigmoid(logits.logsumexp(-1) - module.sinks.double()[:, None])
        return out, maps.double() * share[..., None]

    file.eager_attention_forward = with_sinks
    try:
        yield
    finally:
        file.eager_attention_forward = original


def eager_maps(model_type, model, decoder, inputs):
    """Layer -> `(B, H, T, T)` float64, of `output_attentions`: maps of every layer, or of those with attention."""
    with torch.no_grad(), maps_with_sinks(model_type, model):
        maps = model(**inputs, output_attentions=True).attentions
    if len(maps) == decoder.num_layers or len(maps) > len(decoder.attentions):
        return {layer: one.double() for layer, one in enumerate(maps) if one is not None}
    return dict(zip(sorted(decoder.attentions), (one.double() for one in maps)))


def measure(model, decoder, maps, inputs, implementation) -> str:
    """The outcome of one implementation."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        if NOT_OFFERED.search(str(error)):
            return "not offered by transformers"
        raise
    layers = sorted(decoder.attentions)
    groups = HeadGroups([(layer, 0) for layer in layers], [(layer, decoder.heads[layer] - 1) for layer in layers])
    try:
        with torch.no_grad():
            plain = model(**inputs).logits
            with RhythmProbe(model, groups, horizon=HORIZON) as probe:
                logits = model(**inputs).logits
    except Exception as error:
        return in_words(error)
    if not torch.equal(logits, plain):
        return "wrong: the model's logits are not those without a probe"
    results = oracle(maps, groups, padded_bounds(inputs["attention_mask"]), horizon=HORIZON)
    off = max(float((got.double() - right).abs().max()) for got, right in zip((probe.waad, probe.fai), results))
    something = min(float(got.sum()) for got in (probe.waad, probe.fai)) > 0
    return "measured" if off < 1e-4 and something else f"wrong: off by {off:.1e}"


def outcomes(model_type: str) -> dict[str, str]:
    """Implementation -> what became of it."""
    register()
    try:
        model = causal_types.build(model_type)
    except Exception as error:
        return dict.fromkeys(IMPLEMENTATIONS, f"cannot be built: {type(error).__name__}: {error}")
    inputs = {**batch(), "use_cache": False}
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return dict.fromkeys(IMPLEMENTATIONS, f"cannot run: {type(error).__name__}: {error}")
    try:
        decoder = find_decoder(model)
    except Exception as error:
        return dict.fromkeys(IMPLEMENTATIONS, in_words(error))
    maps = eager_maps(model_type, model, decoder, inputs)
    return {name: measure(model, decoder, maps, inputs, name) for name in IMPLEMENTATIONS}


@pytest.mark.long
@pytest.mark.parametrize("model_type", sorted({*causal_types.TYPES, *MEASURED, *EXCEPT}))
def test_type(model_type, record_property):
    if model_type not in causal_types.TYPES:
        record_property("outcome", "not in this transformers")
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    found = outcomes(model_type)
    kinds = {outcome.partition(":")[0] for outcome in found.values()} - {"not offered by transformers"}
    record_property("outcome", next(iter(kinds)) if len(kinds) == 1 else "measured under some")
    for implementation, outcome in found.items():
        kind, _, _ = outcome.partition(":")
        assert kind not in ("wrong", "raw error"), f"{implementation}: {outcome}"
        right = expected(model_type, implementation, before=not causal_types.is_of_table())
        if right is None or outcome == "not offered by transformers":  # a new type: whatever it is, it is told
            continue
        if kind in ("cannot be built", "cannot run") and not causal_types.is_of_table():
            pytest.skip(f"with transformers {transformers.__version__} it {outcome}")
        kind_expected, _, words = right.partition(": ")
        assert kind == kind_expected and words in outcome, f"{implementation}: {outcome}; expected {right}"

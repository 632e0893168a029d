"""Layers that share keys and values (Gemma 4, Gemma 3n): measured for all tokens, whichever the logits are wanted of.

Since transformers 5.24, Gemma 4 computes such layers for the last `logits_to_keep` tokens alone.
"""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers

from rhythm_kernels import HeadGroups, RhythmProbe, functional, head_groups
from rhythm_kernels.integrations.transformers import register
from rhythm_kernels.probe import rhythm_attention
from rhythm_kernels.probe.calibration import Calibration, evaluating

from . import causal_types
from . import probe_models as models
from .probe_oracle import eager_maps, kurtoses, oracle, padded_bounds, spans

register()
LAYERS = 4  # the last two attend with the keys and values of the first two
GROUPS = HeadGroups(local=[(0, 1), (2, 0), (3, 3)], global_=[(1, 0), (2, 2), (3, 1)])
TYPES = ["gemma3n_text", "gemma4_text", "gemma4_unified_text"]
IMPLEMENTATIONS = ["eager", "sdpa", "rhythm"]


def built(model_type, implementation):
    model = causal_types.build(model_type)
    assert model.config.num_kv_shared_layers == 2
    model.set_attn_implementation(implementation)
    return model


def measurable(model_type, implementation):
    """The same, where the probe can measure it; a test of what it refuses by name is skipped when it has done so.

    Before transformers 5.7, Gemma 4 keeps its eager attention outside of the registry.
    """
    model = built(model_type, implementation)
    if implementation == "eager" and "get_interface" not in inspect.getsource(type(model.model.layers[0].self_attn)):
        said = r"did not call the attention function of transformers' registry .* another attn_implementation"
        with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(RuntimeError, match=said):
            model(**models.padded_batch(40), use_cache=False)
        pytest.skip(f"transformers {transformers.__version__} keeps its eager attention out of its registry: refused")
    return model


def cuts_queries(model) -> bool:
    return "logits_to_keep" in inspect.signature(model.model.forward).parameters


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", TYPES)
def test_calibration(model_type, implementation):
    model, batch = measurable(model_type, implementation), models.padded_batch(40)
    bounds = padded_bounds(batch["attention_mask"])
    maps = eager_maps(model, **batch, use_cache=False)
    expected = spans([(maps, bounds, None)])
    groups = head_groups(model, [batch], layers="all", by="receiver")
    assert groups.provenance["layers"] == list(range(LAYERS))
    assert groups.provenance["span"]["local"] == pytest.approx([expected[head] for head in groups.local], abs=1e-4)
    calibration = Calibration(model, "all", by="receiver")
    with evaluating(model), calibration:
        model(**batch, use_cache=False)
    span, kurtosis = calibration.scores()
    assert span == pytest.approx(expected, abs=1e-4)
    assert kurtosis == pytest.approx(kurtoses(maps, bounds), rel=1e-4)


@pytest.mark.parametrize("layout", ["plain", "padded", "packed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", TYPES)
def test_probe(model_type, implementation, layout):
    model, batch = measurable(model_type, implementation), models.padded_batch(40)
    bounds = padded_bounds(batch["attention_mask"])
    if layout == "packed":
        batch, bounds = models.packed_batch()
    elif layout == "plain":
        del batch["attention_mask"]
        bounds = padded_bounds(torch.ones_like(batch["input_ids"]))
    expected = oracle(eager_maps(model, **batch, use_cache=False), GROUPS, bounds, horizon=(3, 20))
    with torch.no_grad(), RhythmProbe(model, GROUPS, horizon=(3, 20)) as probe:
        model(**batch, use_cache=False)
    torch.testing.assert_close(probe.waad.double(), expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("model_type", TYPES)
def test_few_logits_are_refused_by_name(model_type, implementation):
    model, batch = measurable(model_type, implementation), models.padded_batch(40)
    with torch.no_grad(), RhythmProbe(model, HeadGroups([(0, 0)], [(1, 1)])) as probe:
        model(**batch, use_cache=False, logits_to_keep=10)  # these layers are computed for all tokens
    assert probe.waad.any()
    if not cuts_queries(model):
        return
    refused = pytest.raises(ValueError, match=r"logits_to_keep must be left out .*, got 10: .*layer 2 ")
    with refused, torch.no_grad(), RhythmProbe(model, GROUPS):
        model(**batch, use_cache=False, logits_to_keep=10)
    with pytest.raises(ValueError, match="logits_to_keep must be left out"):
        head_groups(model, [{**batch, "logits_to_keep": 1}], layers="all")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 10, 40])
@pytest.mark.parametrize("model_type", TYPES)
def test_logits_under_rhythm(model_type, kept, padded, monkeypatch):
    """Queries that are cut from the others see what they saw, also where "no mask" would say so of the first ones."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return functional.attention_with_rhythm(*args, **kwargs)

    monkeypatch.setattr(rhythm_attention, "attention_with_rhythm", counted)
    mine, theirs = built(model_type, "rhythm"), built(model_type, "eager")
    batch = models.padded_batch(40)
    live = batch["attention_mask"].bool()[:, 40 - kept if kept else 0 :]
    if not padded:
        del batch["attention_mask"]
        live = torch.ones_like(live)
    with torch.no_grad():
        got, want = (model(**batch, use_cache=False, logits_to_keep=kept).logits for model in (mine, theirs))
        whole = theirs(**batch, use_cache=False).logits[:, -got.shape[1] :]
    torch.testing.assert_close(got[live], want[live], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[live], whole[live], atol=1e-4, rtol=1e-4)
    cut = cuts_queries(mine) and kept in (1, 10)
    assert len(calls) == (LAYERS - 2 if cut else LAYERS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_under_rhythm(cache, padded):
    mine, theirs = built("gemma4_text", "rhythm"), built("gemma4_text", "eager")
    batch = models.padded_batch(30)
    batch = {name: x[:1] for name, x in batch.items()}  # padded on the left
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    options |= {"eos_token_id": None, "output_scores": True, "return_dict_in_generate": True}
    got, want = (model.generate(**batch, **options) for model in (mine, theirs))
    assert got.sequences.equal(want.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores), atol=1e-4, rtol=1e-4)

"""ALiBi, whose bias is in neither q, k nor a range of keys: refused by name, with the way out, and never read past."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

import rhythm_kernels as rk
from rhythm_kernels import HeadGroups, RhythmProbe, head_groups
from rhythm_kernels.integrations.transformers import register

from . import causal_types
from . import probe_models as models
from .probe_oracle import oracle, padded_bounds

GROUPS = HeadGroups([(0, 0), (2, 1)], [(1, 0), (3, 3)])
SLOPES = torch.tensor([0.25, 0.0625, 0.0156, 0.0039])
register()


@pytest.mark.parametrize(
    ("kind", "options", "shown"),
    [
        ("bloom", {}, r"alibi\w* of BloomModel"),
        ("mpt", {}, "its configuration says alibi=True"),
        ("mpt", {"attn_config": {"alibi": False}}, "build_mpt_alibi_tensor of MptModel"),  # which adds it all the same
        ("falcon", {"alibi": True}, "its configuration says alibi=True"),
    ],
)
def test_models_of_transformers(kind, options, shown, monkeypatch):
    monkeypatch.setitem(causal_types.OVERRIDES, kind, options)
    model = causal_types.build(kind)
    refused = rf"adds ALiBi to its scores \(.*{shown}\).*rk\.waad and rk\.fai.*alibi_slopes"
    with pytest.raises(ValueError, match=refused):
        RhythmProbe(model, GROUPS)
    with pytest.raises(ValueError, match=refused):
        head_groups(model, [])


@pytest.mark.parametrize("kind", ["bloom", "mpt", "falcon"])
def test_the_way_out(kind, monkeypatch):
    """Their q and k, met at the projection, with their slopes: the measures of the maps that they return."""
    if kind == "falcon":
        options = {"alibi": True, "multi_query": False, "num_kv_heads": 4}
        monkeypatch.setitem(causal_types.OVERRIDES, kind, options)
    model = causal_types.build(kind)
    batch = models.padded_batch()
    mask, met = batch["attention_mask"], []
    layer = next(m for m in model.modules() if m is not model and type(m).__name__.endswith("Attention"))
    projection = layer.Wqkv if kind == "mpt" else layer.query_key_value
    projection.register_forward_hook(lambda module, args, out: met.append(out))
    with torch.no_grad():
        maps = {0: model(**batch, use_cache=False, output_attentions=True).attentions[0].double()}
    fused = met[0].unflatten(-1, (3, 4, -1) if kind == "mpt" else (4, 3, -1))
    q, k, _ = fused.unbind(2 if kind == "mpt" else 3)
    slopes = 2.0 ** -torch.tensor([2, 4, 6, 8])
    if kind == "falcon":  # scaled with the scores, and under eager attention added to these and to the mask
        slopes *= 2 * q.shape[-1] ** -0.5
    bounds = padded_bounds(mask)
    start, end = (torch.tensor(x, dtype=torch.int32) for x in list(zip(*bounds, strict=True))[1:])
    ranges = {"alibi_slopes": slopes, "seq_start": start, "seq_end": end}
    every = HeadGroups([(0, head) for head in range(4)], [(0, head) for head in range(4)])
    waad, fai = oracle(maps, every, bounds, horizon=(10, 50))
    torch.testing.assert_close(rk.waad(q, k, **ranges).double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(rk.fai(q, k, horizon=(10, 50), **ranges).double(), fai, atol=1e-5, rtol=0)


def test_falcon_without_it():
    with pytest.raises(ValueError, match="so there is nothing to measure") as refused:
        RhythmProbe(causal_types.build("falcon"), GROUPS)
    assert "ALiBi" not in str(refused.value)


class MakesItsMask(LlamaModel):
    """As remote code does, whose attention goes through the registry."""

    def forward(self, *args, **kwargs):
        self.get_alibi_mask(kwargs)
        return super().forward(*args, **kwargs)

    def get_alibi_mask(self, kwargs): ...


class HasASwitch(MakesItsMask):
    use_alibi = None

    def forward(self, *args, **kwargs):
        if self.use_alibi:
            self.get_alibi_mask(kwargs)
        return LlamaModel.forward(self, *args, **kwargs)


def is_refused(model) -> bool:
    try:
        RhythmProbe(model, GROUPS)
    except ValueError as error:
        return "adds ALiBi" in str(error)
    return False


def test_what_shows_it():
    """A configuration, a tensor or module that some module holds, a function that a forward calls."""
    model = models.tiny_model("llama")
    assert not is_refused(model)
    for name, value in (("position_embedding_type", "alibi"), ("alibi", True), ("attn_config", {"alibi": True})):
        setattr(model.config, name, value)
        assert is_refused(model)
        delattr(model.config, name)
    attention = model.model.layers[2].self_attn
    attention.register_buffer("alibi_slopes", SLOPES)
    assert is_refused(model)
    del attention.alibi_slopes
    model.model.alibi = torch.nn.Identity()
    assert is_refused(model)
    model.model.alibi = None  # as where it is turned off
    assert not is_refused(model)
    model.model.__class__ = MakesItsMask
    assert is_refused(model)


@pytest.mark.parametrize("on", [False, True])
def test_a_switch_says_whether_it_is_on(on):
    model = models.tiny_model("llama")
    model.model.__class__ = HasASwitch
    model.model.use_alibi = on
    assert is_refused(model) == on


def forward_with_masks(model, change, groups=GROUPS):
    """A measured forward whose layers are given the mask that `change` makes of a causal one `(1, 1, T, T)`."""
    hidden = torch.full((30, 30), torch.finfo(torch.float32).min).triu(1)[None, None]

    def with_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": change(hidden)}

    handles = [layer.self_attn.register_forward_pre_hook(with_mask, with_kwargs=True) for layer in model.model.layers]
    try:
        with torch.no_grad(), RhythmProbe(model, groups) as probe:
            model(models.tokens(2, 30), use_cache=False)
        return probe
    finally:
        for handle in handles:
            handle.remove()


def alibi_mask(slopes, per_key=False):
    """The causal mask plus `- slope (t - s)`, or `slope s`, which differs from it by a constant of the row."""
    token = torch.arange(30)
    distance = (token[:, None] - token).clamp(min=0) if not per_key else -token
    return lambda hidden: hidden - slopes[:, None, None] * distance


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "rhythm"])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize(
    "slopes", [SLOPES, SLOPES[-1:], torch.tensor([0, 0, 0.25, 0])], ids=["every head", "one for all", "not the first"]
)
def test_a_bias_in_the_mask(implementation, per_key, slopes):
    model = models.tiny_model("llama", implementation)
    with pytest.raises(ValueError, match=r"adds a bias to the scores.*where it is ALiBi, rk\.waad.*alibi_slopes"):
        forward_with_masks(model, alibi_mask(slopes, per_key))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "rhythm"])
def test_a_float_mask_without_bias_is_measured(implementation):
    model = models.tiny_model("llama", implementation)
    batch = {"input_ids": models.tokens(2, 30), "use_cache": False}
    with torch.no_grad(), RhythmProbe(model, GROUPS) as plain:
        model(**batch)
    for change in (lambda hidden: hidden, lambda hidden: hidden.expand(2, 4, 30, 30)):
        probe = forward_with_masks(model, change)
        torch.testing.assert_close(probe.waad, plain.waad, atol=1e-5, rtol=0)
        torch.testing.assert_close(probe.fai, plain.fai, atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "rhythm"])
def test_heads_that_see_different_keys(implementation):
    model = models.tiny_model("llama", implementation)

    def one_head_sees_less(hidden):
        visible = (hidden == 0).repeat(1, 4, 1, 1)
        visible[:, 2, 20:, 3] = False
        return visible

    with pytest.raises(ValueError, match="its heads see different keys"):
        forward_with_masks(model, one_head_sees_less)


def test_slopes_given_to_the_attention_function():
    model = models.tiny_model("llama")

    def with_slopes(module, args, kwargs):
        return args, {**kwargs, "alibi_slopes": SLOPES}

    model.model.layers[1].self_attn.register_forward_pre_hook(with_slopes, with_kwargs=True)
    with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(ValueError, match=r"layer 1 adds ALiBi.*rk\.waad"):
        model(models.tokens(2, 30), use_cache=False)

"""What the probe leaves alone, and what it says when it cannot measure."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups
from rhythm_kernels.integrations.transformers import register

from . import probe_models as models

GROUPS = HeadGroups(local=[(0, 0), (2, 1)], global_=[(1, 0), (3, 3)])


@pytest.fixture
def model():
    return models.tiny_model("llama")


@pytest.fixture(autouse=True)
def registry_is_restored():
    register()  # as the first probe of a process does
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    yield
    assert (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)) == before


def forward(model, length=30):
    with torch.no_grad():
        return model(models.tokens(2, length)).logits


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}])
def test_generate_is_left_alone(model, options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
    ids = models.tokens(2, 12)
    plain = model.generate(ids, **options)
    with RhythmProbe(model, GROUPS, response_mask=torch.ones(7, 99)) as probe:
        assert torch.equal(model.generate(ids, **options), plain)
    with pytest.raises(RuntimeError, match="KV cache"):
        probe.waad  # noqa: B018


def test_generate_between_measured_forwards(model):
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        waad = probe.waad
        model.generate(models.tokens(1, 9), max_new_tokens=3, pad_token_id=0)
        forward(model)
    assert torch.equal(probe.waad, waad)


def test_other_models_pass_through(model):
    other = models.tiny_model("llama", seed=5)
    plain = forward(other)
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        waad = probe.waad
        assert torch.equal(forward(other, 30), plain)
        assert probe.waad is waad


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_models_at_once_leave_in_any_order(implementation):
    first, second = models.tiny_model("llama", implementation), models.tiny_model("qwen3", implementation)
    one, two = RhythmProbe(first, GROUPS), RhythmProbe(second, GROUPS)
    one.__enter__()
    two.__enter__()
    forward(first)
    one.__exit__(None, None, None)
    forward(second)
    two.__exit__(None, None, None)
    assert one.waad.shape == two.waad.shape
    assert not torch.equal(one.waad, two.waad)


def test_a_forward_inside_of_another_models_forward(model):
    """A hook that runs another probed model in the middle: both are measured, nothing leaks."""
    other = models.tiny_model("llama", seed=5)
    with RhythmProbe(other, GROUPS) as alone:
        forward(other)
    handle = model.model.layers[1].register_forward_hook(lambda *_: (forward(other), None)[1])
    with RhythmProbe(model, GROUPS) as outer, RhythmProbe(other, GROUPS) as inner:
        forward(model)
    handle.remove()
    assert torch.equal(inner.waad, alone.waad)
    assert outer.waad.shape == (2, 30)


def test_a_registered_replacement_is_called_and_kept(model):
    calls = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def replacement(*args, **kwargs):
        calls.append(1)
        return sdpa(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = replacement
    try:
        with RhythmProbe(model, GROUPS):
            forward(model)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is replacement
        assert len(calls) == 4
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_switching_the_implementation_between_forwards(model):
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        sdpa = probe.waad
        model.set_attn_implementation("eager")
        forward(model)
        assert set(probe.lse_source.values()) == {"streamed from q and k"}
    torch.testing.assert_close(probe.waad, sdpa, atol=1e-4, rtol=0)


def test_a_failed_forward_leaves_no_results_and_no_trace(model):
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        handle = model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward(model)
        handle.remove()
        with pytest.raises(RuntimeError, match="raised an exception"):
            probe.fai  # noqa: B018
        forward(model)
        assert probe.waad.shape == (2, 30)


def test_reading_before_any_forward(model):
    probe = RhythmProbe(model, GROUPS)
    with pytest.raises(RuntimeError, match="no forward"):
        probe.waad  # noqa: B018
    with probe, pytest.raises(RuntimeError, match="no forward"):
        probe.fai  # noqa: B018


def test_results_are_readable_after_the_block_and_a_probe_enters_once(model):
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
    assert probe.waad.shape == probe.fai.shape == (2, 30)
    waad = probe.waad
    forward(model, 44)
    assert probe.waad is waad
    with pytest.raises(RuntimeError, match="new RhythmProbe"):
        probe.__enter__()


def test_nested_probes_on_one_model(model):
    with RhythmProbe(model, GROUPS):
        with pytest.raises(RuntimeError, match="already being measured"):
            RhythmProbe(model.model, GROUPS).__enter__()
        forward(model)
    with RhythmProbe(model, GROUPS):
        forward(model)


def test_regrouping_inside_of_the_block(model):
    """Calibration goes unseen by the probe; what it gives is measured from the next forward on."""
    other = HeadGroups(local=[(3, 1)], global_=[(0, 2), (3, 0)])
    with RhythmProbe(model, other) as expected:
        forward(model)
    plain = head_groups(model, [{"input_ids": models.tokens(1, 20)}])
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        waad = probe.waad
        again = head_groups(model, [{"input_ids": models.tokens(1, 20)}])
        assert again == plain
        assert probe.waad is waad
        probe.groups = other
        assert probe.waad is waad
        forward(model)
        assert probe.groups is other
        assert torch.equal(probe.waad, expected.waad)
        assert torch.equal(probe.fai, expected.fai)
        assert set(probe.lse_source) == {0, 3}
        probe.groups = again
        forward(model, 17)
        assert probe.waad.shape == (2, 17)


def test_a_calibration_that_fails_inside_of_the_block(model):
    with RhythmProbe(model, GROUPS) as probe:
        with pytest.raises(ValueError, match="no response token"):
            head_groups(model, [])
        forward(model)
        assert probe.waad.shape == (2, 30)


def test_groups_that_do_not_fit_are_refused_when_set(model):
    with RhythmProbe(model, GROUPS) as probe:
        with pytest.raises(TypeError, match="groups"):
            probe.groups = {"local": [(0, 0)]}
        with pytest.raises(ValueError, match="layer 4"):
            probe.groups = HeadGroups([(4, 0)], [(0, 0)])
        forward(model)
        assert probe.groups is GROUPS


def test_lists_that_change_after_they_were_given(model):
    groups = HeadGroups(list(GROUPS.local), list(GROUPS.global_))
    with RhythmProbe(model, groups) as probe:
        forward(model)
        waad = probe.waad
        groups.local.append((1, 1))
        forward(model)
    assert torch.equal(probe.waad, waad)


def test_copies_of_a_watched_model_are_models_of_their_own(model):
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
        waad = probe.waad
        copied = copy.deepcopy(model)
        forward(copied, 17)
        assert probe.waad is waad
        with RhythmProbe(copied, GROUPS) as other:
            forward(copied)
    forward(copied)
    assert torch.equal(other.waad, waad)


def test_no_change_in_the_middle_of_a_forward(model):
    def hook(*_):
        probe.groups = GROUPS

    handle = model.model.layers[1].register_forward_hook(hook)
    with RhythmProbe(model, GROUPS) as probe, pytest.raises(RuntimeError, match="in the middle of"):
        forward(model)
    handle.remove()
    handle = model.model.layers[1].register_forward_hook(lambda *_: head_groups(model, []))
    with RhythmProbe(model, GROUPS) as probe, pytest.raises(RuntimeError, match="already being measured"):
        forward(model)
    handle.remove()
    with RhythmProbe(model, GROUPS) as probe:
        forward(model)
    assert probe.waad.shape == (2, 30)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ([(4, 0)], r"groups\.local must be of layers with softmax attention to measure, got layer 4"),
        ([(0, 4)], "got head 4 of layer 0, which has 4"),
    ],
)
def test_wrong_groups(model, local, message):
    with pytest.raises(ValueError, match=message):
        RhythmProbe(model, HeadGroups(local=local, global_=[(0, 0)]))


@pytest.mark.parametrize(
    ("heads", "error"),
    [
        ([], ValueError),
        ([(0, 0), (0, 0)], ValueError),
        ([(-1, 0)], ValueError),
        ([3], TypeError),
        ("ab", TypeError),
        ([(0.5, 1)], TypeError),
    ],
)
def test_malformed_groups(heads, error):
    with pytest.raises(error, match="local"):
        HeadGroups(local=heads, global_=[(0, 0)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 1.5}, TypeError, "window must be an int"),
        ({"horizon": (5, 4)}, ValueError, r"horizon\[1\] must be at least 5"),
        ({"horizon": (True, 4)}, TypeError, r"horizon\[0\] must be an int"),
        ({"horizon": 3}, ValueError, "horizon must be a pair"),
    ],
)
def test_wrong_numbers(model, options, error, message):
    with pytest.raises(error, match=message):
        RhythmProbe(model, GROUPS, **options)


def test_not_a_model(model):
    with pytest.raises(TypeError, match="groups"):
        RhythmProbe(model, {"local": [(0, 0)]})
    with pytest.raises(TypeError, match="PreTrainedModel"):
        RhythmProbe(torch.nn.Linear(2, 2), GROUPS)
    with pytest.raises(TypeError, match="model"):
        RhythmProbe("llama", GROUPS)
    with pytest.raises(ValueError, match="DataParallel"):
        RhythmProbe(torch.nn.DataParallel(model), GROUPS)


def test_response_mask_of_another_shape(model):
    with RhythmProbe(model, GROUPS, response_mask=torch.ones(2, 29)) as probe:
        with pytest.raises(ValueError, match="response_mask"):
            forward(model)
        probe.response_mask = torch.ones(2, 30)
        forward(model)
        assert probe.waad.shape == (2, 30)


def test_masks_that_are_no_ranges(model):
    ids = models.tokens(2, 30)
    holes = torch.ones_like(ids)
    holes[1, 7] = 0
    custom = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    with torch.no_grad(), RhythmProbe(model, GROUPS):
        with pytest.raises(ValueError, match="masked tokens between live ones"):
            model(ids, attention_mask=holes)
        with pytest.raises(ValueError, match="two-dimensional"):
            model(ids, attention_mask=custom)
        forward(model)


def test_packing_that_the_model_does_not_see(model):
    """With its default cache, transformers silently lets packed sequences see each other under sdpa."""
    batch, bounds = models.packed_batch()
    ends = torch.tensor([0, *(end for _, _, end in bounds)], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        with pytest.raises(ValueError, match="use_cache=False"):
            model(**batch, use_cache=True)
        with pytest.raises(ValueError, match="cu_seq_lens"):
            model(batch["input_ids"], **lengths, use_cache=False)
        model(**batch, **lengths, use_cache=False)
        assert probe.waad.shape == batch["input_ids"].shape


def test_packing_beside_a_mask(model):
    """transformers does not look at positions then, and every token sees the other sequences."""
    batch, _ = models.packed_batch()
    whole, padded = torch.ones(2, 1, batch["input_ids"].shape[1], dtype=torch.long)
    padded[:, -3:] = 0
    left = torch.ones(2, 30, dtype=torch.long)
    left[1, :7] = 0
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        for mask in (whole, padded):
            with pytest.raises(ValueError, match="start again within one"):
                model(**batch, attention_mask=mask, use_cache=False)
        # Positions of padding may be anything.
        positions = (left.cumsum(1) - 1).masked_fill(left == 0, 1)
        model(models.tokens(2, 30), attention_mask=left, position_ids=positions)
        assert probe.waad.shape == (2, 30)


def test_a_mask_that_is_not_causal_attention(model, monkeypatch):
    """A prefix whose tokens see each other in both directions."""
    made = modeling_llama.create_causal_mask

    def prefix(row, head, query, key):
        return (query < 5) & (key < 5)

    monkeypatch.setattr(modeling_llama, "create_causal_mask", functools.partial(made, or_mask_function=prefix))
    with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(ValueError, match="prefix and bidirectional masks"):
        model(models.tokens(2, 50), use_cache=False)


def test_the_meta_device_holds_nothing(model):
    model.to("meta")
    with torch.no_grad(), RhythmProbe(model, GROUPS), pytest.raises(ValueError, match="meta device"):
        model(models.tokens(2, 30).to("meta"))


def test_a_name_that_is_taken(monkeypatch):
    from transformers import AttentionInterface

    monkeypatch.setitem(AttentionInterface._global_mapping, "rhythm", ALL_ATTENTION_FUNCTIONS["sdpa"])
    with pytest.raises(RuntimeError, match=r"is taken by .*sdpa_attention_forward"):
        register()


def test_layers_without_softmax_attention():
    """Qwen3-Next mixes linear and softmax attention: the former is left out of a choice, and refused by name."""
    layer_types = ["linear_attention", "full_attention"] * 2
    model = models.tiny_model(
        "qwen3_next",
        head_dim=16,
        layer_types=layer_types,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )
    groups = head_groups(model, [{"input_ids": models.tokens(2, 40)}], layers="all")
    assert {layer for layer, _ in groups.local + groups.global_} <= {1, 3}
    with pytest.raises(ValueError, match=r"softmax attention to measure, got layer 0: .*\[1, 3\]"):
        head_groups(model, [{"input_ids": models.tokens(2, 40)}], layers=[0, 1])
    with torch.no_grad(), RhythmProbe(model, groups) as probe:
        model(models.tokens(2, 40))
    assert probe.waad.shape == (2, 40)


def test_no_softmax_attention_at_all():
    model = models.tiny_model("mamba", "eager", state_size=8)
    with pytest.raises(ValueError, match="nothing to measure"):
        RhythmProbe(model, GROUPS)


def test_unknown_implementations_are_refused_by_name(model):
    from transformers import AttentionInterface, AttentionMaskInterface

    before = dict(AttentionMaskInterface._global_mapping)
    AttentionInterface.register("mystery", ALL_ATTENTION_FUNCTIONS["sdpa"])
    AttentionMaskInterface.register("mystery", before["sdpa"])
    try:
        model.set_attn_implementation("mystery")
        with RhythmProbe(model, GROUPS), pytest.raises(NotImplementedError, match="'mystery'"):
            forward(model)
    finally:
        del AttentionInterface._global_mapping["mystery"]
        del AttentionMaskInterface._global_mapping["mystery"]


def test_sharded_heads_and_sequences_are_refused(model):
    model.config.num_attention_heads = 8  # what a rank meets under Ulysses: half of the heads that the model has
    with RhythmProbe(model, GROUPS), pytest.raises(ValueError, match="tensor parallelism"):
        forward(model)
    model.config.num_attention_heads = 4
    halve = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0][:, :15],), {**kwargs, "position_embeddings": halved(kwargs)}),
        with_kwargs=True,
    )
    with RhythmProbe(model, HeadGroups([(0, 0)], [(0, 1)])), pytest.raises(ValueError, match="Ulysses, ring"):
        forward(model)
    halve.remove()


def halved(kwargs):
    return tuple(x[:, :15] for x in kwargs["position_embeddings"])


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, rhythm_kernels; assert 'transformers' not in sys.modules; rhythm_kernels.RhythmProbe; "
    code += "rhythm_kernels.HeadGroups; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

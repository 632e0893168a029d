"""The probe in training: gradients, gradient checkpointing, autocast, LoRA, compiled and wrapped models."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe, reference

from . import probe_models as models
from .probe_oracle import eager_maps, oracle, padded_bounds

GROUPS = HeadGroups(local=[(0, 0), (2, 1), (2, 3)], global_=[(1, 0), (2, 2), (3, 3)])


def train_step(model, batch, probe=None):
    """Logits and gradients of one step; with a probe, its block is around forward and backward."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits
    (logits.float().log_softmax(-1)[..., 3] * batch["attention_mask"]).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, two):
    assert torch.equal(one[0], two[0])
    assert one[1].keys() == two[1].keys()
    for name in one[1]:
        assert torch.equal(one[1][name], two[1][name]), name


@pytest.fixture
def batch():
    return models.padded_batch()


def plain_measures(model, batch):
    with torch.no_grad(), RhythmProbe(model, GROUPS) as probe:
        model(**batch, use_cache=False)
    return probe.waad, probe.fai


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_identical(implementation, padded, batch):
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    model = models.tiny_model("qwen3", implementation).train()
    plain = train_step(model, batch)
    with RhythmProbe(model, GROUPS) as probe:
        probed = train_step(model, batch)
    assert_same(plain, probed)
    assert not probe.waad.requires_grad
    expected = plain_measures(model, batch)
    assert torch.equal(probe.waad, expected[0])
    assert torch.equal(probe.fai, expected[1])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradient_checkpointing_is_measured_once(implementation, reentrant, batch, monkeypatch):
    model = models.tiny_model("llama", implementation).train()
    expected = plain_measures(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain = train_step(model, batch)
    met = []
    layer = RhythmProbe.layer
    monkeypatch.setattr(RhythmProbe, "layer", lambda self, call: (met.append(call.layer), layer(self, call)))
    with RhythmProbe(model, GROUPS) as probe:
        probed = train_step(model, batch)
    assert_same(plain, probed)
    assert met == [0, 1, 2, 3]
    assert torch.equal(probe.waad, expected[0])
    assert torch.equal(probe.fai, expected[1])


def defined_measures(model, batch, monkeypatch):
    """A probe of one forward, and what the dense definitions give in float64 on the very q and k it met."""
    sums = [0.0, 0.0]
    layer = RhythmProbe.layer

    def spy(self, call):
        layer(self, call)
        q, k, options = call.q.double(), call.k.double(), {**call.score, **call.sequences.arguments, "per_head": True}
        for which, (measure, heads) in enumerate(((reference.waad, GROUPS.local), (reference.fai, GROUPS.global_))):
            mine = [head for at, head in heads if at == call.layer]
            if mine:
                sums[which] = sums[which] + measure(q, k, heads=mine, **options).sum(1) / len(heads)

    with monkeypatch.context() as patch, RhythmProbe(model, GROUPS) as probe:
        patch.setattr(RhythmProbe, "layer", spy)
        logits = model(**batch, use_cache=False).logits
    return probe, logits, sums


def check_defined(probe, sums, rough):
    """`rough`: torch's CPU attention takes half-precision exponentials to 6e-5, and so does its log-sum-exp."""
    torch.testing.assert_close(probe.waad.double(), sums[0], atol=1e-3 if rough else 1e-4, rtol=0)
    torch.testing.assert_close(probe.fai.double(), sums[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autocast(implementation, batch, monkeypatch):
    model = models.tiny_model("llama", implementation)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(**batch).logits
        probe, logits, sums = defined_measures(model, batch, monkeypatch)
        maps = eager_maps(model, **batch)
    assert torch.equal(logits, plain)
    check_defined(probe, sums, rough=implementation == "sdpa")
    waad, fai = oracle(maps, GROUPS, padded_bounds(batch["attention_mask"]))  # its maps are rounded to bfloat16
    torch.testing.assert_close(probe.waad.double(), waad, atol=0.3, rtol=0)
    torch.testing.assert_close(probe.fai.double(), fai, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dtypes(implementation, dtype, batch, monkeypatch):
    model = models.tiny_model("llama", implementation).to(dtype)
    if implementation == "eager":  # in float64, eager attention gives NaN where a row is all padding
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        plain = model(**batch).logits
        probe, logits, sums = defined_measures(model, batch, monkeypatch)
    assert torch.equal(logits, plain)
    check_defined(probe, sums, rough=implementation == "sdpa" and dtype != torch.float64)
    source = "sdpa: CPU flash attention" if implementation == "sdpa" else "streamed from q and k"
    assert set(probe.lse_source.values()) == {source}


def test_inference_mode(batch):
    model = models.tiny_model("llama")
    expected = plain_measures(model, batch)
    with torch.inference_mode(), RhythmProbe(model, GROUPS) as probe:
        model(**batch)
    assert torch.equal(probe.waad, expected[0])
    assert set(probe.lse_source.values()) == {"sdpa: CPU flash attention"}


def test_lora(batch):
    base = models.tiny_model("qwen3")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.eval()
    expected = plain_measures(model, batch)
    maps = eager_maps(base, **batch)  # the adapters sit inside of the base model's layers
    waad, fai = oracle(maps, GROUPS, padded_bounds(batch["attention_mask"]))
    torch.testing.assert_close(expected[0].double(), waad, atol=1e-4, rtol=0)
    torch.testing.assert_close(expected[1].double(), fai, atol=1e-4, rtol=0)
    plain = train_step(model.train(), batch)
    with RhythmProbe(model, GROUPS):
        probed = train_step(model, batch)
    assert_same(plain, probed)


def test_prompt_tuning_is_refused():
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(models.tiny_model("llama"), config)
    with pytest.raises(ValueError, match="prompt learning"):
        RhythmProbe(model, GROUPS)


COMPILERS = {
    "around": lambda model: torch.compile(model, backend="eager"),
    "in place": lambda model: (model.compile(backend="eager"), model)[1],
    "decoder in place": lambda model: (model.model.compile(backend="eager"), model)[1],
    "each layer": lambda model: ([layer.compile(backend="eager") for layer in model.model.layers], model)[1],
}


@pytest.mark.parametrize(
    ("how", "warm"),
    [
        ("around", True),
        ("decoder in place", True),
        pytest.param("around", False, marks=pytest.mark.long),
        pytest.param("in place", True, marks=pytest.mark.long),
        pytest.param("each layer", True, marks=pytest.mark.long),
    ],
)
def test_compiled_models(how, warm):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    groups = HeadGroups(local=[(0, 0), (1, 1)], global_=[(1, 0)])
    plain_model = models.tiny_model("llama", num_hidden_layers=2)
    batch = {"input_ids": models.tokens(2, 40)}
    with torch.no_grad():
        with RhythmProbe(plain_model, groups) as expected:
            logits = plain_model(**batch).logits
        model = COMPILERS[how](copy.deepcopy(plain_model))
        if warm:
            model(**batch)
            model(**batch, use_cache=False)
        for _ in range(2):
            with RhythmProbe(model, groups) as probe:
                measured = model(**batch, use_cache=False).logits
            torch.testing.assert_close(measured, logits)
            torch.testing.assert_close(probe.waad, expected.waad)
            torch.testing.assert_close(probe.fai, expected.fai)
            torch.testing.assert_close(model(**batch, use_cache=False).logits, logits)
            torch.testing.assert_close(model(**batch).logits, logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_micro_batches_of_different_lengths():
    """Gradients accumulate over them as without a probe; each is measured on its own."""
    model = models.tiny_model("qwen3").train()
    lengths = (40, 72, 51)

    def accumulated(probe):
        model.zero_grad()
        measured = []
        for length in lengths:
            batch = models.padded_batch(length)
            logits = model(**batch, use_cache=False).logits
            (logits.log_softmax(-1)[..., 3] * batch["attention_mask"]).sum().backward()
            measured.append(None if probe is None else probe.waad)
        return [p.grad for p in model.parameters()], measured

    plain, _ = accumulated(None)
    with RhythmProbe(model, GROUPS) as probe:
        probed, waads = accumulated(probe)
    assert all(torch.equal(*pair) for pair in zip(plain, probed))
    for length, waad in zip(lengths, waads):
        assert torch.equal(waad, plain_measures(model, models.padded_batch(length))[0])

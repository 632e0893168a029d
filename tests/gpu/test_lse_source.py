"""Where the log-sum-exp comes from under each attention operator of torch, and that asking for it changes no bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rhythm_kernels import HeadGroups, RhythmProbe, reference
from rhythm_kernels.probe import lse

from . import cudnn

transformers = pytest.importorskip("transformers")
gpu = pytest.mark.gpu

GROUPS = HeadGroups(local=[(0, 0), (1, 3), (1, 5)], global_=[(0, 1), (1, 2)])
STREAMED = "streamed from q and k"
OPERATORS = {
    SDPBackend.FLASH_ATTENTION: "sdpa: CUDA flash attention",
    SDPBackend.EFFICIENT_ATTENTION: "sdpa: CUDA efficient attention",
    SDPBackend.CUDNN_ATTENTION: "sdpa: cuDNN attention",
    SDPBackend.MATH: STREAMED,
}


def small_model(device: torch.device | str, kv_heads: int):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=2.0 * weight.shape[-1] ** -0.5)
    return model.to(device, torch.bfloat16)


def check_source(device: torch.device | str, operator: SDPBackend, source: str, training: bool, padded: bool) -> None:
    """`lse_source` of each layer, the model's bits, and WAAD and FAI against float64 on the very q and k."""
    # The efficient operator has no grouped heads, for which transformers asks where there is no mask.
    model = small_model(device, 8 if operator is SDPBackend.EFFICIENT_ATTENTION else 2).train(training)
    batch = {"input_ids": torch.randint(3, 97, (2, 300), generator=torch.Generator().manual_seed(1)).to(device)}
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :37] = 0
    sums = [0.0, 0.0]
    layer = RhythmProbe.layer

    def spy(self, call):
        layer(self, call)
        q, k, options = call.q.double(), call.k.double(), {**call.score, **call.sequences.arguments, "per_head": True}
        for which, (measure, heads) in enumerate(((reference.waad, GROUPS.local), (reference.fai, GROUPS.global_))):
            mine = [head for at, head in heads if at == call.layer]
            sums[which] = sums[which] + measure(q, k, heads=mine, **options).sum(1) / len(heads)

    with torch.set_grad_enabled(training), sdpa_kernel(operator):
        plain = model(**batch, use_cache=False).logits
        with mock.patch.object(RhythmProbe, "layer", spy), RhythmProbe(model, GROUPS) as probe:
            measured = model(**batch, use_cache=False).logits
    assert probe.lse_source == {0: source, 1: source}
    assert torch.equal(measured, plain)
    assert float(sums[1].max()) > 0.005
    assert (probe.waad.double() - sums[0]).abs().max() < 1e-3
    assert (probe.fai.double() - sums[1]).abs().max() < 1e-3 * sums[1].max()


@gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_source(operator, training, padded):
    if padded and operator is SDPBackend.FLASH_ATTENTION:
        pytest.skip("torch's flash attention takes no mask")
    try:
        cudnn.with_and_without(cudnn.AttentionCall(1, 64, 4, 4, 64, padded=padded), "cuda", operator)
    except RuntimeError as error:
        pytest.skip(f"torch has no {operator.name} here: {error}")
    source = OPERATORS[operator]
    if operator is SDPBackend.CUDNN_ATTENTION and not training and not lse.RAISE_CUDNN_FLAG:
        source = STREAMED
    check_source("cuda", operator, source, training, padded)


@gpu
@pytest.mark.parametrize("call", cudnn.CALLS, ids=str)
def test_cudnn_gives_the_same_bits_when_asked(call, monkeypatch):
    """If this fails, RAISE_CUDNN_FLAG must be False."""
    monkeypatch.setattr(lse, "RAISE_CUDNN_FLAG", True)
    try:
        observed, alone, seen = cudnn.with_and_without(call, "cuda")
    except RuntimeError as error:
        pytest.skip(f"torch has no cuDNN attention here: {error}")
    assert seen.source == OPERATORS[SDPBackend.CUDNN_ATTENTION]
    assert torch.equal(observed, alone)
    if call.length > 2048:
        return
    (q, k, _), options = call.inputs("cuda")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q.double() @ k.double().mT * call.size**-0.5
    visible = options.get("attn_mask", torch.ones(call.length, call.length, dtype=torch.bool, device="cuda").tril())
    want = logits.masked_fill(~visible, float("-inf")).logsumexp(-1)
    assert (seen.lse.view(want.shape).double() - want).abs().max() < 1e-4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_same_on_a_cpu(training, padded):
    check_source("cpu", SDPBackend.FLASH_ATTENTION, "sdpa: CPU flash attention", training, padded)


def test_asking_changes_nothing_on_a_cpu():
    call = cudnn.AttentionCall(2, 65, 4, 2, 64)
    observed, alone, seen = cudnn.with_and_without(call, "cpu", SDPBackend.FLASH_ATTENTION)
    assert torch.equal(observed, alone)
    assert seen.lse.shape == (2, 4, 65)
    assert cudnn.settle_cudnn("cpu") == ("", "cuDNN attention is not available: no CUDA device")


@pytest.mark.parametrize("differs", [False, True])
def test_what_is_settled(differs, monkeypatch):
    """The decision itself, on a device where cuDNN's two outputs are what the test says."""
    monkeypatch.setattr(lse, "RAISE_CUDNN_FLAG", True)
    seen = lse.LseObserver()
    seen.lse = torch.zeros(1)
    one, other = torch.zeros(3), torch.zeros(3)
    other[1] = 0.25 * differs
    monkeypatch.setattr(cudnn, "with_and_without", lambda call, device: (one, other, seen))
    trouble, found = cudnn.settle_cudnn("cuda")
    assert lse.RAISE_CUDNN_FLAG is not differs
    assert ("by up to 0.25" in trouble) if differs else (trouble == "" and "in 6 calls" in found)


def test_cudnn_that_is_not_there(monkeypatch):
    def fails(call, device):
        raise RuntimeError("No available kernel.")

    monkeypatch.setattr(cudnn, "with_and_without", fails)
    trouble, found = cudnn.settle_cudnn("cuda")
    assert trouble == "" and "not available" in found and "No available kernel" in found
    assert lse.RAISE_CUDNN_FLAG

"""Calibration: spans against full eager maps, the choice of layers, ranking, files and provenance."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch

from rhythm_kernels import HeadGroups, RhythmProbe, head_groups
from rhythm_kernels.probe.structure import attention_layers, find_decoder

from . import probe_models as models
from .probe_oracle import eager_maps, kurtoses, padded_bounds, responses, spans


def responses_of(mask: torch.Tensor) -> torch.Tensor:
    response = mask.bool().clone()
    response[:, :20] = False
    response[:, 33] = False
    return response


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layers", ["middle5", "all", [0, 3]])
def test_groups_are_those_of_the_full_maps(implementation, layers):
    model = models.tiny_model("qwen3", implementation, num_hidden_layers=6).train()
    first, second = models.padded_batch(), models.padded_batch(51)
    batches = [{**first, "response_mask": responses_of(first["attention_mask"])}, second]
    groups = head_groups(model, batches, layers=layers)
    assert model.training

    sampled = {"middle5": [2, 3, 4], "all": list(range(6))}.get(str(layers), layers)
    cases = []
    for batch, response in ((first, batches[0]["response_mask"]), (second, None)):
        maps = eager_maps(model.eval(), **batch)
        cases.append(({at: maps[at] for at in sampled}, padded_bounds(batch["attention_mask"]), response))
    expected = spans(cases)
    order = sorted(expected, key=lambda head: (expected[head], head))
    count = max(1, round(0.3 * len(order)))
    assert groups.local == order[:count]
    assert groups.global_ == order[-count:]
    recorded = groups.provenance["span"]
    assert recorded["local"] == pytest.approx([expected[head] for head in groups.local], abs=1e-3)
    assert recorded["global"] == pytest.approx([expected[head] for head in groups.global_], abs=1e-3)
    tokens = sum(end - start for _, bounds, response in cases for _, _, start, end in responses(bounds, response))
    assert groups.provenance["calibration"] == {"sequences": 8, "response_tokens": tokens}


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_no_logits_are_made_that_nobody_reads(family):
    """A calibration needs none: of a model that can leave them out, it asks for those of one token."""
    model, batch, made = models.tiny_model(family), models.padded_batch(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    lean = head_groups(model, [batch])
    full = head_groups(model, [{**batch, "logits_to_keep": 0}])  # what a batch says is heard
    assert made == [1, batch["input_ids"].shape[1]]
    assert lean == full


def test_a_wrapper_that_takes_no_such_argument():
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask=None, use_cache=True):
            return self.model(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model, batch = models.tiny_model("qwen3"), models.padded_batch()
    assert head_groups(Wrapper(model), [batch]) == head_groups(model, [batch])


def test_labels_mark_the_response():
    model = models.tiny_model("llama")
    batch = models.padded_batch()
    response = responses_of(batch["attention_mask"])
    labels = torch.where(response, batch["input_ids"], -100)
    by_labels = head_groups(model, [{**batch, "labels": labels}])
    by_mask = head_groups(model, [{**batch, "response_mask": response}])
    assert by_labels == by_mask
    assert by_labels.provenance == by_mask.provenance


def test_splitting_the_batches_changes_nothing():
    model = models.tiny_model("llama")
    ids = models.tokens(6, 40)
    together = head_groups(model, [{"input_ids": ids}], layers="all")
    apart = head_groups(model, ({"input_ids": row[None]} for row in ids), layers="all")
    assert together == apart
    assert together.provenance["span"]["local"] == pytest.approx(apart.provenance["span"]["local"], rel=1e-5)


@pytest.mark.parametrize("by", ["span", "receiver"])
def test_batches_stream(by):
    """No batch but the last is alive when the next one is asked for, and the state does not grow."""
    model = models.tiny_model("llama")
    kept: list[weakref.ref] = []
    alive = []

    def batches():
        for seed in range(6):
            gc.collect()
            alive.append((sum(ref() is not None for ref in kept), tensors()))
            ids = models.tokens(2, 40, seed=seed)
            kept.append(weakref.ref(ids))
            yield {"input_ids": ids}
            del ids

    def tensors():
        # Not those of a compiler that an earlier test has used: their sizes are symbols.
        return sum(x.numel() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))

    groups = head_groups(model, batches(), layers="all", by=by)
    assert max(old for old, _ in alive) <= 1
    assert len({count for _, count in alive[1:]}) == 1
    assert groups.provenance["calibration"] == {"sequences": 12, "response_tokens": 480}


def test_packed_batches():
    model = models.tiny_model("llama")
    packed, bounds = models.packed_batch()
    rows = [{"input_ids": packed["input_ids"][:, start:end]} for _, start, end in bounds]
    one, many = head_groups(model, [packed], layers="all"), head_groups(model, rows, layers="all")
    assert one == many
    assert one.provenance["calibration"] == many.provenance["calibration"]


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, [0]),
        (2, [0, 1]),
        (4, [1, 2]),
        (6, [2, 3, 4]),
        (12, [4, 5, 6, 7, 8]),
        (28, [9, 11, 14, 16, 18]),
        (36, [12, 15, 18, 21, 24]),
    ],
)
def test_middle_layers(total, expected):
    decoder = find_decoder(models.tiny_model("llama", num_hidden_layers=total))
    assert attention_layers(decoder, "middle5") == expected


def test_ties_go_by_layer_and_head():
    """With all queries zero every head attends uniformly, and all spans are equal."""
    model = models.tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    groups = head_groups(model, [{"input_ids": models.tokens(1, 32)}], layers="all")
    order = [(layer, head) for layer in range(4) for head in range(4)]
    assert groups.local == order[:5]
    assert groups.global_ == order[-5:]


@pytest.mark.parametrize(("quantile", "count"), [(0.01, 1), (0.3, 5), (0.5, 8), (1.0, 16)])
def test_quantile(quantile, count):
    groups = head_groups(models.tiny_model("llama"), [{"input_ids": models.tokens(1, 30)}], "all", quantile)
    assert len(groups.local) == len(groups.global_) == count


@pytest.mark.parametrize("responding", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_receiver_heads(family, responding):
    """The heads whose attention from later tokens is most peaked: kurtosis over tokens of its column means."""
    model = models.tiny_model(family, "eager")
    batch = models.padded_batch()
    response = responses_of(batch["attention_mask"]) if responding else None
    groups = head_groups(model, [{**batch, "response_mask": response}], layers="all", by="receiver")
    by_span = head_groups(model, [{**batch, "response_mask": response}], layers="all")
    assert groups.local == by_span.local
    expected = kurtoses(eager_maps(model, **batch), padded_bounds(batch["attention_mask"]), response)
    assert groups.global_ == sorted(expected, key=lambda head: (expected[head], head))[-5:]


def test_files(tmp_path):
    model = models.tiny_model("llama")
    model.config._name_or_path, model.config._commit_hash = "someone/their-llama", "0123abc"
    path = tmp_path / "groups.json"
    groups = head_groups(model, [{"input_ids": models.tokens(2, 30)}])
    groups.save(path)
    loaded = HeadGroups.load(path)
    assert loaded == groups
    assert loaded.provenance == json.loads(json.dumps(groups.provenance))
    made = loaded.provenance
    assert made["model_name"] == "someone/their-llama"
    assert made["revision"] == "0123abc"
    assert made["calibration"] == {"sequences": 2, "response_tokens": 60}
    assert made["architecture"]["model_type"] == "llama"
    assert len(made["config_hash"]) == 64
    twin = head_groups(models.tiny_model("llama", seed=3), [{"input_ids": models.tokens(1, 30)}])
    changed = head_groups(models.tiny_model("llama", rms_norm_eps=1e-3), [{"input_ids": models.tokens(1, 30)}])
    assert twin.provenance["config_hash"] == made["config_hash"] != changed.provenance["config_hash"]
    content = json.loads(path.read_text())
    assert content["local"] == [list(head) for head in groups.local]
    assert content["global"] == [list(head) for head in groups.global_]
    with RhythmProbe(model, loaded):
        pass


def test_groups_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "groups.json"
    head_groups(models.tiny_model("llama"), [{"input_ids": models.tokens(2, 30)}]).save(path)
    for other in (models.tiny_model("qwen3"), models.tiny_model("llama", num_hidden_layers=5)):
        with pytest.raises(ValueError, match="another architecture"):
            RhythmProbe(other, HeadGroups.load(path))
    RhythmProbe(models.tiny_model("llama", seed=3), HeadGroups.load(path))  # other weights of the same


def test_groups_written_by_hand(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('{"local": [[0, 1]], "global": [[3, 2], [1, 0]]}')
    groups = HeadGroups.load(path)
    assert groups == HeadGroups(local=[(0, 1)], global_=[(3, 2), (1, 0)])
    RhythmProbe(models.tiny_model("qwen3"), groups)


@pytest.mark.parametrize("text", ["", "[]", '{"local": [[0, 1]]}', '{"local": 3, "global": 4}', "\x00"])
def test_files_that_are_none(tmp_path, text):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"groups\.json"):
        HeadGroups.load(path)


def test_errors():
    model = models.tiny_model("llama")
    batch = {"input_ids": models.tokens(2, 30)}
    with pytest.raises(ValueError, match="no response token"):
        head_groups(model, [])
    with pytest.raises(ValueError, match="no response token"):
        head_groups(model, [{**batch, "response_mask": torch.zeros(2, 30)}])
    for slip in (batch, [batch["input_ids"]]):
        with pytest.raises(TypeError, match="batches must be a list of dicts of model inputs"):
            head_groups(model, slip)
    with pytest.raises(ValueError, match="quantile"):
        head_groups(model, [batch], quantile=0)
    with pytest.raises(ValueError, match="layers"):
        head_groups(model, [batch], layers="middle")
    with pytest.raises(ValueError, match="layer 9"):
        head_groups(model, [batch], layers=[9])
    with pytest.raises(ValueError, match="by"):
        head_groups(model, [batch], by="entropy")
    with pytest.raises(ValueError, match="response_mask"):
        head_groups(model, [{**batch, "response_mask": torch.ones(2, 29)}])


def test_batches_may_say_use_cache():
    model = models.tiny_model("llama")
    ids = models.tokens(2, 30)
    assert head_groups(model, [{"input_ids": ids, "use_cache": True}]) == head_groups(model, [{"input_ids": ids}])


@pytest.mark.parametrize(
    ("options", "mask", "error", "name"),
    [
        ({"layers": 1}, None, TypeError, "layers must be .*, got 1"),
        ({"layers": [1.0]}, None, TypeError, "layers"),
        ({"quantile": "0.3"}, None, TypeError, "quantile"),
        ({}, [[True] * 30] * 2, ValueError, "response_mask must be a tensor .*, got list"),
    ],
)
def test_arguments_of_a_wrong_type(options, mask, error, name):
    batch = {"input_ids": models.tokens(2, 30), "response_mask": mask}
    with pytest.raises(error, match=name):
        head_groups(models.tiny_model("llama"), [batch], **options)


def test_layers_in_a_tensor_are_saved_as_numbers(tmp_path):
    groups = head_groups(models.tiny_model("llama"), [{"input_ids": models.tokens(2, 30)}], torch.tensor([1, 2]))
    groups.save(tmp_path / "groups.json")
    assert HeadGroups.load(tmp_path / "groups.json").provenance["layers"] == [1, 2]
